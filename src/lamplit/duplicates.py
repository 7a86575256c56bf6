"""Pictures that a store has more than once: the same bytes, or vectors that lie so near that the pictures do too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamplit.errors import UsageError
from lamplit.progress import progress_bar
from lamplit.store import Store

THRESHOLD = 0.95
_CHUNK = 1024  # 4 MB of cosines at a time


@dataclass(frozen=True)
class Duplicate:
    """One picture of a group."""

    id: str
    path: str
    cosine: float  # to the nearest other one
    copy_of: str | None  # id of the first picture of the group with the very same content


@dataclass(frozen=True)
class DuplicateGroup:
    """Pictures that hang together by near pairs, in the order of their ids; the ends of a long chain may differ."""

    pictures: list[Duplicate]


def find_duplicates(
    store: Store, *, threshold: float = THRESHOLD, chunk_size: int = _CHUNK, progress: bool = False
) -> list[DuplicateGroup]:
    """Group the pictures of a store by content hash and by the cosine of their vectors, biggest group first.

    Two pictures are in one group where a chain of pairs with a cosine of at least `threshold` leads from one to the
    other. The vectors are those of the tower, also where the store is centred. Time grows with the square of the
    number of pictures (100,000 of width 512: minutes); memory holds their vectors and chunks of cosines.

    Args:
        store: any store; for one of imported vectors, the same content is the same vector.
        threshold: lowest cosine of a pair. How alike pictures of one cosine look depends on the tower.
        chunk_size: cosines in one piece, squared; changes nothing but speed and memory.
        progress: show a bar on stderr.

    Raises:
        UsageError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"the threshold is {threshold}; a cosine above 0 and at most 1 is expected, such as 0.95")
    vectors = store.vectors()
    first = _first_of_same(store.column("hash"))
    nearest = torch.zeros(len(vectors))
    for copies in (first != np.arange(len(first))).nonzero():
        nearest[copies] = nearest[first[copies]] = 1.0
    labels = first.copy()  # of each picture, the place of the first one of its group
    starts = range(0, len(vectors), chunk_size)
    with progress_bar("duplicates", len(vectors), shown=progress) as advance:
        for start in starts:
            rows = vectors[start : start + chunk_size]
            for other in starts[start // chunk_size :]:
                left, right, cosines = _near_pairs(rows, vectors[other : other + chunk_size], threshold, start == other)
                if len(cosines):
                    left, right = left + start, right + other
                    for side in (left, right):
                        nearest.scatter_reduce_(0, side, cosines, "amax")
                    labels = join(labels, left.numpy(), right.numpy())
            advance(len(rows), "")
    return _groups(store, labels, first, nearest)


def join(labels: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join the groups of `left[i]` and `right[i]` for all i.

    Args:
        labels: (N,) for each picture, the lowest place in its group.
        left: (E,) places.
        right: (E,) places.

    Returns:
        (N,) labels after it.
    """
    labels = labels.copy()
    while True:
        pairs = np.stack([labels[left], labels[right]])
        low, high = pairs.min(0), pairs.max(0)
        if (low == high).all():
            return labels
        np.minimum.at(labels, high, low)  # a group with a lower neighbour joins the lowest
        while not np.array_equal(labels, followed := labels[labels]):
            labels = followed


def _first_of_same(hashes: list[str]) -> NDArray[np.int64]:
    """(N,) for each picture, the place of the first with its content."""
    places: dict[str, int] = {}
    return np.array([places.setdefault(content, place) for place, content in enumerate(hashes)], dtype=np.int64)


def _near_pairs(rows: Tensor, others: Tensor, threshold: float, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Places in both chunks and cosines of the pairs at `threshold` or nearer; each once where both are the same."""
    cosines = rows @ others.T
    if same:
        cosines = cosines.triu(1)  # zeros are below every threshold
    left, right = (cosines >= threshold).nonzero(as_tuple=True)
    return left, right, cosines[left, right]


def _groups(store: Store, labels: NDArray[np.int64], first: NDArray[np.int64], nearest: Tensor) -> list[DuplicateGroup]:
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    groups = [order[start : start + size] for start, size in zip(starts, sizes, strict=True) if size > 1]
    groups.sort(key=lambda places: -len(places))  # stable: equal ones stay in the order of their first ids
    ids, paths = store.column("id"), store.column("path")
    return [
        DuplicateGroup(
            [
                Duplicate(
                    ids[place],
                    paths[place],
                    min(float(nearest[place]), 1.0),
                    ids[first[place]] if first[place] != place else None,
                )
                for place in places
            ]
        )
        for places in groups
    ]
