"""One pass over pairs: what is new goes through the tower, and all of it to a writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lamplit.data.decoding.images import Batch, read_batches
from lamplit.data.pairs import Pair
from lamplit.data.skipped import Skipped
from lamplit.errors import PairsError
from lamplit.garbage import frozen
from lamplit.locations.object_errors import will_pass
from lamplit.store.embed.backends import Backend, BackendName, choose_backend
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.embed_report import EmbedReport
from lamplit.towers.images.image_tower import ImageTower


class Runner:
    """Runs the tower on batches, by the backend that is chosen on the first of them."""

    def __init__(
        self, tower: ImageTower, name: BackendName, device: torch.device, num_images: int | None, batch_size: int
    ) -> None:
        self.backend = "none"
        self.tower, self.batch_size = tower, batch_size
        self._name, self._device, self._num_images = name, device, num_images
        self._run: Backend | None = None

    def __call__(self, images: Tensor, size: int) -> Tensor:
        """Embed (B, 3, height, width) uint8 images of a batch of `size`; return (B, D) float32 on the CPU."""
        if self._run is not None:
            return self._run(images)
        # A batch that is not full is the last one.
        left = size if size < self.batch_size else self._num_images
        self.backend, self._run, vectors = choose_backend(
            self.tower, self._name, images, num_images=left, device=self._device
        )
        return vectors


def embed_pairs(
    pairs: Iterable[Pair],
    runner: Runner,
    writer: StoreWriter,
    report: EmbedReport,
    *,
    workers: int,
    max_pixels: int,
    advance: Callable[[int], None],
) -> None:
    """Embed pairs into a store, each id once, and count what was done; `advance` is told how many more are done.

    Raises:
        PairsError: the rest of the pairs cannot be read.
        TowerError: the backend cannot run the tower.
    """
    batches = read_batches(
        _once(pairs, writer, report.skipped, runner.batch_size),
        runner.tower.preprocessing,
        batch_size=runner.batch_size,
        workers=workers,
        known=writer.before.content_keys,
        stored=writer.before.contents,
        max_pixels=max_pixels,
    )
    with frozen():
        for batch in _written(batches, runner, writer, report):
            advance(batch.size)
    report.backend = runner.backend


def _once(pairs: Iterable[Pair], writer: StoreWriter, skipped: list[Skipped], ahead: int) -> Iterator[Pair]:
    """Yield the pairs whose ids are new to the run, reading some ahead; list the others. A row is known by its id."""
    rest = iter(pairs)
    while block := list(islice(rest, ahead)):
        for pair, is_first in zip(block, writer.note([pair.id for pair in block]), strict=True):
            if is_first:
                yield pair
            else:
                skipped.append(Skipped(pair.id, pair.path, "another image of the source has this id"))


def _written(batches: Iterable[Batch], runner: Runner, writer: StoreWriter, report: EmbedReport) -> Iterator[Batch]:
    """Embed and write batches, and count what is in them; yield each when that is done."""
    for batch in batches:
        _require_reached(batch)
        report.skipped += batch.skipped
        if len(batch.images):
            _embed_images(batch, runner, writer, report)
        writer.reuse(batch.stored)
        writer.keep(batch.unchanged)
        writer.commit_if_due()
        report.moved += len(batch.stored)
        report.unchanged += len(batch.unchanged)
        yield batch


def _require_reached(batch: Batch) -> None:
    """Raise if an image is skipped because of what is not about it: the same would be said of all that follow."""
    for item in batch.skipped:
        if will_pass(item.reason):
            raise PairsError(f"{item.path} is left: {item.reason}; what was committed before is kept")


def _embed_images(batch: Batch, runner: Runner, writer: StoreWriter, report: EmbedReport) -> None:
    """Run the tower on the images of a batch, each content once; skip those of which it gives no number."""
    copies = writer.find_copies(batch.hashes)
    first, again = np.flatnonzero(~copies), np.flatnonzero(copies)
    without: list[Pair] = []
    if len(first):
        vectors = runner(batch.images if len(again) == 0 else batch.images[torch.from_numpy(first)], batch.size)
        is_usable = (torch.isfinite(vectors).all(1) & (vectors != 0).any(1)).numpy()
        usable = first[is_usable]
        without += [batch.pairs[place] for place in first[~is_usable]]
        hashes = [batch.hashes[place] for place in usable]
        writer.add(
            [batch.pairs[place] for place in usable], hashes, vectors[torch.from_numpy(is_usable)], runner.backend
        )
        report.embedded += len(usable)
    more = writer.add_copies([batch.pairs[place] for place in again], [batch.hashes[place] for place in again])
    report.copies += len(again) - len(more)
    for pair in without + more:
        report.skipped.append(Skipped(pair.id, pair.path, "the tower gives no number"))
