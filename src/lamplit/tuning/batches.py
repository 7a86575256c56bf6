"""Which pairs make which step: it depends on the seed and the step alone, so that a resumed run sees the same."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pyarrow as pa
import torch
from torch import Tensor

from lamplit.data.decoding.crops import Crop
from lamplit.tuning.permutation import BLOCK, blocks_of_window, stream, window_at, windows
from lamplit.tuning.settings import MAX_SEED, TuneSettings
from lamplit.tuning.split import Links


class Batches:
    """The steps of a run.

    Args:
        pairs: the training pairs.
        settings: batch size, epochs or steps, seed, augmentation.

    Attributes:
        in_windows: whether the pairs of a step come from few places of the store, which are other ones after some
            steps: for a store that does not fit into memory.
    """

    def __init__(self, pairs: Links, settings: TuneSettings) -> None:
        self.pairs, self.settings = pairs, settings
        chosen = settings.for_pairs(len(pairs))
        assert chosen.num_evals is not None
        assert chosen.batch_size is not None
        self.batch_size = min(chosen.batch_size, len(pairs))
        self.total_steps = chosen.count_steps(len(pairs))
        self.eval_every = max(1, math.ceil(self.total_steps / chosen.num_evals))
        self.in_windows = False

    def rows(self, step: int) -> Tensor:
        """Return the indices of the pairs of one step, (B,); it may begin in one pass over them and end in the next."""
        start, chosen = step * self.batch_size, windows if self.in_windows else stream
        return torch.from_numpy(chosen(start, start + self.batch_size, len(self.pairs), self.settings.seed))

    def coming(self, step: int, *, is_first: bool) -> Iterator[tuple[int, int]]:
        """Yield first and last row of each block of the next window, if a step is the first in its own.

        Args:
            step: the step that is taken next.
            is_first: whether nothing was read before it; then its own window comes, too.
        """
        if not self.in_windows:
            return
        size, place = len(self.pairs), step * self.batch_size
        first, last = window_at(place, size)
        is_new = is_first or place - self.batch_size < first
        is_needed = is_new and last < self.total_steps * self.batch_size
        for begin in [first] * is_first + [last] * is_needed:
            for block in blocks_of_window(begin, size, self.settings.seed).tolist():
                rows = self.pairs.image_index[block : block + BLOCK]
                yield int(rows[0]), int(rows[-1])

    def epochs(self, step: int) -> float:
        """Return how many passes over the pairs are done after `step` steps."""
        return step * self.batch_size / len(self.pairs)

    def seed(self, step: int, rank: int) -> int:
        """Return a seed for what one of several processes draws in one step."""
        return _mixed(_mixed(self.settings.seed, step), rank)

    def crops(self, first: int, paths: pa.Array) -> Iterator[list[Crop]]:
        """Yield the images of each step, from step `first` on; every random crop has a seed of its own.

        Args:
            first: the first step.
            paths: the image file of each row of the store.
        """
        for step in range(first, self.total_steps):
            seed = _mixed(self.settings.seed, step) << 24
            rows = self.pairs.image_index[self.rows(step)].tolist()
            random = self.settings.augment == "inception"
            files = paths.take(pa.array(rows)).to_pylist()
            yield [Crop(file, (seed + index) % MAX_SEED if random else None) for index, file in enumerate(files)]


def _mixed(seed: int, number: int) -> int:
    """Make a seed of its own for each step of each run; torch takes 64 bits."""
    return (seed * 1_000_003 + number) % MAX_SEED
