"""The vectors of a store as search reads them: in the order of the ids, and in large stores with their sign bits.

Up to `SMALL` images they are read into memory, and every search is the exact product. For larger stores, files are
derived when the store is written, and for other models at their first search: vectors in float16 and two bits of each
component, both memory-mapped, how many rows the recall needs, the order of the rows, and which of them are copies. A
model whose joint space is the tower's own has no vectors of its own: those of `store.row_vectors` serve it as they
serve `tune`. A very large store has them in parts (`store_parts.py`): each is searched, and the best of all are the
hits. When a store has changed, the files of the parts that have are made again. They may be deleted.

Shapes: N images, n of a part, E width of the model's joint space.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lamplit.locations.addresses import is_remote
from lamplit.progress import progress_bar
from lamplit.retrieval.bit_planes import BitPlanes, Flags
from lamplit.retrieval.copies import Copies
from lamplit.retrieval.nearest import Floats, Found, Vectors, rank
from lamplit.retrieval.recall import choose_kept
from lamplit.store.arrays.derived import (
    RECALL,
    Draft,
    centers,
    derive,
    is_exact,
    is_small,
)
from lamplit.store.arrays.joined_vectors import JoinedVectors, Rows, join
from lamplit.store.arrays.row_vectors import places, read_rows, read_vectors
from lamplit.store.lance_store import Store
from lamplit.store.store_parts import Part
from lamplit.unit_vectors import normalize

logger = logging.getLogger(__name__)
_BLOCK = 16384
Project = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class CollectionPart:
    """Vectors that are searched together, and for many of them their bits.

    Attributes:
        vectors: (n, E).
        rows: (n,) of the store, ascending; None if they are all of its rows.
        planes: None if every search is exact.
        kept: rows that the first and the second sieve let through.
        recall: @10, as measured on a sample of the part.
    """

    vectors: Vectors
    rows: Rows = None
    planes: BitPlanes | None = None
    kept: tuple[int, int] = (0, 0)
    recall: float = 1.0

    def rank(self, query: Floats, k: int, allowed: Flags | None) -> Found:
        """Find the k nearest rows that are `allowed`, (N,), to a (D,) unit vector."""
        own = self._own(allowed)
        return self._in_store(rank(self.vectors, query, k, None if own is None else np.flatnonzero(own)))

    def find(self, query: Floats, k: int, allowed: Flags | None) -> Found:
        """Do what `rank` does, among candidates by their bits, if there are bits."""
        if self.planes is None:
            return self.rank(query, k, allowed)
        return self._in_store(self.planes.find(self.vectors, query, k, self.kept, self._own(allowed)))

    def find_all(self, queries: Floats, k: int) -> list[Found]:
        """Do what `find` does for each of (Q, D) queries, which share passes over the rows."""
        if self.planes is None:
            return [self.rank(query, k, None) for query in queries]
        return [self._in_store(found) for found in self.planes.find_all(self.vectors, queries, k, self.kept)]

    def _own(self, allowed: Flags | None) -> Flags | None:
        return allowed if allowed is None or self.rows is None else allowed[self.rows]

    def _in_store(self, found: Found) -> Found:
        return found if self.rows is None else Found(self.rows[found.rows].astype(np.int64), found.scores)


@dataclass(frozen=True)
class Collection:
    """The vectors that are searched, in parts, and which images are copies of each other."""

    parts: Sequence[CollectionPart]
    copies: Copies

    @cached_property
    def vectors(self) -> Vectors | JoinedVectors:
        """(N, E) vectors of all parts, in the order of the ids."""
        return join([part.rows for part in self.parts], [part.vectors for part in self.parts])

    @property
    def is_exact(self) -> bool:
        """Whether no part has bits."""
        return all(part.planes is None for part in self.parts)

    @property
    def recall(self) -> float:
        """The recall@10 of the worst part, and so at least that of all together."""
        return min(part.recall for part in self.parts)

    def rank(self, query: Floats, k: int, allowed: Flags | None = None) -> Found:
        """Find the k rows with the highest cosine to a (D,) unit vector, among all or the `allowed` ones, (N,)."""
        return _best(k, [part.rank(query, k, allowed) for part in self.parts])

    def find(self, query: Floats, k: int, allowed: Flags | None = None) -> Found:
        """Find the k best candidates of a (D,) unit vector, among all rows or the `allowed` ones, (N,)."""
        return _best(k, [part.find(query, k, allowed) for part in self.parts])

    def find_all(self, queries: Floats, k: int) -> list[Found]:
        """Do what `find` does for each of (Q, D) queries, which share passes over the rows."""
        found = zip(*(part.find_all(queries, k) for part in self.parts), strict=True)
        return [_best(k, each) for each in found]


def open_collection(store: Store, project: Project, name: str, *, progress: bool = False) -> Collection:
    """Open the vectors of a store in the space of a model; see the module for the files.

    Args:
        store: an open store.
        project: maps (n, D) float32 unit vectors of the store to (n, E) ones.
        name: fingerprint of the joint space; if it is the tower's own, `project` changes nothing.
        progress: show bars on stderr while files are made.
    """
    if is_exact(store):
        return Collection([CollectionPart(_in_memory(store, project))], Copies.of(store.contents()))
    rows = read_rows(store)
    if name == store.tower.fingerprint:
        stored = read_vectors(store, progress=progress).halves
        arrays = stored.arrays if isinstance(stored, JoinedVectors) else [stored]
    else:
        arrays = [
            _project(store, part, own, project, name, progress=progress)
            for part, own in zip(store.parts, rows, strict=True)
        ]
    parts = [
        _sieved(store, part, vectors, name, progress=progress, rows=own)
        for part, vectors, own in zip(store.parts, arrays, rows, strict=True)
    ]
    return Collection(parts, _open_copies(store))


def prepare(store: Store, *, progress: bool = False) -> None:
    """Derive the files of a large store, for every model without an image head."""
    if is_exact(store):
        return
    center = centers(store)

    def project(zimg: NDArray[np.float32]) -> NDArray[np.float32]:
        return normalize(zimg - center[0]) if center else zimg

    open_collection(store, project, store.tower.space(center), progress=progress)


def _best(k: int, found: Sequence[Found]) -> Found:
    """Return the k best rows of several rankings."""
    if len(found) == 1:
        return found[0]
    joined = Found(np.concatenate([some.rows for some in found]), np.concatenate([some.scores for some in found]))
    return joined.by_score()[:k]


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


def _open_copies(store: Store) -> Copies:
    def make(draft: Draft) -> None:
        copies = Copies.of(store.contents())
        draft.create("copies", (2, len(copies)), np.int64)[:] = copies.rows, copies.contents

    return Copies(*derive(store, "copies", ("copies",), make)["copies"])


def _project(
    store: Store, part: Part, rows: Rows, project: Project, name: str, *, progress: bool
) -> NDArray[np.float16]:
    """Open the (n, E) vectors of a part in a space of their own."""

    def make(draft: Draft) -> None:
        width = project(np.ones((1, store.tower.width), np.float32)).shape[1]
        vectors = draft.create("vectors", (len(part), width), np.float16)
        place, start = places(store, part, rows), 0
        with progress_bar("vectors", len(part), shown=progress) as advance:
            for block in store.blocks(part):
                vectors[place[start : start + len(block)]] = project(block)
                start += len(block)
                advance(len(block), "")

    return derive(store, f"vectors-{name}", ("vectors",), make, part=part)["vectors"]


def _sieved(store: Store, part: Part, vectors: Vectors, name: str, *, rows: Rows, progress: bool) -> CollectionPart:
    """Open what is derived from the (n, E) vectors of a part; nothing is from few."""
    if is_small(len(part)):
        return CollectionPart(vectors, rows)

    def make(draft: Draft) -> None:
        logger.info("preparing %d images for search, once", len(part))
        planes = BitPlanes.of(vectors, draft.create, progress=progress)
        draft.create("scale", planes.scale.shape, np.float32)[:] = planes.scale
        kept, recall = choose_kept(vectors, planes, progress=progress)
        draft.create("kept", (2,), np.int64)[:] = kept
        draft.create(RECALL, (1,), np.float64)[:] = recall
        logger.info("recall@10 of %.3f with %d products of %d images", recall, kept[1], len(part))

    found = derive(store, name, ("signs", "seconds", "scale", "kept", RECALL), make, part=part)
    first, second = found["kept"].tolist()
    planes = BitPlanes(found["signs"], found["seconds"], found["scale"])
    return CollectionPart(vectors, rows, planes, (first, second), float(found[RECALL][0]))
