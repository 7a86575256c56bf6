"""Images that a store has more than once: the same bytes, or vectors that are nearly the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lamplit.errors import UsageError
from lamplit.progress import progress_bar
from lamplit.store.lance_store import Store, as_store

THRESHOLD = 0.95
_CHUNK = 1024  # 4 MB of cosines at a time


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
    other. The vectors are those of the tower, also if the store is centred. Time grows with the square of the
    number of images (100,000 of width 512: minutes); memory holds their vectors and chunks of cosines.

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
    limit = np.float32(threshold)  # what the cosines are compared with
    vectors = store.vectors()
    first = _first_of_same(store.column("hash"))
    nearest = np.zeros(len(vectors), np.float32)
    copies = (first != np.arange(len(first))).nonzero()[0]
    nearest[copies] = nearest[first[copies]] = 1.0
    labels = first.copy()  # for each image, the row of the first image of its group
    with progress_bar("duplicates", len(vectors), shown=progress) as advance:
        for rows, others, cosines in _tiles(vectors, chunk_size):
            if not cosines.max() < limit:  # most tiles end here; a NaN hides no pair
                np.fmax(nearest[rows], np.fmax.reduce(cosines, 1), out=nearest[rows])
                np.fmax(nearest[others], np.fmax.reduce(cosines, 0), out=nearest[others])
                # Pairs in one group already join nothing: if many images are alike, that is most of them.
                apart = (cosines >= limit) & (labels[rows, None] != labels[others])
                found = np.flatnonzero(apart)  # 20 times as fast as nonzero in two dimensions
                left, right = np.unravel_index(found, apart.shape)
                if len(left):
                    labels = join(labels, left + rows.start, right + others.start)
            if others.stop == len(vectors):
                advance(len(cosines), "")
    return _groups(store, labels, first, nearest)


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


def _first_of_same(hashes: list[str]) -> NDArray[np.int64]:
    """(N,) for each image, the row of the first image with its content."""
    rows: dict[str, int] = {}
    return np.array([rows.setdefault(content, row) for row, content in enumerate(hashes)], dtype=np.int64)


def _tiles(vectors: Tensor, chunk_size: int) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Yield the cosines of all pairs, each once: rows, other rows, and their cosines. The next tile overwrites it."""
    memory = torch.empty(chunk_size * chunk_size)
    chunks = [slice(start, min(start + chunk_size, len(vectors))) for start in range(0, len(vectors), chunk_size)]
    for number, rows in enumerate(chunks):
        for others in chunks[number:]:
            left, right = vectors[rows], vectors[others]
            tile = memory[: len(left) * len(right)].view(len(left), len(right))
            torch.mm(left, right.T, out=tile)
            yield rows, others, (tile.triu_(1) if rows == others else tile).numpy()  # zeros are below every limit


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
