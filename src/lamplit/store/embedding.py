"""Embed pairs once with a locked image tower: from images to a store, resumable anywhere."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lamplit.data.images import MAX_PIXELS, Batch, read_batches
from lamplit.data.pairs import Pair, Pairs, read_pairs
from lamplit.data.skipped import Skipped
from lamplit.errors import StoreError, TowerError, UsageError, kind_of
from lamplit.files import write_text
from lamplit.progress import progress_bar
from lamplit.store.backends import Backend, BackendName, choose_backend
from lamplit.store.lance_store import Store
from lamplit.store.store_writer import StoreWriter
from lamplit.towers.borrowing import borrowed
from lamplit.towers.devices import pick_device
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.two_towers import TwoTowers


@dataclass
class EmbedReport:
    """What one run of `embed` did; all counts are of images.

    Attributes:
        store: path of the store.
        image_tower: spec of the tower.
        backend: what ran the tower: torch, compile or onnx; none if no image had to be embedded.
        embedded: went through the tower.
        updated: rows that were replaced, because the image, its texts, its metadata or its path changed.
        unchanged: were stored with the same content.
        moved: same content under a new path; the stored vector is reused.
        copies: same content as an earlier image of this run, which went through the tower for both.
        missing: rows that stay in the store although their files are gone from the source's folder.
        pruned: such rows, deleted.
        without_text: are in the store without any text.
        not_kept: values of metadata that could not be kept, by column.
        notes: what to know about the source and the store, in plain sentences.
        skipped: could not be used, with the reasons; parts of the source that could not be read, too.
        skipped_file: where these are listed, one JSON object a line; None if there are none.
        seconds: wall-clock time of the run.
    """

    store: str
    image_tower: str
    backend: str = "none"
    embedded: int = 0
    updated: int = 0
    unchanged: int = 0
    moved: int = 0
    copies: int = 0
    missing: int = 0
    pruned: int = 0
    without_text: int = 0
    not_kept: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_file: str | None = None
    seconds: float = 0.0


def embed(
    source: str | Path | Pairs,
    out: str | Path,
    *,
    image_tower: str | nn.Module | ImageTower,
    image_tower_weights: str | Path | None = None,
    pool: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    split: str | None = None,
    mean_center: bool = False,
    prune: bool = False,
    backend: BackendName = "auto",
    batch_size: int = 64,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> EmbedReport:
    """Embed the images of `source` into the store `out`, each once.

    Run again, it embeds only what is new or changed; killed, it goes on from the last commit. An image that was
    moved, renamed or copied is known by its content, and gets the vector that is stored. Images that cannot be
    used are skipped and listed with their reasons in `OUT.skipped.jsonl`.

    Only `prune` deletes rows. It deletes a row if three things are true: the source does not name it, its id and path
    are those of a file in the source's folder (for a table: the folder that the table is in), and that file is gone.
    So rows of other sources, of archives and of the hub stay.

    On the command line: `lamplit embed`.

    Args:
        source: anything `read_pairs` reads, or the pairs themselves.
        out: the store to make or to add to.
        image_tower: what `open_image_tower` opens, or an open tower. A tower of yours is moved to `device` and locked
            while this runs, and is given back as it was.
        image_tower_weights: weights file for the tower, or `"random"`.
        pool: `cls`, `mean`, `map` or `cls+mean`, for a tower to be opened; by default its library's own pooling.
        image_column: column with the images; by default found by its name.
        text_column: column (or columns, with commas between) with the texts; by default found by its name.
        split: which split of the source to read, or `all`; by default `train`, if it has several.
        mean_center: for a new store, subtract the mean of its vectors from every vector that is read from it.
        prune: delete the rows of images that are gone, at the end of a run that read the source to its end.
        backend: what runs the tower: `torch`, `compile`, `onnx` (on the CPU), or `auto`, which measures. On Linux,
            torch on the CPU makes this process keep freed memory for itself (malloc's trim threshold).
        batch_size: images that are decoded and embedded together; torch on a CPU takes 16 of them at a time.
        workers: processes that decode ahead of the tower; with any, a script needs `if __name__ == "__main__":`.
        max_pixels: larger images are skipped without decoding them.
        device: torch device; by default the accelerator, if there is one.
        progress: show a bar on stderr.

    Returns:
        Counts of what was embedded, reused and skipped.

    Raises:
        PairsError: the source cannot be read.
        TowerError: the tower cannot be opened, or the backend cannot run it.
        StoreError: the store belongs to another tower, or no image could be embedded.
        UsageError: there is no such pooling, the tower is open already, or the backend does not run on the device.

    Example:
        >>> report = lamplit.embed("photos/", "photos.lance", image_tower="timm:vit_base_patch16_224")
        >>> report.embedded, len(report.skipped)
        (1200, 3)
    """
    started = time.monotonic()
    if backend not in get_args(BackendName):
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(get_args(BackendName))}")
    if isinstance(image_tower, TwoTowers):
        raise UsageError(
            f"image_tower is {kind_of(image_tower)}, a whole model; save it, and give image_tower='model:FOLDER'"
        )
    pairs = source
    if not isinstance(pairs, Pairs):
        pairs = read_pairs(pairs, image_column=image_column, text_column=text_column, split=split)
    chosen_device = _device_for(backend, device)
    with borrowed(image_tower) if isinstance(image_tower, nn.Module) else nullcontext():
        tower = _as_image_tower(image_tower, image_tower_weights, pool)
        writer = StoreWriter(out, tower.identity(), centered=mean_center)
        report = EmbedReport(str(out), tower.spec)
        batches = read_batches(
            _once(pairs, writer, report.skipped, batch_size),
            tower.preprocessing,
            batch_size=batch_size,
            workers=workers,
            known=writer.before.content_keys,
            stored=writer.before.contents,
            max_pixels=max_pixels,
        )
        runner = _Runner(tower, backend, chosen_device, pairs.count, batch_size)
        with progress_bar("embed", pairs.count, shown=progress) as advance:
            for batch in _written(batches, runner, writer, report):
                advance(batch.size, f"{len(report.skipped)} skipped" if report.skipped else "")
    usable = report.embedded + report.moved + report.copies + report.unchanged
    report.skipped += pairs.problems
    # Where a part of the source could not be read, what it names is not known to be gone.
    report.missing, report.pruned = writer.finish(pairs.root, prune=prune and usable > 0 and not pairs.problems)
    report.backend, report.updated, report.without_text = runner.backend, writer.updated, writer.without_text
    report.not_kept, report.notes = dict(writer.not_kept), [*pairs.notes, *writer.notes]
    if 0 < usable == report.without_text and pairs.text_columns:
        report.notes.append(f"no image has a text: every cell of {' and '.join(pairs.text_columns)} is empty")
    report.skipped_file = list_skipped(out, report.skipped)
    if writer.store is None or len(writer.store) == 0:
        found = "no images" if not report.skipped else f"none of {len(report.skipped)} images could be used"
        listed = f"; reasons in {report.skipped_file}" if report.skipped_file else ""
        raise StoreError(f"nothing to embed: {found} in {pairs.source}{listed}")
    report.seconds = time.monotonic() - started
    return report


class OpenSource(NamedTuple):
    """A store, and what to know about the pairs that it was made from for the occasion, if it was."""

    store: Store
    skipped: list[Skipped]
    notes: list[str]


@contextmanager
def open_source(
    source: str | Path | Store,
    tower: nn.Module | None,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Iterator[OpenSource]:
    """Open a store; or embed anything `read_pairs` reads, with a model's own image tower, into a temporary one.

    Raises:
        TowerError: the source is not a store, and the model is open without its image tower.
    """
    if isinstance(source, Store) or Store.exists(source):
        yield OpenSource(source if isinstance(source, Store) else Store(source), [], [])
        return
    if not isinstance(tower, ImageTower):
        raise TowerError(f"{source} is not a store, and the model is open without its image tower to embed it")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.lance"
        report = embed(source, out, image_tower=tower, device=device, progress=progress)
        yield OpenSource(Store(out), report.skipped, report.notes)


def list_skipped(out: str | Path, skipped: list[Skipped]) -> str | None:
    """Write the list of a run's skipped images beside the store, or remove the last run's; return its path."""
    file = Path(f"{str(out).removesuffix('.lance')}.skipped.jsonl")
    if not skipped:
        file.unlink(missing_ok=True)
        return None
    write_text(file, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in skipped))
    return str(file)


def _device_for(backend: BackendName, device: str | torch.device | None) -> torch.device:
    chosen = pick_device("cpu" if backend == "onnx" and device is None else device)
    if backend == "onnx" and chosen.type != "cpu":
        raise UsageError(
            f"backend onnx runs on the CPU, not on {chosen}; leave the device out, or choose backend torch"
        )
    return chosen


def _as_image_tower(tower: str | nn.Module, weights: str | Path | None, pool: str | None) -> ImageTower:
    if not isinstance(tower, ImageTower):
        return open_image_tower(tower, weights=weights, pool=pool)
    if weights is not None:
        raise UsageError("an open tower has its weights; give weights= to open_image_tower")
    if pool is not None:
        raise UsageError("an open tower pools as it was opened; give pool= to open_image_tower")
    return tower


class _Runner:
    """Runs the tower on batches, by the backend that is chosen on the first of them."""

    def __init__(
        self, tower: ImageTower, name: BackendName, device: torch.device, num_images: int | None, batch_size: int
    ) -> None:
        self.backend = "none"
        self._tower, self._name, self._device = tower, name, device
        self._num_images, self._batch_size = num_images, batch_size
        self._run: Backend | None = None

    def __call__(self, images: Tensor, size: int) -> Tensor:
        """Embed (B, 3, height, width) uint8 images of a batch of `size`; return (B, D) float32 on the CPU."""
        if self._run is not None:
            return self._run(images)
        # A batch that is not full is the last one.
        left = size if size < self._batch_size else self._num_images
        self.backend, self._run, vectors = choose_backend(
            self._tower, self._name, images, num_images=left, device=self._device
        )
        return vectors


def _once(pairs: Iterable[Pair], writer: StoreWriter, skipped: list[Skipped], ahead: int) -> Iterator[Pair]:
    """Yield the pairs whose ids are new to the run, reading some ahead; list the others. A row is known by its id."""
    rest = iter(pairs)
    while block := list(islice(rest, ahead)):
        for pair, is_first in zip(block, writer.note([pair.id for pair in block]), strict=True):
            if is_first:
                yield pair
            else:
                skipped.append(Skipped(pair.id, _path(pair), "another image of the source has this id"))


def _path(pair: Pair) -> str:
    return pair.id if isinstance(pair.image, bytes) else str(pair.image)


def _written(batches: Iterable[Batch], runner: _Runner, writer: StoreWriter, report: EmbedReport) -> Iterator[Batch]:
    """Embed and write batches, and count what is in them; yield each when that is done."""
    for batch in batches:
        report.skipped += batch.skipped
        if len(batch.images):
            _embed_images(batch, runner, writer, report)
        writer.reuse(batch.stored)
        writer.keep(batch.unchanged)
        writer.commit_if_due()
        report.moved += len(batch.stored)
        report.unchanged += len(batch.unchanged)
        yield batch


def _embed_images(batch: Batch, runner: _Runner, writer: StoreWriter, report: EmbedReport) -> None:
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
        report.skipped.append(Skipped(pair.id, _path(pair), "the tower gives no number"))
