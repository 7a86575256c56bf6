"""The nearest of many vectors: by the exact product, or by their sign bits first and the product of few.

Nothing here is trained or built: the bits are the signs of the vectors minus their mean, 1/32 of float32. A query
goes through three sieves, each of which looks at fewer rows more closely:

1. *All rows*: how many of the query's larger components have another sign in the row. One XOR, AND and population
   count for 64 dimensions.
2. *Four times `count` rows*: the same with the query's components as weights of 3 bits, which is nearly as good as
   the components themselves.
3. *`count` rows*: the exact product.

Leaving out the smaller components needs a third to a half of the rows that plain Hamming distance needs for the same
recall: it brings the correlation with the inner product from 0.64 to 0.72, and all components would bring 0.80. A
random rotation before the signs were taken gained nothing, on real vectors or random ones; the query is not centred,
for its inner product with the mean is the same for all rows.

Shapes: N rows, D width, Q queries, W words of 64 bits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier, local
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lamplit.unit_vectors import normalize

Places = NDArray[np.int64]
Vectors = NDArray[Any]  # (N, D) unit vectors, float32 or rounded to float16; perhaps a memory map
ENOUGH = 0.99  # recall@10
_WIDENING = 4  # rows of the second sieve for each of the third
_WEIGHT_BITS = 3
_SCAN_ROWS = 65536  # whose bits and distances stay in a core's cache
_PRODUCT_ROWS = 1024  # whose float32 copies stay in it
_LEAST_COUNT = 128
_SAMPLE = 256  # queries that recall is measured with: 128 of each kind leave it an error of 0.003
# Rounding to float16 moves a component by 2^-11 of itself at most, and so a length and a cosine by no more.
_ROUNDING = 2**-10 + 1e-5
_inside = local()  # whether this is a thread of the pool
_EQUAL = 2e-6  # two float32 products of the same


@dataclass(frozen=True)
class Found:
    """Rows by their places and cosines, best first; equal cosines by their places."""

    places: Places
    scores: NDArray[np.float32]


def rank(vectors: Vectors, query: NDArray[np.float32], k: int, places: Places | None = None) -> Found:
    """Find the k rows with the highest cosine to a (D,) unit vector, among all or those at `places` (ascending).

    Scores are of rows made unit again, in float64, and so they do not depend on what else is looked at.
    """
    size = len(vectors) if places is None else len(places)
    k = min(k, size)
    if k == 0:
        return Found(np.empty(0, np.int64), np.empty(0, np.float32))
    scores = np.empty(size, np.float32)

    def score(start: int, stop: int) -> None:
        for first in range(start, stop, _PRODUCT_ROWS):
            part = slice(first, min(first + _PRODUCT_ROWS, stop))
            rows = vectors[part] if places is None else np.take(vectors, places[part], axis=0)
            np.matmul(_float(rows), query, out=scores[part])

    score(0, size)
    worst = np.partition(scores, size - k)[size - k]
    near = np.flatnonzero(scores >= worst - 2 * _ROUNDING)
    chosen = near if places is None else places[near]
    unit = vectors[chosen].astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    exact = (unit * query.astype(np.float64)).sum(1).astype(np.float32)
    order = np.lexsort((chosen, -exact))[:k]
    return Found(chosen[order].astype(np.int64), exact[order])


class SignBits:
    """The signs of N vectors as bits, (W, N) words: word w of a row has its dimensions 64 w to 64 w + 63."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self.words = words

    @classmethod
    def of(cls, vectors: Vectors, words: NDArray[np.uint64] | None = None) -> Self:
        """Take the signs of vectors minus their mean; into `words` where that is given, such as a memory map."""
        size, width = vectors.shape
        words = np.empty((_num_words(width), size), np.uint64) if words is None else words
        mean = np.zeros(width)
        for start in range(0, size, _SCAN_ROWS):
            mean += _float(vectors[start : start + _SCAN_ROWS]).sum(0, dtype=np.float64)
        center = (mean / max(1, size)).astype(np.float32)
        for start in range(0, size, _SCAN_ROWS):
            part = slice(start, start + _SCAN_ROWS)
            words[:, part] = _pack(_float(vectors[part]) > center).T
        return cls(words)

    def candidates(self, query: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None = None) -> Places:
        """Find about `count` rows that are likely to be near a (D,) query, ascending; only those `allowed`, (N,)."""
        distances = self._distances(query)
        if allowed is not None:
            distances[~allowed] = np.iinfo(distances.dtype).max
        places = np.flatnonzero(distances <= _threshold(distances, _WIDENING * count, len(query)))
        if len(places) <= count:
            return places
        closer = self._weighted(places, query)
        kept: Places = places[closer <= np.partition(closer, count - 1)[count - 1]]
        return kept

    def farthest(self, queries: NDArray[np.float32], true: Sequence[Found], part: float) -> int:
        """Count how many rows are as near by the first sieve as this `part` of the true ones."""
        numbers = []
        for query, best in zip(queries, true, strict=True):
            distances = self._distances(query)
            numbers += [int(np.count_nonzero(distances <= distances[place])) for place in best.places]
        return int(np.quantile(numbers, part))

    def _distances(self, query: NDArray[np.float32]) -> NDArray[np.uint16]:
        """(N,) how many of the query's larger components have another sign."""
        signs, mask = _pack(query[None] > 0)[0], _pack(_larger(np.abs(query))[None])[0]
        groups = _groups(np.bitwise_count(mask).tolist(), 255)
        size = self.words.shape[1]
        distances = np.zeros(size, np.uint16)

        def scan(start: int, stop: int) -> None:
            bits = np.empty(_SCAN_ROWS, np.uint64)
            counts, sums = np.empty(_SCAN_ROWS, np.uint8), np.empty(_SCAN_ROWS, np.uint8)
            for first in range(start, stop, _SCAN_ROWS):
                rows = slice(first, min(first + _SCAN_ROWS, stop))
                total = distances[rows]
                differ, count, some = (buffer[: len(total)] for buffer in (bits, counts, sums))
                for group in groups:  # one byte holds the sum of a group
                    for number in group:
                        np.bitwise_xor(self.words[number, rows], signs[number], out=differ)
                        np.bitwise_and(differ, mask[number], out=differ)
                        if number == group[0]:
                            np.bitwise_count(differ, out=some)
                        else:
                            np.add(some, np.bitwise_count(differ, out=count), out=some)
                    np.add(total, some, out=total)

        in_threads(scan, size)
        return distances

    def _weighted(self, places: Places, query: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Sum the weights of the query's components whose sign differs, for the rows at `places`."""
        magnitudes = np.abs(query)
        scale = 3 * float(np.sqrt(np.mean(magnitudes**2))) or 1.0  # few components are larger
        weights = np.rint(np.minimum(magnitudes / scale, 1) * (2**_WEIGHT_BITS - 1)).astype(np.uint8)
        planes = _pack((weights >> np.arange(_WEIGHT_BITS, dtype=np.uint8)[:, None] & 1) > 0)
        signs = _pack(query[None] > 0)[0]
        totals = np.zeros(len(places), np.uint32)

        def add_up(start: int, stop: int) -> None:
            for first in range(start, stop, _SCAN_ROWS // 8):
                part = slice(first, min(first + _SCAN_ROWS // 8, stop))
                differ = [np.take(word, places[part]) ^ sign for word, sign in zip(self.words, signs, strict=True)]
                for bit, plane in enumerate(planes):
                    counts = np.zeros(len(differ[0]), np.uint16)
                    for word, kept in zip(differ, plane, strict=True):
                        counts += np.bitwise_count(word & kept)
                    totals[part] += counts.astype(np.uint32) << bit

        in_threads(add_up, len(places))
        return totals


def find(
    vectors: Vectors,
    bits: SignBits,
    query: NDArray[np.float32],
    k: int,
    count: int,
    allowed: NDArray[np.bool_] | None = None,
) -> Found:
    """Find the k best of the candidates of a (D,) unit vector; `count` as `choose_count` measured it."""
    places = bits.candidates(query, max(k, count), allowed)
    return rank(vectors, query, k, places)


def find_all(vectors: Vectors, bits: SignBits, queries: NDArray[np.float32], k: int, count: int) -> list[Found]:
    """Find the k best of each of (Q, D) queries; threads take whole queries."""
    found: dict[int, Found] = {}

    def answer(start: int, stop: int) -> None:
        for number in range(start, stop):
            found[number] = find(vectors, bits, queries[number], k, count)

    in_threads(answer, len(queries), least=1)
    return [found[number] for number in range(len(queries))]


def choose_count(vectors: Vectors, bits: SignBits) -> tuple[int, float]:
    """Find how many candidates give a recall@10 of `ENOUGH`; return it with the recall it was measured to give.

    Half of the sample's queries are rows of the collection, and half are rows under as much noise as leaves them
    cosines of 0.3: as far as words are from pictures, and far harder. The recall is that of the worse half.
    """
    queries = sample_queries(vectors)
    true = rank_many(vectors, queries, 10)
    count = max(_LEAST_COUNT, bits.farthest(queries, true, ENOUGH) // _WIDENING)
    while True:
        found = find_all(vectors, bits, queries, 10, count)
        recall = min(recall_of(found[kind::2], true[kind::2]) for kind in range(min(2, len(true))))
        if recall >= ENOUGH or count >= len(vectors):
            return min(count, len(vectors)), recall
        count = count * 5 // 4


def sample_queries(vectors: Vectors, size: int = _SAMPLE, seed: int = 0) -> NDArray[np.float32]:
    """Draw (Q, D) unit vectors to measure recall with, the same ones for a seed; see `choose_count`."""
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(vectors), min(size, len(vectors)), replace=False))
    rows = normalize(vectors[chosen])
    noise = normalize(random.standard_normal(rows.shape, np.float32))
    kept = np.ones((len(rows), 1), np.float32)
    kept[1::2] = 0.3
    return normalize(kept * rows + np.sqrt(1 - kept**2) * noise)


def rank_many(vectors: Vectors, queries: NDArray[np.float32], k: int) -> list[Found]:
    """As `rank`, of (Q, D) queries in one pass over the vectors; good to float32 alone."""
    import torch

    asked = torch.from_numpy(queries)
    k = min(k, len(vectors))
    best = torch.empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(vectors), _SCAN_ROWS):
        rows = torch.from_numpy(normalize(vectors[start : start + _SCAN_ROWS]))
        scores = asked @ rows.T
        top = torch.topk(scores, min(k, len(rows)), dim=1)
        best = torch.cat([best, top.values], 1)
        places = torch.cat([places, top.indices + start], 1)
        order = torch.topk(best, min(k, best.shape[1]), dim=1)
        best, places = order.values, places.gather(1, order.indices)
    return [Found(row.numpy(), scores.numpy()) for row, scores in zip(places, best, strict=True)]


def recall_of(found: Sequence[Found], true: Sequence[Found]) -> float:
    """Mean part of the true rows that were found; a row that is as near as the last true one is as good."""
    parts = [
        min(1.0, float((some.scores >= best.scores.min() - _EQUAL).sum()) / len(best.scores))
        for some, best in zip(found, true, strict=True)
    ]
    return float(np.mean(parts))


def in_threads(work: Callable[[int, int], None], size: int, least: int = 32768) -> None:
    """Call `work(start, stop)` for equal parts of `range(size)`, not below `least`, in as many threads as torch has.

    Inside, torch itself has one thread, and so does `in_threads`.
    """
    import torch

    most = torch.get_num_threads()
    if most == 1 or getattr(_inside, "one", False):  # one of the pool's own threads would wait for itself
        work(0, size)
        return
    parts = max(1, min(most, size // least))
    cuts = [size * number // parts for number in range(parts + 1)]
    list(_pool(most).map(work, cuts[:-1], cuts[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: to start them, and to tell torch of each, takes longer than a query."""
    import torch

    pool = ThreadPoolExecutor(threads, "lamplit-nearest", _stay_alone)
    all_there = Barrier(threads)
    list(pool.map(lambda _: all_there.wait(), range(threads)))
    torch.set_num_threads(threads)  # torch gives the last number set to threads yet to start
    return pool


def _stay_alone() -> None:
    import torch

    _inside.one = True
    torch.set_num_threads(1)


def _groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Cut numbers 0, 1, ... into runs whose sizes do not add up to more than `most`."""
    groups: list[list[int]] = [[]]
    for number, size in enumerate(sizes):
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > most:
            groups.append([])
        groups[-1].append(number)
    return groups


def _larger(magnitudes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which components of a query to count: those whose signs alone correlate best with all of it."""
    falling = np.sort(magnitudes)[::-1]
    correlation = np.cumsum(falling) / np.sqrt(np.arange(1, len(falling) + 1))
    kept: NDArray[np.bool_] = magnitudes >= falling[correlation.argmax()]
    return kept


def _threshold(distances: NDArray[np.uint16], count: int, largest: int) -> int:
    """Return the smallest distance within which there are `count` rows."""
    return bisect_left(range(largest + 1), count, key=lambda limit: int(np.count_nonzero(distances <= limit)))


def _pack(flags: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(n, D) flags as (n, W) words; what is missing in the last word is 0."""
    packed = np.packbits(flags, axis=1, bitorder="little")
    padded = np.zeros((len(flags), 8 * _num_words(flags.shape[1])), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def _num_words(width: int) -> int:
    return -(-width // 64)


def _float(rows: Vectors) -> NDArray[np.float32]:
    floats: NDArray[np.float32] = np.asarray(rows).astype(np.float32, copy=False)
    return floats
