"""Images that a store has more than once: the same bytes, or vectors that are nearly the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from lamplit.data.sorted_keys import SortedKeys, keys_of_rows
from lamplit.errors import UsageError
from lamplit.progress import progress_bar
from lamplit.store.lance_store import Store, as_store
from lamplit.store.near_pairs import near_pairs

THRESHOLD = 0.95
_CHUNK = 1024  # 4 MB of cosines at a time
_JOINED = 2_000_000  # near pairs


@dataclass(frozen=True)
class Duplicate:
    """One image of a group.

    Attributes:
        id: of the image in the store.
        path: of its file.
        cosine: to the nearest other image of the store.
        copy_of: id of the first image of the group with the very same content; None if this is the first.
    """

    id: str
    path: str
    cosine: float
    copy_of: str | None


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are connected by near pairs, in the order of their ids; the ends of a long chain may differ.

    Attributes:
        images: at least two, each with its `id`, its `path`, its `cosine` to the nearest other image of the store, and
            `copy_of`: the id of the first image of the group with the very same content, or None.
    """

    images: list[Duplicate]


def find_duplicates(
    store: str | Path | Store, *, threshold: float = THRESHOLD, chunk_size: int = _CHUNK, progress: bool = False
) -> list[DuplicateGroup]:
    """Group the images of a store by content hash and by the cosine of their vectors, biggest group first.

    Two images are in one group if a chain of pairs with a cosine of at least `threshold` leads from one to the
    other. The vectors are those of the tower, also if the store is centred. Nothing is estimated; most pairs are ruled
    out by a few numbers of each vector. Time grows with the square of the number of different vectors; memory holds
    these in float16, and chunks of cosines.

    On the command line: `lamplit duplicates`.

    Args:
        store: a store or its path; for one of imported vectors, the same content is the same vector.
        threshold: lowest cosine of a pair. How alike images of one cosine look depends on the tower.
        chunk_size: cosines in one piece, squared; changes nothing but speed and memory.
        progress: show a bar on stderr.

    Returns:
        Groups of at least two images.

    Raises:
        StoreError: there is no store at the path, or it is damaged.
        UsageError: the threshold is not above 0 and at most 1.

    Example:
        >>> for group in lamplit.find_duplicates("photos.lance"):
        ...     print([image.path for image in group.images])
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"the threshold is {threshold}; expected a cosine above 0 and at most 1, such as 0.95")
    store = as_store(store)
    rows = np.arange(len(store))
    first = _first_of_same(store.contents())
    alike = _first_of_same_vector(store)
    nearest = np.zeros(len(store), np.float32)
    for same in (first, alike):
        copies = np.flatnonzero((same != rows) & (same >= 0))
        nearest[copies] = nearest[same[copies]] = 1.0
    labels = join(
        join(rows, rows, first), rows, np.where(alike < 0, rows, alike)
    )  # for each image, the row of the first image of its group
    compared, halves = _to_compare(store, alike)
    with progress_bar("duplicates", len(compared), shown=progress) as advance:
        edges = _Edges(labels)
        for done, (left, right, cosines) in near_pairs(halves, float(np.float32(threshold)), chunk_size):
            left, right = compared[left], compared[right]
            np.maximum.at(nearest, left, cosines)
            np.maximum.at(nearest, right, cosines)
            edges.add(left, right)
            advance(done, "")
    return _groups(store, edges.joined(), first, nearest)


class _Edges:
    """Pairs of rows that are joined some millions at once: each time takes as long as there are rows."""

    def __init__(self, labels: NDArray[np.int64]) -> None:
        self._labels = labels
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def add(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        # Pairs in one group already join nothing: if many images are alike, that is most of them.
        apart = self._labels[left] != self._labels[right]
        self._waiting.append((left[apart], right[apart]))
        if sum(len(rows) for rows, _ in self._waiting) > _JOINED:
            self.joined()

    def joined(self) -> NDArray[np.int64]:
        """Return (N,) labels: for each image, the lowest row of its group."""
        if self._waiting:
            left, right = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._labels = join(self._labels, left, right)
            self._waiting = []
        return self._labels


def join(labels: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join the groups of rows `left[i]` and `right[i]` for all i.

    Takes and returns (N,) labels: for each image, the lowest row of its group.
    """
    size = len(labels)
    edges = sparse.coo_array((np.ones(len(left), np.bool_), (labels[left], labels[right])), (size, size))
    num_groups, group = connected_components(edges, directed=False)
    lowest = np.full(num_groups, size, np.int64)
    np.minimum.at(lowest, group, np.arange(size))
    joined: NDArray[np.int64] = lowest[group[labels]]
    return joined


def _first_of_same(contents: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) for each image, the row of the first image with its content."""
    _, firsts, numbers = np.unique(contents, return_index=True, return_inverse=True)
    return firsts[numbers]


def _first_of_same_vector(store: Store) -> NDArray[np.int64]:
    """(N,) for each image, the row of the first one with its vector, to the bit; -1 if that is no vector to compare."""
    row_at = np.argsort(store.order)
    keys = np.empty((len(store), 2), np.uint64)
    is_vector = np.empty(len(store), bool)
    start = 0
    for halves in store.half_blocks():
        rows = row_at[start : start + len(halves)]
        keys[rows] = keys_of_rows(np.ascontiguousarray(halves))
        is_vector[rows] = np.isfinite(halves).all(1) & (halves != 0).any(1)
        start += len(halves)
    return np.where(is_vector, SortedKeys.of(keys).find(keys), -1)


def _to_compare(store: Store, alike: NDArray[np.int64]) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Return the first row of each vector, ascending, and the (M, D) float16 vectors of these."""
    compared = np.flatnonzero(alike == np.arange(len(alike)))
    vectors = np.empty((len(compared), store.tower.width), np.float16)
    place = np.full(len(alike), -1)
    place[compared] = np.arange(len(compared))
    places = place[np.argsort(store.order)]  # by the position in the table
    start = 0
    for halves in store.half_blocks():
        into = places[start : start + len(halves)]
        vectors[into[into >= 0]] = halves[into >= 0]
        start += len(halves)
    return compared, torch.from_numpy(vectors)


def _groups(
    store: Store, labels: NDArray[np.int64], first: NDArray[np.int64], nearest: NDArray[np.float32]
) -> list[DuplicateGroup]:
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    groups = [order[start : start + size] for start, size in zip(starts, sizes, strict=True) if size > 1]
    groups.sort(key=lambda rows: -len(rows))  # stable: groups of one size stay in the order of their first ids
    ids, paths = store.column("id"), store.column("path")

    def describe(row: int) -> Duplicate:
        copy_of = ids[first[row]] if first[row] != row else None
        return Duplicate(ids[row], paths[row], min(float(nearest[row]), 1.0), copy_of)

    return [DuplicateGroup([describe(row) for row in rows]) for rows in groups]
