"""Images that a store has more than once: the same bytes, or vectors that lie so near that the images do too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamplit.errors import UsageError
from lamplit.progress import progress_bar
from lamplit.store.lance_store import Store

THRESHOLD = 0.95
_CHUNK = 1024  # 4 MB of cosines at a time


@dataclass(frozen=True)
class Duplicate:
    """One image of a group."""

    id: str
    path: str
    cosine: float  # to the nearest other one
    copy_of: str | None  # id of the first image of the group with the very same content


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that hang together by near pairs, in the order of their ids; the ends of a long chain may differ."""

    images: list[Duplicate]


def find_duplicates(
    store: Store, *, threshold: float = THRESHOLD, chunk_size: int = _CHUNK, progress: bool = False
) -> list[DuplicateGroup]:
    """Group the images of a store by content hash and by the cosine of their vectors, biggest group first.

    Two images are in one group where a chain of pairs with a cosine of at least `threshold` leads from one to the
    other. The vectors are those of the tower, also where the store is centred. Time grows with the square of the
    number of images (100,000 of width 512: minutes); memory holds their vectors and chunks of cosines.

    Args:
        store: any store; for one of imported vectors, the same content is the same vector.
        threshold: lowest cosine of a pair. How alike images of one cosine look depends on the tower.
        chunk_size: cosines in one piece, squared; changes nothing but speed and memory.
        progress: show a bar on stderr.

    Raises:
        UsageError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"the threshold is {threshold}; a cosine above 0 and at most 1 is expected, such as 0.95")
    limit = np.float32(threshold)  # what the cosines are compared with
    vectors = store.vectors()
    first = _first_of_same(store.column("hash"))
    nearest = np.zeros(len(vectors), np.float32)
    copies = (first != np.arange(len(first))).nonzero()[0]
    nearest[copies] = nearest[first[copies]] = 1.0
    labels = first.copy()  # of each image, the place of the first one of its group
    with progress_bar("duplicates", len(vectors), shown=progress) as advance:
        for rows, others, cosines in _tiles(vectors, chunk_size):
            if not cosines.max() < limit:  # of most tiles nothing more is asked; one NaN hides no pair
                np.fmax(nearest[rows], np.fmax.reduce(cosines, 1), out=nearest[rows])
                np.fmax(nearest[others], np.fmax.reduce(cosines, 0), out=nearest[others])
                # Pairs in one group already join nothing: where many images are alike, that is most of them.
                apart = (cosines >= limit) & (labels[rows, None] != labels[others])
                places = np.flatnonzero(apart)  # 20 times as fast as nonzero in two dimensions
                left, right = np.unravel_index(places, apart.shape)
                if len(left):
                    labels = join(labels, left + rows.start, right + others.start)
            if others.stop == len(vectors):
                advance(len(cosines), "")
    return _groups(store, labels, first, nearest)


def join(labels: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join the groups of `left[i]` and `right[i]` for all i.

    Args:
        labels: (N,) for each image, the lowest place in its group.
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
    """(N,) for each image, the place of the first with its content."""
    places: dict[str, int] = {}
    return np.array([places.setdefault(content, place) for place, content in enumerate(hashes)], dtype=np.int64)


def _tiles(vectors: Tensor, chunk_size: int) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Cosines of all pairs, each once: a tile, and which rows and which others it is of. The next overwrites it."""
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
