"""The vectors of a store as search reads them: in the order of the ids, and in large stores with their sign bits.

Up to `SMALL` images they are read into memory, and every search is the exact product. For larger stores, files are
derived when the store is written, and for other models at their first search: vectors in float16 and two bits of each
component, both memory-mapped, the order of the rows, which of them are copies, and how many rows the recall needs. A
model whose joint space is the tower's own has no vectors of its own: those of `store.row_vectors` serve it as they
serve `tune`. The files lie in the folder `_search` of the store, which Lance leaves alone, or in the user's cache if
the store cannot be written to. Their name says from which rows and for which model they were made: when a store has
changed, they are made again. They may be deleted.

Shapes: N images, E width of the model's joint space.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamplit.files import replacing
from lamplit.locations.addresses import is_remote
from lamplit.progress import progress_bar
from lamplit.retrieval.bit_planes import BitPlanes
from lamplit.retrieval.copies import Copies
from lamplit.retrieval.nearest import Vectors
from lamplit.retrieval.recall import choose_kept
from lamplit.store.derived import (
    DESCRIPTION,
    SMALL,
    centers,
    is_exact,
    open_array,
    remove_stale_files,
    search_folders,
    search_name,
)
from lamplit.store.lance_store import Store
from lamplit.store.row_vectors import read_vectors
from lamplit.unit_vectors import normalize

logger = logging.getLogger(__name__)
_BLOCK = 16384
_FILES, _OWN_FILES = ("bits", "scale", "copies"), ("vectors", "order")
Project = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Collection:
    """The vectors that are searched, which images are copies of each other, and for large stores the vectors' bits."""

    vectors: Vectors  # (N, E)
    copies: Copies
    planes: BitPlanes | None = None  # None: every search is exact
    kept: tuple[int, int] = (0, 0)  # rows that the first and the second sieve let through
    recall: float = 1.0  # @10, as measured on a sample of the store


def open_collection(
    store: Store, project: Project, name: str, small: int = SMALL, *, progress: bool = False
) -> Collection:
    """Open the vectors of a store in the space of a model; see the module for the files.

    Args:
        store: an open store.
        project: maps (n, D) float32 unit vectors of the store to (n, E) ones.
        name: fingerprint of the joint space; if it is the tower's own, `project` changes nothing.
        small: largest number of images up to which no file is written.
        progress: show bars on stderr while files are made.
    """
    if len(store) <= small:
        return Collection(_in_memory(store, project), Copies.of(store.contents()))
    own = None if name == store.tower.fingerprint else project
    for folder in search_folders(store):
        opened = _read(folder / search_name(store, name), store, own)
        if opened is not None:
            return opened
    for folder in search_folders(store):
        try:
            _write(folder, search_name(store, name), store, own, progress=progress)
        except OSError as error:  # no permission, or a full disk
            logger.warning("no files for search in %s: %s", folder, error)
            continue
        opened = _read(folder / search_name(store, name), store, own)
        if opened is not None:
            return opened
    vectors = _in_memory(store, project)
    planes = BitPlanes.of(vectors)
    return Collection(vectors, Copies.of(store.contents()), planes, *choose_kept(vectors, planes))


def prepare(store: Store, *, progress: bool = False) -> None:
    """Derive the files of a large store, for every model without an image head."""
    if is_exact(store):
        return
    center = centers(store)

    def project(zimg: NDArray[np.float32]) -> NDArray[np.float32]:
        return normalize(zimg - center[0]) if center else zimg

    open_collection(store, project, store.tower.space(center), progress=progress)


def _in_memory(store: Store, project: Project) -> Vectors:
    if is_remote(store.path):  # the vectors are kept here, in the order of the ids
        halves = read_vectors(store).halves
        starts = range(0, len(halves), _BLOCK)
        parts = [project(normalize(halves[start : start + _BLOCK])) for start in starts]
        return np.concatenate(parts) if parts else np.empty((0, store.tower.width), np.float32)
    parts = [project(block) for block in store.blocks()]
    if not parts:
        return np.empty((0, store.tower.width), np.float32)
    vectors: Vectors = np.concatenate(parts)[store.order]
    return vectors


def _read(folder: Path, store: Store, own: Project | None) -> Collection | None:
    """Open derived files; None if they are not whole.

    Args:
        folder: what they lie in.
        store: what they were made from.
        own: maps the store's vectors to those that are searched; None if they are the same.
    """
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        first, second = described["kept"]
        kept, recall = (int(first), int(second)), float(described["recall"])
        words, scale, copies = (open_array(folder / f"{name}.npy") for name in _FILES)
        if own is not None:
            vectors, order = (open_array(folder / f"{name}.npy") for name in _OWN_FILES)
            store.use_order(order)
        else:
            vectors = read_vectors(store).halves
        width = vectors.shape[1]
        if words.shape != (2, len(store), -(-width // 64)) or scale.shape != (width,):
            return None
        if len(vectors) != len(store) or len(copies) != 2:
            return None
        return Collection(vectors, Copies(*copies), BitPlanes(words, scale), kept, recall)
    except (OSError, ValueError, LookupError, TypeError, EOFError):
        return None


def _write(folder: Path, name: str, store: Store, own: Project | None, *, progress: bool) -> None:
    """Derive all files of a store, or none."""
    logger.info("preparing %d images for search, once", len(store))
    with replacing(folder / name) as partial:
        partial.mkdir()
        vectors = (
            read_vectors(store, progress=progress).halves
            if own is None
            else _write_vectors(partial, store, own, progress=progress)
        )
        copies = Copies.of(store.contents())
        np.save(partial / "copies.npy", np.stack([copies.rows, copies.contents]))
        words = _create(partial / "bits.npy", (2, len(store), -(-vectors.shape[1] // 64)), np.uint64)
        planes = BitPlanes.of(vectors, words, progress=progress)
        np.save(partial / "scale.npy", planes.scale)
        kept, recall = choose_kept(vectors, planes, progress=progress)
        words.flush()
        (partial / DESCRIPTION).write_text(json.dumps({"kept": kept, "recall": recall}) + "\n")
        logger.info("recall@10 of %.3f with %d products of %d images", recall, kept[1], len(store))
    remove_stale_files(folder, store.version_digest)


def _write_vectors(folder: Path, store: Store, project: Project, *, progress: bool) -> Vectors:
    """Write the vectors of a space of its own, and the order of the rows."""
    np.save(folder / "order.npy", store.order)
    row_at, vectors, start = store.row_at, None, 0
    with progress_bar("vectors", len(store), shown=progress) as advance:
        for block in store.blocks():
            halves = project(block).astype(np.float16)
            if vectors is None:
                vectors = _create(folder / "vectors.npy", (len(store), halves.shape[1]), np.float16)
            vectors[row_at[start : start + len(halves)]] = halves
            start += len(halves)
            advance(len(halves), "")
    assert vectors is not None, "only a store with rows has files"
    vectors.flush()
    return vectors


def _create(file: Path, shape: tuple[int, ...], kind: Any) -> np.memmap[Any, Any]:
    made: np.memmap[Any, Any] = np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)
    return made
