"""Embed pairs once with a locked image tower: from images to a store, resumable anywhere."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamplit.data.images import MAX_PIXELS, Batch, Skipped, read_batches
from lamplit.data.pairs import Pair, Pairs, read_pairs
from lamplit.errors import StoreError, TowerError, UsageError
from lamplit.progress import progress_bar
from lamplit.store.backends import Backend, BackendName, choose_backend
from lamplit.store.lance_store import Store
from lamplit.store.rows import Row, metadata_name
from lamplit.towers.devices import pick_device
from lamplit.towers.images.image_tower import ImageTower, open_image_tower

COMMIT_SECONDS = 15.0  # at most this much work is lost when the process is killed
COMMIT_ROWS = 4096


@dataclass
class EmbedReport:
    """What one run of `embed` did, in images."""

    store: str
    image_tower: str
    backend: str = "none"
    embedded: int = 0
    updated: int = 0  # embedded again, because the image changed, or given new texts or another path
    unchanged: int = 0
    moved: int = 0  # of another path with the same content: given the vector that is stored
    missing: int = 0  # rows that stay in the store though their files are gone from the source's folder
    pruned: int = 0  # such rows, deleted
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
    mean_center: bool = False,
    prune: bool = False,
    backend: BackendName = "auto",
    batch_size: int = 64,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str | None = None,
    progress: bool = False,
) -> EmbedReport:
    """Embed the images of `source` into the store `out`, each once.

    Run again, it embeds only what is new or changed; killed, it goes on from the last commit. An image that was
    moved, renamed or copied is known by its content, and gets the vector that is stored. Images that cannot be
    used are skipped and listed with their reasons in `OUT.skipped.jsonl`.

    Nothing is deleted but by `prune`, and then only a row of which three things are true: the source does not name
    it, its id and path are those of a file in the source's folder (of a table: the folder that the table is in), and
    there is no such file any more. So the rows of other sources in the same store stay, also those of archives and
    of the hub.

    Args:
        source: anything `read_pairs` reads, or the pairs themselves.
        out: the store to make or to add to.
        image_tower: what `open_image_tower` opens, or an open tower.
        image_tower_weights: weights file for the tower, or `"random"`.
        pool: `cls`, `mean`, `map` or `cls+mean`, for a tower to be opened; by default its library's own pooling.
        image_column: column with the images, where it is not found by its name.
        text_column: column (or columns, by commas) with the texts.
        mean_center: for a new store, subtract the mean of its vectors from every vector that is read from it.
        prune: delete the rows of images that are gone, at the end of a run that reached it.
        backend: what runs the tower; `auto` measures.
        batch_size: images that are decoded and embedded together; torch on a CPU takes 16 of them at a time.
        workers: processes that decode ahead of the tower; with any, a script needs
            `if __name__ == "__main__":`.
        max_pixels: images of more are skipped unseen.
        device: torch device; by default the accelerator, if there is one.
        progress: show a bar on stderr.

    Raises:
        PairsError: the source cannot be read.
        TowerError: the tower cannot be opened.
        StoreError: the store belongs to another tower, or no image could be embedded.
        UsageError: there is no such pooling, or the tower is open already.
    """
    started = time.monotonic()
    pairs = (
        source if isinstance(source, Pairs) else read_pairs(source, image_column=image_column, text_column=text_column)
    )
    if pool is not None and isinstance(image_tower, ImageTower):
        raise UsageError("an open tower pools as it was opened; give pool= to open_image_tower")
    tower = image_tower
    if not isinstance(tower, ImageTower):
        tower = open_image_tower(tower, weights=image_tower_weights, pool=pool)
    writer = _Writer(out, tower, mean_center)
    report = EmbedReport(str(out), tower.spec)
    batches = read_batches(
        pairs,
        tower.preprocessing,
        batch_size=batch_size,
        workers=workers,
        known=writer.hashes,
        stored=writer.places,
        max_pixels=max_pixels,
    )
    run = _Tower(tower, backend, pick_device(device), pairs.count, batch_size)
    with progress_bar("embed", pairs.count, shown=progress) as advance:
        for batch in batches:
            if len(batch.images):
                writer.add(batch, run(batch), run.backend)
            writer.reuse(batch.stored)
            writer.keep(batch.unchanged)
            writer.seen.update(item.id for item in batch.skipped)
            report.embedded += len(batch.images)
            report.moved += len(batch.stored)
            report.unchanged += len(batch.unchanged)
            report.skipped += batch.skipped
            advance(batch.size, f"{len(report.skipped)} skipped" if report.skipped else "")
    # Convolutions ran channels last; the tower is the caller's, and safetensors takes it only as it was.
    tower.backbone.to(memory_format=torch.contiguous_format)
    usable = report.embedded + report.moved + report.unchanged
    report.missing, report.pruned = writer.finish(pairs.root, prune=prune and usable > 0)
    report.backend = run.backend
    report.updated = writer.updated
    report.skipped_file = list_skipped(out, report.skipped)
    if writer.store is None or len(writer.store) == 0:
        found = "no images" if not report.skipped else f"none of {len(report.skipped)} images could be used"
        listed = f"; reasons in {report.skipped_file}" if report.skipped_file else ""
        raise StoreError(f"nothing to embed: {found} in {pairs.source}{listed}")
    report.seconds = time.monotonic() - started
    return report


@contextmanager
def open_source(
    source: str | Path | Store, tower: nn.Module | None, *, progress: bool = False
) -> Iterator[tuple[Store, list[Skipped]]]:
    """Open a store; or embed anything `read_pairs` reads, with a model's own image tower, into one that is not kept.

    Raises:
        TowerError: the source is not a store, and the model is open without its image tower.
    """
    if isinstance(source, Store) or Store.exists(source):
        yield source if isinstance(source, Store) else Store(source), []
        return
    if not isinstance(tower, ImageTower):
        raise TowerError(f"{source} is not a store, and the model is open without its image tower to embed it")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.lance"
        report = embed(source, out, image_tower=tower, mean_center=False, progress=progress)
        yield Store(out), report.skipped


class _Tower:
    """Runs the tower on batches, by the backend that is picked on the first of them."""

    def __init__(
        self, tower: ImageTower, name: BackendName, device: torch.device, num_images: int | None, batch_size: int
    ) -> None:
        self.tower, self.name, self.device = tower, name, device
        self.num_images, self.batch_size = num_images, batch_size
        self.backend = "none"
        self._run: Backend | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """(B, 3, height, width) uint8 images of the batch in, (B, D) float32 unit vectors out."""
        if self._run is None:
            # A batch that is not full is all there is.
            left = batch.size if batch.size < self.batch_size else self.num_images
            self.backend, self._run, vectors = choose_backend(
                self.tower, self.name, batch.images, num_images=left, device=self.device
            )
            return vectors
        return self._run(batch.images)


class _Writer:
    """Collects rows and commits them, each commit atomic: what is in the store is whole and there once."""

    def __init__(self, out: str | Path, tower: ImageTower, center: bool) -> None:
        self.out = out
        self.center = center
        self.identity = tower.identity()
        self.backend = "none"
        self.updated = 0
        self.store: Store | None = None
        self.hashes: dict[str, str] = {}  # by id, as the store was when the run began
        self.places: dict[str, int] = {}  # by hash, in `_before`
        self.seen: set[str] = set()  # ids that the source has
        self._rows: list[Row] = []
        self._last_commit = time.monotonic()
        self._stored_texts: dict[str, tuple[list[str], dict[str, Any]]] = {}
        self._paths: dict[str, str] = {}
        if Store.exists(out):
            self.store = Store(out)
            self.store.require_tower(self.identity)
            if center and not self.store.centered:
                raise StoreError(f"{out} was made without --mean-center; give another --out to have a centred store")
            # Stays at this version: two files that changed places give each other their vectors.
            self._before = Store(out)
            self.hashes = self._before.hashes()
            self.places = {content: place for place, content in enumerate(self._before.column("hash"))}
            self._paths = self._before.paths()
            self._stored_texts = self.store.texts_and_metadata()

    def add(self, batch: Batch, vectors: Tensor, backend: str) -> None:
        """Take embedded images, and which backend embedded them."""
        self.backend = backend
        for pair, content_hash, vector in zip(batch.pairs, batch.hashes, vectors, strict=True):
            self.seen.add(pair.id)
            self._rows.append(_row(pair, content_hash, vector))
        self._commit_if_due()

    def reuse(self, stored: list[tuple[Pair, str]]) -> None:
        """Take images whose content the store has under other ids, with the vectors that are there."""
        if not stored:
            return
        vectors = self._before.vectors_at([self.places[content_hash] for _, content_hash in stored])
        for (pair, content_hash), vector in zip(stored, vectors, strict=True):
            self.seen.add(pair.id)
            self._rows.append(_row(pair, content_hash, vector))
        self._commit_if_due()

    def keep(self, pairs: list[Pair]) -> None:
        """Take images whose vectors are in the store; write those whose texts, metadata or path are new."""
        for pair in pairs:
            self.seen.add(pair.id)
            texts, metadata = self._stored_texts[pair.id]
            row = _row(pair, self.hashes[pair.id], None)
            if (row.path, row.texts, row.metadata) == (self._paths[pair.id], texts, metadata):
                continue  # most often; to find what the columns keep of a row takes far longer
            same = (row.path, row.texts) == (self._paths[pair.id], texts)
            if not (same and self._before.as_stored(row.metadata) == metadata):
                self._rows.append(row)
        self._commit_if_due()

    def finish(self, root: Path | None, *, prune: bool) -> tuple[int, int]:
        """Commit what is left; count the rows that are missing below `root` and stay, and those that went."""
        self._commit()
        if self.store is None:
            return 0, 0
        missing = self._missing(root)
        if prune:  # after the commit: what was moved has its new row before it loses the old one
            self.store.delete(missing)
        self.store.finish()
        return (0, len(missing)) if prune else (len(missing), 0)

    def _missing(self, root: Path | None) -> list[str]:
        if root is None:
            return []
        folder = os.path.abspath(root)

        def is_ours(name: str, path: str) -> bool:
            below = os.path.relpath(path, folder).replace(os.sep, "/")
            return not below.startswith("../") and re.sub(r"(#\d+)*$", "", name) in (below, path)

        gone = ((name, path) for name, path in self._paths.items() if name not in self.seen and os.path.isabs(path))
        return [name for name, path in gone if is_ours(name, path) and not os.path.lexists(path)]

    def _commit_if_due(self) -> None:
        if len(self._rows) >= COMMIT_ROWS or time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        rows, self._rows = self._rows, []
        self._last_commit = time.monotonic()
        if not rows:
            return
        if self.store is None:
            names = dict.fromkeys(name for row in rows for name in row.metadata)
            self.store = Store.create(
                self.out,
                self.identity,
                rows,
                backend=self.backend,
                centered=self.center,
                metadata_columns=list(names),
            )
            return
        changed = [row for row in rows if row.id in self.hashes]
        self.updated += len(changed)
        self.store.append([row for row in rows if row.id not in self.hashes])
        self.store.replace(changed)


def _row(pair: Pair, content_hash: str, vector: Tensor | None) -> Row:
    path = pair.id if isinstance(pair.image, bytes) else str(pair.image)
    metadata = {metadata_name(name): value for name, value in pair.metadata.items()}
    return Row(pair.id, path, content_hash, list(pair.texts), vector, metadata)


def list_skipped(out: str | Path, skipped: list[Skipped]) -> str | None:
    """Write the list of a run's skipped images beside the store, or remove the last run's; return its path."""
    file = Path(f"{str(out).removesuffix('.lance')}.skipped.jsonl")
    if not skipped:
        file.unlink(missing_ok=True)
        return None
    lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in skipped)
    file.write_text(lines, encoding="utf-8")
    return str(file)
