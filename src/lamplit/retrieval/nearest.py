"""The nearest of many vectors by the product, in any number of threads.

Shapes: N rows, D width, Q queries.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamplit.progress import progress_bar
from lamplit.store.arrays.joined_vectors import JoinedVectors
from lamplit.unit_vectors import normalize

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Vectors = NDArray[Any]  # (N, D) unit vectors, float32 or rounded to float16; perhaps a memory map
_BLOCK = 32768  # rows that are compared at once
# Rounding to float16 moves a component by 2^-11 of itself at most, so a length and a cosine move no more.
_ROUNDING = 2**-10 + 1e-5
_MAX_COSINE = 1.5  # a larger product comes from a row that holds no numbers
_thread = local()  # whether this is a thread of the pool


@dataclass(frozen=True)
class Found:
    """Rows with their cosines, best first; equal cosines in the order of the rows."""

    rows: Rows
    scores: Floats

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, part: slice) -> Found:
        """Take a part of the ranking."""
        return Found(self.rows[part], self.scores[part])

    def __add__(self, other: Found) -> Found:
        """Append another ranking; the scores need not be in order then."""
        return Found(np.concatenate([self.rows, other.rows]), np.concatenate([self.scores, other.scores]))

    def by_score(self) -> Found:
        """Sort by score, best first."""
        order = np.lexsort((self.rows, -self.scores))
        return Found(self.rows[order], self.scores[order])


def rank(vectors: Vectors, query: Floats, k: int, rows: Rows | None = None) -> Found:
    """Find the k rows with the highest cosine to a (D,) unit vector, among all rows or the given ones (ascending).

    Scores are of rows made unit again, in float64, so they do not depend on what else is looked at. A row that holds
    anything but finite numbers is never found.
    """
    scores = _products(vectors, query, rows)
    scores[~(np.abs(scores) <= _MAX_COSINE)] = -np.inf
    while True:
        k = min(k, int(np.isfinite(scores).sum()))
        if k <= 0:
            return Found(np.empty(0, np.int64), np.empty(0, np.float32))
        worst = np.partition(scores, len(scores) - k)[len(scores) - k]
        near = np.flatnonzero(scores >= worst - 2 * _ROUNDING)
        chosen = near if rows is None else rows[near]
        exact = _cosines(vectors[chosen], query)
        if np.isfinite(exact).all():
            return Found(chosen.astype(np.int64), exact).by_score()[:k]
        scores[near[~np.isfinite(exact)]] = -np.inf  # zeros in the query hid what the row holds


def rank_many(vectors: Vectors | JoinedVectors, queries: Floats, k: int, *, progress: bool = False) -> list[Found]:
    """Rank as `rank` does for (Q, D) queries in one pass over the vectors, with float32 scores."""
    k = min(k, len(vectors))
    best = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    with progress_bar("products", len(vectors), shown=progress) as advance:
        for start in range(0, len(vectors), _BLOCK):
            scores = queries @ normalize(to_floats(vectors[start : start + _BLOCK])).T
            top = np.argpartition(scores, max(0, scores.shape[1] - k), axis=1)[:, -k:] if k else rows[:, :0]
            best = np.concatenate([best, np.take_along_axis(scores, top, 1)], 1)
            rows = np.concatenate([rows, top + start], 1)
            order = np.lexsort((rows, -best), axis=1)[:, :k]
            best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
            advance(scores.shape[1], "")
    return [Found(*found) for found in zip(rows, best, strict=True)]


def in_threads(work: Callable[[int, int], None], size: int, least: int = 32768) -> None:
    """Call `work(start, stop)` for equal parts of `range(size)`, of at least `least`, in `num_threads` threads.

    Inside `work`, `in_threads` uses one thread.
    """
    parts = min(num_threads(), size // least)
    if parts < 2 or getattr(_thread, "one", False):  # a thread of the pool would wait for itself
        work(0, size)
        return
    cuts = [size * number // parts for number in range(parts + 1)]
    list(_pool(num_threads()).map(work, cuts[:-1], cuts[1:]))


def num_threads() -> int:
    """Return the number of threads of search: OMP_NUM_THREADS, or the number of cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "lamplit-nearest", lambda: setattr(_thread, "one", True))


def _products(vectors: Vectors, query: Floats, rows: Rows | None) -> Floats:
    """Multiply all rows, or the given ones, by a (D,) query in float32: (n,)."""
    if vectors.dtype != np.float16:
        with np.errstate(invalid="ignore"):  # of rows that hold no numbers
            if rows is None:
                plain: Floats = vectors @ query
            elif len(rows) > len(vectors) // 2:  # to copy so many would take longer than to multiply all
                plain = (vectors @ query)[rows]
            else:
                plain = vectors[rows] @ query
        return plain
    from lamplit.retrieval.kernels import products, products_of

    halves = vectors.view(np.uint16)
    scores = np.empty(len(vectors) if rows is None else len(rows), np.float32)

    def multiply(start: int, stop: int) -> None:
        if rows is None:
            products(halves[start:stop], query, scores[start:stop])
        else:
            products_of(rows[start:stop], halves, query, scores[start:stop])

    in_threads(multiply, len(scores), least=2048)
    return scores


def to_floats(rows: Vectors) -> Floats:
    """Return rows as float32; one that holds anything but finite numbers becomes zeros."""
    floats = rows.astype(np.float32, copy=False)
    if rows.dtype == np.float16:
        from lamplit.retrieval.kernels import widen

        floats = np.empty(rows.shape, np.float32)
        widen(rows.view(np.uint16), floats)
    is_finite = np.logical_and.reduce(np.isfinite(rows), axis=1)
    if not is_finite.all():
        floats = np.where(is_finite[:, None], floats, np.float32(0))
    return floats


def _cosines(rows: Vectors, query: Floats) -> Floats:
    """Return the cosines of (n, D) rows with a (D,) unit vector, computed in float64; NaN for NaN and infinity."""
    with np.errstate(invalid="ignore"):
        exact = rows.astype(np.float64)
        exact /= np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
        cosines: Floats = (exact * query.astype(np.float64)).sum(1).astype(np.float32)
    return cosines
