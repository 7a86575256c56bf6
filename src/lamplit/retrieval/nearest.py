"""The nearest of many vectors: by the exact product, or first by few bits of each and then by the product of few rows.

Nothing here is trained. A component, less its mean and by its standard deviation, is rounded to two bits: its sign,
and a second bit that says whether it is the upper or the lower half of that side (the four levels of the best uniform
quantiser of normal values). A query goes through three sieves, each of which looks at fewer rows more closely:

1. *All rows*: the sum of the query's components, as weights of 3 bits, whose sign differs from the row's: a XOR, three
   ANDs and population counts for 64 dimensions. Its correlation with the inner product is 0.79 on normal vectors.
2. *Some thousand rows*: the same for both bits, 0.93.
3. *Some hundred rows*: the exact product.

How many rows each sieve lets through is measured on the collection, see `recall.choose_kept`. The query is not centred,
because its inner product with the mean is the same for all rows.

Shapes: N rows, D width, Q queries, W words of 64 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import local
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lamplit.progress import progress_bar
from lamplit.unit_vectors import normalize

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Vectors = NDArray[Any]  # (N, D) unit vectors, float32 or rounded to float16; perhaps a memory map
_WEIGHT_BITS = 3
_CLIP_RMS = 2.7  # components of a query beyond so many root mean squares have the largest weight
_STEP = 0.9957  # of the quantiser, in standard deviations
_BLOCK = 32768  # rows that are unpacked or compared at once
_PRODUCT_ROWS = 1024  # whose float32 copies stay in a core's cache
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


class BitPlanes:
    """Two bits of each component of N vectors.

    Args:
        words: (2, N, W) words of signs and of second bits; word w of a row has its dimensions 64 w to 64 w + 63.
        scale: (D,) standard deviation of each component.
    """

    def __init__(self, words: NDArray[np.uint64], scale: Floats) -> None:
        self.signs, self.seconds = words
        self.scale = scale

    @classmethod
    def of(cls, vectors: Vectors, words: NDArray[np.uint64] | None = None, *, progress: bool = False) -> Self:
        """Take the bits of (N, D) vectors; `words`, such as a memory map, receives them if it is given."""
        size, width = vectors.shape
        words = np.empty((2, size, _num_words(width)), np.uint64) if words is None else words
        mean, square = np.zeros(width), np.zeros(width)
        with progress_bar("deviations", size, shown=progress) as advance:
            for start in range(0, size, _BLOCK):
                rows = to_floats(vectors[start : start + _BLOCK])
                mean += rows.sum(0, dtype=np.float64)
                square += np.einsum("nd,nd->d", rows, rows, dtype=np.float64)
                advance(len(rows), "")
        mean /= max(1, size)
        scale = np.sqrt(np.maximum(square / max(1, size) - mean**2, 0)).astype(np.float32)
        center, step = mean.astype(np.float32), np.maximum(_STEP * scale, np.finfo(np.float32).tiny)

        def pack(start: int, stop: int) -> None:
            for first in range(start, stop, _BLOCK // 8):
                part = slice(first, min(first + _BLOCK // 8, stop))
                rows = to_floats(vectors[part]) - center
                words[0, part] = _pack(rows >= 0)
                words[1, part] = _pack((rows >= step) | ((rows < 0) & (rows >= -step)))
                advance(len(rows), "")

        with progress_bar("bits", size, shown=progress) as advance:
            in_threads(pack, size)
        return cls(words, scale)

    def candidates(self, query: Floats, kept: tuple[int, int], allowed: NDArray[np.bool_] | None = None) -> Rows:
        """Find rows that are likely to be near a query.

        Args:
            query: (D,) unit vector.
            kept: about how many rows the first and the second sieve let through; equal rows come through together.
            allowed: (N,) the rows to choose from; by default all.

        Returns:
            Rows, ascending.
        """
        signs, weights, total = self._prepare(query)
        distances = self._distances(signs, weights, total)
        if allowed is not None:
            distances[~allowed] = total + 1
        rows = _nearest(distances, kept[0], total)
        if len(rows) <= kept[1]:
            return rows
        closer = self._look_closer(distances, rows, signs, weights)
        passed: Rows = rows[closer <= np.partition(closer, kept[1] - 1)[kept[1] - 1]]
        return passed

    def ranks(self, query: Floats, true: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count the rows that are as near as each of the `true` ones: by the first sieve, and by the second."""
        signs, weights, total = self._prepare(query)
        distances = self._distances(signs, weights, total)
        first = np.cumsum(np.bincount(distances))[distances[true]]
        closer = np.sort(self._look_closer(distances, _nearest(distances, int(first.max()), total), signs, weights))
        second = np.searchsorted(closer, self._look_closer(distances, true, signs, weights), side="right")
        return first, second

    def _prepare(self, query: Floats) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
        """Return the signs (W,) of a query, its weights as bit planes (3, W), and the sum of the weights."""
        magnitudes = np.abs(query) * self.scale
        largest = _CLIP_RMS * float(np.sqrt(np.mean(magnitudes**2))) or 1.0
        weights = np.rint(np.minimum(magnitudes / largest, 1) * (2**_WEIGHT_BITS - 1)).astype(np.uint8)
        planes = _pack((weights >> np.arange(_WEIGHT_BITS, dtype=np.uint8)[:, None] & 1) > 0)
        return _pack(query[None] >= 0)[0], planes, int(weights.sum())

    def _distances(self, signs: NDArray[np.uint64], weights: NDArray[np.uint64], total: int) -> NDArray[Any]:
        """Sum the weights whose signs differ, for each row (N,)."""
        from lamplit.retrieval.kernels import scan  # numba takes half a second to import

        distances = np.empty(len(self.signs), np.uint16 if total < 2**16 - 1 else np.uint32)

        def add_up(start: int, stop: int) -> None:
            scan(self.signs[start:stop], signs, weights, distances[start:stop])

        in_threads(add_up, len(distances))
        return distances

    def _look_closer(
        self, distances: NDArray[Any], rows: Rows, signs: NDArray[np.uint64], weights: NDArray[np.uint64]
    ) -> NDArray[np.uint32]:
        """Sum the weights whose bits differ, those of signs twice, for the given rows."""
        from lamplit.retrieval.kernels import look_closer

        closer = np.empty(len(rows), np.uint32)

        def add_up(start: int, stop: int) -> None:
            look_closer(distances, self.seconds, rows[start:stop], signs, weights, closer[start:stop])

        in_threads(add_up, len(rows), least=4096)
        return closer


def find(
    vectors: Vectors,
    planes: BitPlanes,
    query: Floats,
    k: int,
    kept: tuple[int, int],
    allowed: NDArray[np.bool_] | None = None,
) -> Found:
    """Find the k best of the candidates of a (D,) unit vector; `kept` as `recall.choose_kept` measured it."""
    return rank(vectors, query, k, planes.candidates(query, (max(k, kept[0]), max(k, kept[1])), allowed))


def find_all(
    vectors: Vectors, planes: BitPlanes, queries: Floats, k: int, kept: tuple[int, int], *, progress: bool = False
) -> list[Found]:
    """Find the k best of each of (Q, D) queries; threads take whole queries."""
    found: dict[int, Found] = {}

    def answer(start: int, stop: int) -> None:
        for number in range(start, stop):
            found[number] = find(vectors, planes, queries[number], k, kept)
            advance(1, "")

    with progress_bar("recall", len(queries), shown=progress) as advance:
        in_threads(answer, len(queries), least=1)
    return [found[number] for number in range(len(queries))]


def rank_many(vectors: Vectors, queries: Floats, k: int, *, progress: bool = False) -> list[Found]:
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
    from lamplit.retrieval.kernels import products

    scores = np.empty(len(vectors) if rows is None else len(rows), np.float32)

    def multiply(start: int, stop: int) -> None:
        for first in range(start, stop, _PRODUCT_ROWS):
            part = slice(first, min(first + _PRODUCT_ROWS, stop))
            halves = vectors[part] if rows is None else np.take(vectors, rows[part], axis=0)
            products(halves.view(np.uint16), query, scores[part])

    in_threads(multiply, len(scores), least=2048)
    return scores


def _nearest(distances: NDArray[Any], count: int, limit: int) -> Rows:
    """Return the rows of the `count` smallest of (N,) distances, ascending, and of all that equal the last of them.

    Distances above `limit` are left out.
    """
    from lamplit.retrieval.kernels import count_values, rows_within

    counts: dict[int, NDArray[np.int64]] = {}  # of each thread's part, by its start
    found: dict[int, Rows] = {}

    def count_up(start: int, stop: int) -> None:
        counts[start] = np.zeros(limit + 2, np.int64)
        count_values(distances[start:stop], counts[start])

    in_threads(count_up, len(distances))
    reached = np.cumsum(np.sum(list(counts.values()), axis=0)[:-1])
    largest = min(int(np.searchsorted(reached, count)), limit)

    def collect(start: int, stop: int) -> None:
        found[start] = np.empty(counts[start][: largest + 1].sum(), np.int64)
        rows_within(distances[start:stop], largest, found[start])
        found[start] += start

    in_threads(collect, len(distances))
    return np.concatenate([found[start] for start in sorted(found)])


def _pack(flags: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Pack (n, D) flags into (n, W) words; the last word is filled up with zeros."""
    packed = np.packbits(flags, axis=1, bitorder="little")
    padded = np.zeros((len(flags), 8 * _num_words(flags.shape[1])), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def _num_words(width: int) -> int:
    return -(-width // 64)


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
