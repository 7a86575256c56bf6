"""The nearest of many vectors: by the exact product, or by few bits of each first and the product of few rows.

Nothing here is trained. A component, less its mean and by its standard deviation, is rounded to two bits: its sign,
and a second bit that says whether it is the upper or the lower half of that side (the four levels of the best uniform
quantiser of normal values). A query goes through three sieves, each of which looks at fewer rows more closely:

1. *All rows*: the sum of the query's components, as weights of 3 bits, whose sign is another one in the row: a XOR,
   and three ANDs and population counts, for 64 dimensions. Its correlation with the inner product is 0.79 on normal
   vectors.
2. *Some thousand rows*: the same of both bits, 0.93.
3. *Some hundred rows*: the exact product.

How many rows each sieve lets through is measured on the collection, see `choose_kept`. The query is not centred, for
its inner product with the mean is the same for all rows.

Shapes: N rows, D width, Q queries, W words of 64 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import local
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lamplit.unit_vectors import normalize

Places = NDArray[np.int64]
Floats = NDArray[np.float32]
Vectors = NDArray[Any]  # (N, D) unit vectors, float32 or rounded to float16; perhaps a memory map
ENOUGH = 0.99  # recall@10
_WEIGHT_BITS = 3
_LARGEST = 2.7  # root mean squares of a query, that its largest weight stands for; few components are larger
_STEP = 0.9957  # of the quantiser, in standard deviations
_BLOCK = 32768  # rows that are unpacked or compared at once
_PRODUCT_ROWS = 1024  # whose float32 copies stay in a core's cache
_LEAST = 128  # rows for the exact product, which cost next to nothing
_SAMPLE = 256  # queries that recall is measured with: 128 of each kind leave it an error of 0.003
# Rounding to float16 moves a component by 2^-11 of itself at most, and so a length and a cosine by no more.
_ROUNDING = 2**-10 + 1e-5
_EQUAL = 2e-6  # two float32 products of the same
_inside = local()  # whether this is a thread of the pool


@dataclass(frozen=True)
class Found:
    """Rows by their places and cosines, best first; equal cosines by their places."""

    places: Places
    scores: Floats


def rank(vectors: Vectors, query: Floats, k: int, places: Places | None = None) -> Found:
    """Find the k rows with the highest cosine to a (D,) unit vector, among all or those at `places` (ascending).

    Scores are of rows made unit again, in float64, and so they do not depend on what else is looked at.
    """
    size = len(vectors) if places is None else len(places)
    k = min(k, size)
    if k == 0:
        return Found(np.empty(0, np.int64), np.empty(0, np.float32))
    scores = _products(vectors, query, places)
    worst = np.partition(scores, size - k)[size - k]
    near = np.flatnonzero(scores >= worst - 2 * _ROUNDING)
    chosen = near if places is None else places[near]
    rows = vectors[chosen].astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    exact = (rows * query.astype(np.float64)).sum(1).astype(np.float32)
    order = np.lexsort((chosen, -exact))[:k]
    return Found(chosen[order].astype(np.int64), exact[order])


class BitPlanes:
    """Two bits of each component of N vectors: (2, N, W) words of signs and of second bits, and the scale (D,).

    Word w of a row has its dimensions 64 w to 64 w + 63; the scale is the components' standard deviation.
    """

    def __init__(self, words: NDArray[np.uint64], scale: Floats) -> None:
        self.signs, self.seconds = words
        self.scale = scale

    @classmethod
    def of(cls, vectors: Vectors, words: NDArray[np.uint64] | None = None) -> Self:
        """Take the bits of vectors; into `words` where that is given, such as a memory map."""
        size, width = vectors.shape
        words = np.empty((2, size, _num_words(width)), np.uint64) if words is None else words
        mean, square = np.zeros(width), np.zeros(width)
        for start in range(0, size, _BLOCK):
            rows = _float(vectors[start : start + _BLOCK])
            mean += rows.sum(0, dtype=np.float64)
            square += np.einsum("nd,nd->d", rows, rows, dtype=np.float64)
        mean /= max(1, size)
        scale = np.sqrt(np.maximum(square / max(1, size) - mean**2, 0)).astype(np.float32)
        center, step = mean.astype(np.float32), np.maximum(_STEP * scale, np.finfo(np.float32).tiny)

        def pack(start: int, stop: int) -> None:
            for first in range(start, stop, _BLOCK // 8):
                part = slice(first, min(first + _BLOCK // 8, stop))
                rows = _float(vectors[part]) - center
                words[0, part] = _pack(rows >= 0)
                words[1, part] = _pack((rows >= step) | ((rows < 0) & (rows >= -step)))

        in_threads(pack, size)
        return cls(words, scale)

    def candidates(self, query: Floats, kept: tuple[int, int], allowed: NDArray[np.bool_] | None = None) -> Places:
        """Find rows that are likely to be near a (D,) query, ascending; only those `allowed`, (N,).

        `kept` tells about how many rows come through the first sieve and through the second; rows that are equal there
        come through together.
        """
        signs, weights, most = self._prepare(query)
        distances = self._distances(signs, weights, most)
        if allowed is not None:
            distances[~allowed] = most + 1
        places = _nearest(distances, kept[0], most)
        if len(places) <= kept[1]:
            return places
        closer = self._look_closer(distances, places, signs, weights)
        passed: Places = places[closer <= np.partition(closer, kept[1] - 1)[kept[1] - 1]]
        return passed

    def ranks(self, query: Floats, true: Places) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many rows are as near as each of the `true` ones, by the first sieve, and by the second."""
        signs, weights, most = self._prepare(query)
        distances = self._distances(signs, weights, most)
        first = np.cumsum(np.bincount(distances))[distances[true]]
        closer = np.sort(self._look_closer(distances, _nearest(distances, int(first.max()), most), signs, weights))
        second = np.searchsorted(closer, self._look_closer(distances, true, signs, weights), side="right")
        return first, second

    def _prepare(self, query: Floats) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
        """Signs (W,) of a query, its weights as bit planes (3, W), and the weights' sum."""
        magnitudes = np.abs(query) * self.scale
        largest = _LARGEST * float(np.sqrt(np.mean(magnitudes**2))) or 1.0
        weights = np.rint(np.minimum(magnitudes / largest, 1) * (2**_WEIGHT_BITS - 1)).astype(np.uint8)
        planes = _pack((weights >> np.arange(_WEIGHT_BITS, dtype=np.uint8)[:, None] & 1) > 0)
        return _pack(query[None] >= 0)[0], planes, int(weights.sum())

    def _distances(self, signs: NDArray[np.uint64], weights: NDArray[np.uint64], most: int) -> NDArray[Any]:
        """(N,) sums of the weights whose signs differ."""
        from lamplit.retrieval.kernels import scan  # what it is compiled with takes half a second to import

        distances = np.empty(len(self.signs), np.uint16 if most < 2**16 - 1 else np.uint32)

        def add_up(start: int, stop: int) -> None:
            scan(self.signs[start:stop], signs, weights, distances[start:stop])

        in_threads(add_up, len(distances))
        return distances

    def _look_closer(
        self, distances: NDArray[Any], places: Places, signs: NDArray[np.uint64], weights: NDArray[np.uint64]
    ) -> NDArray[np.uint32]:
        """Sum the weights whose bits differ, those of signs twice, for the rows at `places`."""
        from lamplit.retrieval.kernels import look_closer

        closer = np.empty(len(places), np.uint32)

        def add_up(start: int, stop: int) -> None:
            look_closer(distances, self.seconds, places[start:stop], signs, weights, closer[start:stop])

        in_threads(add_up, len(places), least=4096)
        return closer


def find(
    vectors: Vectors,
    planes: BitPlanes,
    query: Floats,
    k: int,
    kept: tuple[int, int],
    allowed: NDArray[np.bool_] | None = None,
) -> Found:
    """Find the k best of the candidates of a (D,) unit vector; `kept` as `choose_kept` measured it."""
    return rank(vectors, query, k, planes.candidates(query, (max(k, kept[0]), max(k, kept[1])), allowed))


def find_all(vectors: Vectors, planes: BitPlanes, queries: Floats, k: int, kept: tuple[int, int]) -> list[Found]:
    """Find the k best of each of (Q, D) queries; threads take whole queries."""
    found: dict[int, Found] = {}

    def answer(start: int, stop: int) -> None:
        for number in range(start, stop):
            found[number] = find(vectors, planes, queries[number], k, kept)

    in_threads(answer, len(queries), least=1)
    return [found[number] for number in range(len(queries))]


def choose_kept(vectors: Vectors, planes: BitPlanes) -> tuple[tuple[int, int], float]:
    """Find how many rows the sieves must keep for a recall@10 of `ENOUGH`; return that with the recall measured.

    Half of the sample's queries are rows of the collection, and half are rows under as much noise as leaves them
    cosines of 0.3: as far as words are from images, and far harder. The recall is that of the worse half.
    """
    queries = sample_queries(vectors)
    true = rank_many(vectors, queries, 10)
    kinds = range(min(2, len(queries)))
    ranks = [planes.ranks(query, best.places) for query, best in zip(queries, true, strict=True)]
    # Each of the two sieves may lose a quarter of what may be lost; half is left for queries that the sample has not.
    first, second = (
        max([_LEAST, *(int(np.quantile([row[sieve] for row in ranks[kind::2]], (3 + ENOUGH) / 4)) for kind in kinds)])
        for sieve in range(2)
    )
    while True:
        found = find_all(vectors, planes, queries, 10, (first, second))
        recall = min(recall_of(found[kind::2], true[kind::2]) for kind in kinds)
        if recall >= ENOUGH or second >= len(vectors):
            return (min(first, len(vectors)), min(second, len(vectors))), recall
        first, second = first * 5 // 4 + 1, second * 5 // 4 + 1


def sample_queries(vectors: Vectors, size: int = _SAMPLE, seed: int = 0) -> Floats:
    """Draw (Q, D) unit vectors to measure recall with, the same ones for a seed; see `choose_kept`."""
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(vectors), min(size, len(vectors)), replace=False))
    rows = normalize(_float(vectors[chosen]))
    noise = normalize(random.standard_normal(rows.shape, np.float32))
    kept = np.ones((len(rows), 1), np.float32)
    kept[1::2] = 0.3
    return normalize(kept * rows + np.sqrt(1 - kept**2) * noise)


def rank_many(vectors: Vectors, queries: Floats, k: int) -> list[Found]:
    """As `rank`, of (Q, D) queries in one pass over the vectors; good to float32 alone."""
    k = min(k, len(vectors))
    best = np.empty((len(queries), 0), np.float32)
    places = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), _BLOCK):
        scores = queries @ normalize(_float(vectors[start : start + _BLOCK])).T
        top = np.argpartition(scores, max(0, scores.shape[1] - k), axis=1)[:, -k:] if k else places[:, :0]
        best = np.concatenate([best, np.take_along_axis(scores, top, 1)], 1)
        places = np.concatenate([places, top + start], 1)
        order = np.lexsort((places, -best), axis=1)[:, :k]
        best, places = np.take_along_axis(best, order, 1), np.take_along_axis(places, order, 1)
    return [Found(row, scores) for row, scores in zip(places, best, strict=True)]


def recall_of(found: Sequence[Found], true: Sequence[Found]) -> float:
    """Mean part of the true rows that were found; a row that is as near as the last true one is as good."""
    parts = [
        min(1.0, float((some.scores >= best.scores.min() - _EQUAL).sum()) / len(best.scores))
        for some, best in zip(found, true, strict=True)
    ]
    return float(np.mean(parts))


def in_threads(work: Callable[[int, int], None], size: int, least: int = 32768) -> None:
    """Call `work(start, stop)` for equal parts of `range(size)`, not below `least`, in `num_threads` threads.

    Inside, `in_threads` has one thread.
    """
    parts = min(num_threads(), size // least)
    if parts < 2 or getattr(_inside, "one", False):  # one of the pool's own threads would wait for itself
        work(0, size)
        return
    cuts = [size * number // parts for number in range(parts + 1)]
    list(_pool(num_threads()).map(work, cuts[:-1], cuts[1:]))


def num_threads() -> int:
    """Tell how many threads search takes: OMP_NUM_THREADS, or as many as there are cores for this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "lamplit-nearest", lambda: setattr(_inside, "one", True))


def _products(vectors: Vectors, query: Floats, places: Places | None) -> Floats:
    """(n,) products of all rows, or of those at `places`, with a (D,) query, to float32's exactness."""
    if vectors.dtype != np.float16:
        plain: Floats = (vectors if places is None else vectors[places]) @ query
        return plain
    from lamplit.retrieval.kernels import products

    scores = np.empty(len(vectors) if places is None else len(places), np.float32)

    def multiply(start: int, stop: int) -> None:
        for first in range(start, stop, _PRODUCT_ROWS):
            part = slice(first, min(first + _PRODUCT_ROWS, stop))
            rows = vectors[part] if places is None else np.take(vectors, places[part], axis=0)
            products(rows.view(np.uint16), query, scores[part])

    in_threads(multiply, len(scores), least=2048)
    return scores


def _nearest(distances: NDArray[Any], count: int, most: int) -> Places:
    """Places of the `count` smallest of (N,) distances, ascending, and of all that equal the last of them.

    Distances above `most` are left out.
    """
    from lamplit.retrieval.kernels import count_values, places_within

    counts: dict[int, NDArray[np.int64]] = {}  # of each thread's part, by where it starts
    found: dict[int, Places] = {}

    def count_up(start: int, stop: int) -> None:
        counts[start] = np.zeros(most + 2, np.int64)
        count_values(distances[start:stop], counts[start])

    in_threads(count_up, len(distances))
    reached = np.cumsum(np.sum(list(counts.values()), axis=0)[:-1])
    limit = min(int(np.searchsorted(reached, count)), most)

    def collect(start: int, stop: int) -> None:
        found[start] = np.empty(counts[start][: limit + 1].sum(), np.int64)
        places_within(distances[start:stop], limit, found[start])
        found[start] += start

    in_threads(collect, len(distances))
    return np.concatenate([found[start] for start in sorted(found)])


def _pack(flags: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(n, D) flags as (n, W) words; what is missing in the last word is 0."""
    packed = np.packbits(flags, axis=1, bitorder="little")
    padded = np.zeros((len(flags), 8 * _num_words(flags.shape[1])), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def _num_words(width: int) -> int:
    return -(-width // 64)


def _float(rows: Vectors) -> Floats:
    if rows.dtype != np.float16:
        return rows.astype(np.float32, copy=False)
    from lamplit.retrieval.kernels import widen

    floats = np.empty(rows.shape, np.float32)
    widen(rows.view(np.uint16), floats)
    return floats
