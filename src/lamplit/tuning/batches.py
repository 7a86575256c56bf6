"""Which pairs make which step: it depends on the seed and the step alone, so that a resumed run sees the same."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lamplit.data.crops import Crop
from lamplit.tuning.settings import MAX_SEED, TuneSettings
from lamplit.tuning.split import Links


class Batches:
    """The steps of a run.

    Args:
        pairs: the training pairs.
        paths: the image file of each row of the store.
        settings: batch size, epochs or steps, seed, augmentation.
    """

    def __init__(self, pairs: Links, paths: list[str], settings: TuneSettings) -> None:
        self.pairs, self.paths, self.settings = pairs, paths, settings
        self.batch_size = min(settings.batch_size, len(pairs))
        self.steps_per_epoch = len(pairs) // self.batch_size
        self.total_steps = settings.steps or max(1, round(settings.epochs * self.steps_per_epoch))
        self.eval_every = max(1, math.ceil(self.total_steps / settings.num_evals))
        self._orders: dict[int, Tensor] = {}  # pairs of an epoch, shuffled

    def rows(self, step: int) -> Tensor:
        """Return the indices of the pairs of one step, (B,)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:  # images are read some steps ahead, so two epochs may be under way
            generator = torch.Generator().manual_seed(_mixed(self.settings.seed, epoch))
            order = torch.randperm(len(self.pairs), generator=generator)
            self._orders = {e: kept for e, kept in self._orders.items() if e == epoch - 1} | {epoch: order}
        return self._orders[epoch][index * self.batch_size : (index + 1) * self.batch_size]

    def crops(self, first: int) -> Iterator[list[Crop]]:
        """Yield the images of each step, from step `first` on; every random crop has a seed of its own."""
        for step in range(first, self.total_steps):
            seed = _mixed(self.settings.seed, step) << 24
            rows = self.pairs.image_index[self.rows(step)].tolist()
            random = self.settings.augment == "inception"
            yield [
                Crop(self.paths[row], (seed + index) % MAX_SEED if random else None) for index, row in enumerate(rows)
            ]


def _mixed(seed: int, number: int) -> int:
    """Make a seed of its own for each step or epoch of each run; torch takes 64 bits."""
    return (seed * 1_000_003 + number) % MAX_SEED
