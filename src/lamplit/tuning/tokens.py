"""Token ids of captions as flat arrays: computed in one pass, and kept for the next run with the same tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lamplit.store.arrays.caption_arrays import CaptionPart, Captions
from lamplit.store.arrays.derived import Draft, derive
from lamplit.towers.texts.text_tower import TextTower

_OF_CAPTIONS = ("starts", "lengths", "cut")


@dataclass(frozen=True)
class Tokens(Sequence[list[int]]):
    """Token ids of M captions; those of caption m are `lengths[k]` ids from `starts[k]` on, with k = numbers[m].

    Attributes:
        flats: the ids of all captions of a store, of 16 or 32 bits, in one array or several, counted through.
        starts: where each begins.
        lengths: how many each has.
        cut: whether a caption was longer than the context length.
        numbers: (M,) which captions these are.
    """

    flats: Sequence[NDArray[np.unsignedinteger[Any]]]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    cut: NDArray[np.bool_]
    numbers: NDArray[np.int32]

    def __len__(self) -> int:
        """Return M."""
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> list[int]: ...

    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...

    def __getitem__(self, place: int | slice) -> list[int] | list[list[int]]:
        """Return the ids of one caption or of some."""
        if isinstance(place, slice):
            return self._of(self.numbers[place])
        return self._of(self.numbers[place : place + 1])[0]

    def take(self, places: Tensor) -> list[list[int]]:
        """Return the ids of (n,) captions."""
        return self._of(self.numbers[places.numpy()])

    def sizes(self, places: Tensor) -> NDArray[np.int32]:
        """Return how many ids (n,) captions have."""
        sizes: NDArray[np.int32] = self.lengths[self.numbers[places.numpy()]]
        return sizes

    def count_cut(self) -> int:
        """Count the captions that were longer than the context length."""
        return int(self.cut[self.numbers].sum())

    def _of(self, numbers: NDArray[np.int32]) -> list[list[int]]:
        starts, begins = self.starts[numbers], _begins(self.flats)
        which = np.searchsorted(begins, starts, "right") - 1
        starts -= begins[which]
        flats = [flat.view(np.ndarray) for flat in self.flats]  # its slices are made faster than those of a memory map
        runs = zip(which.tolist(), starts.tolist(), (starts + self.lengths[numbers]).tolist(), strict=True)
        return [flats[part][start:end].tolist() for part, start, end in runs]


def tokenize_captions(
    captions: Captions, numbers: NDArray[np.int32], tower: TextTower, *, progress: bool = False
) -> Tokens:
    """Tokenise the captions of a store for a text tower; arrays of a large store are kept for the next time.

    Args:
        captions: all captions of the store.
        numbers: (M,) those that are read.
        tower: whose tokenizer and context length are taken.
        progress: show a bar on stderr.
    """
    kind: Any = np.uint16 if len(tower.tokenizer) <= 1 << 16 else np.uint32
    begin = f"tokens-{captions.key}-"
    name = f"{begin}{tokenizer_digest(tower)}-{tower.context_length}"

    def of_part(part: CaptionPart) -> dict[str, NDArray[Any]]:
        def make(draft: Draft) -> None:
            size = part.first.shape
            starts, lengths = draft.create("starts", size, np.int64), draft.create("lengths", size, np.int32)
            cut, end = draft.create("cut", size, np.bool_), 0
            for texts, places in part.batches(name="tokens", progress=progress):
                tokens, cut[places] = tower.tokenize_cut(texts)
                counts = np.fromiter(map(len, tokens), np.int32, len(tokens))
                lengths[places] = counts
                starts[places] = end + np.cumsum(counts, dtype=np.int64) - counts
                draft.append("flat", np.fromiter(chain.from_iterable(tokens), kind, int(counts.sum())))
                end += int(counts.sum())

        return derive(captions.store, name, ("flat", *_OF_CAPTIONS), make, part=part.part, instead_of=begin)

    parts = captions.parts
    found = [of_part(part) for part in parts]
    flats = [each.pop("flat") for each in found]

    def join(draft: Draft) -> None:
        size = captions.hashes.shape
        joined = {field: draft.create(field, size, found[0][field].dtype) for field in _OF_CAPTIONS}
        for part, tokens, start in zip(parts, found, _begins(flats), strict=True):
            there, here = part.first_here()
            for field in _OF_CAPTIONS:
                joined[field][there] = tokens[field][here]
            joined["starts"][there] += start

    if len(found) == 1:
        return Tokens(flats, **found[0], numbers=numbers)
    whole = derive(captions.store, f"all-{name}", _OF_CAPTIONS, join, instead_of=f"all-{begin}")
    return Tokens(flats, **whole, numbers=numbers)


def _begins(flats: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return where each of several arrays begins, if they are counted through."""
    return np.cumsum([0, *map(len, flats[:-1])])


def tokenizer_digest(tower: TextTower) -> str:
    """Digest what a tokenizer saves."""
    digest = blake2b(json.dumps(tower.tokenizer.describe(), sort_keys=True).encode(), digest_size=8)
    with TemporaryDirectory() as folder:
        tower.save_tokenizer(Path(folder))
        for file in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            digest.update(file.read_bytes())
    return digest.hexdigest()
