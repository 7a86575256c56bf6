"""Count a source of pairs, and take samples of it, in memory that does not grow with it but for 8 bytes a text."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from lamplit.data.pairs import Pair, Pairs
from lamplit.errors import UsageError

SAMPLE = 512  # images
TEXTS = 32_768  # so that a kernel head has its full size
Item = TypeVar("Item")


@dataclass
class Census:
    """What a source holds: counts, and samples of its images and texts, each with the same chance.

    Attributes:
        images: number of images.
        pairs: number of pairs of an image and a text.
        captions: number of distinct texts.
        sample: of the pairs, at most `SAMPLE`.
        texts: a sample of the texts, at most `TEXTS`, in no order.
    """

    images: int = 0
    pairs: int = 0
    captions: int = 0
    sample: list[Pair] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @classmethod
    def take(cls, pairs: Pairs) -> Census:
        """Read a source."""
        census, hashes = cls(), array("q")
        chance = random.Random(0)  # noqa: S311 (nothing secret)
        for pair in pairs:
            census.images += 1
            _keep(census.sample, pair, census.images, SAMPLE, chance)
            for text in pair.texts:
                census.pairs += 1
                hashes.append(hash(text))
                _keep(census.texts, text, census.pairs, TEXTS, chance)
        chance.shuffle(census.texts)  # neighbours in a source are alike
        census.captions = len(np.unique(np.frombuffer(hashes, np.int64)))
        return census

    def grow(self, images: int | None) -> float:
        """Reckon with so many images, and as many more pairs and captions; return how many times as many these are."""
        if images is None:
            return 1.0
        if images < self.images:
            raise UsageError(f"{images:,} images were to be reckoned for, and the source has {self.images:,}")
        factor = images / self.images
        self.images, self.pairs, self.captions = images, round(self.pairs * factor), round(self.captions * factor)
        return factor


def _keep(sample: list[Item], item: Item, number: int, size: int, chance: random.Random) -> None:
    """Keep item `number` of a stream with the chance size / number, in the place of another (Vitter's algorithm R)."""
    if len(sample) < size:
        sample.append(item)
    elif (place := chance.randrange(number)) < size:
        sample[place] = item
