"""Two bits of each component: the sieves before the exact product.

Nothing here is trained. A component, less its mean and by its standard deviation, is rounded to two bits: its sign,
and a second bit that says whether it is the upper or the lower half of that side (the four levels of the best uniform
quantiser of normal values). A query goes through three sieves, each of which looks at fewer rows more closely:

1. *All rows*: the sum of the query's components, as weights of 3 bits, whose sign differs from the row's: a XOR, three
   ANDs and population counts for 64 dimensions. Its correlation with the inner product is 0.79 on normal vectors.
   Several queries share one pass over the rows.
2. *Some thousand rows*: the same for both bits, 0.93.
3. *Some hundred rows*: the exact product.

How many rows each sieve lets through is measured on the collection, see `recall.choose_kept`. The query is not centred,
because its inner product with the mean is the same for all rows.

Shapes: N rows in G groups of R, D width, Q queries, W words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from lamplit.progress import progress_bar
from lamplit.retrieval.nearest import Floats, Found, Rows, Vectors, in_threads, rank, to_floats

_WEIGHT_BITS = 3
_CLIP_RMS = 2.7  # components of a query beyond so many root mean squares have the largest weight
_STEP = 0.9957  # of the quantiser, in standard deviations
_BLOCK = 32768  # rows that are unpacked at once
_PACKED = 128  # groups that are packed at once
_LEAST = 1024  # groups for a thread
_TOGETHER = 32  # queries that share a pass over the rows
_ROOM = 2**24  # rows, about, that come through the first sieve at once, for all of these queries
_SAMPLE = 65536  # rows, about, that tell which sums are likely
Flags = NDArray[np.bool_]
Words = NDArray[np.uint64]
Create = Callable[[str, tuple[int, ...], Any], Words]


class _Query(NamedTuple):
    """A query as the bits are compared with it."""

    signs: Words  # (W,)
    weights: Words  # (3, W)


class _Sifted(NamedTuple):
    """Rows that came through the first sieve, ascending, and their sums of both bits."""

    rows: NDArray[np.uint32]
    closer: NDArray[np.uint32]

    def keep(self, count: int) -> Rows:
        """Return about so many rows, those that have the smallest sums; all that equal the last one stay, too."""
        from lamplit.retrieval.kernels import smallest

        return self.rows[: smallest(*self, count)].astype(np.int64)


def _in_memory(_: str, shape: tuple[int, ...], kind: Any) -> Words:
    return np.empty(shape, kind)


class BitPlanes:
    """Two bits of each component of N vectors.

    Word w of a row has its dimensions 64 w to 64 w + 63.

    Args:
        signs: (G, W, R) words of signs; a last group that is not full ends with zeros.
        seconds: (N, W) words of second bits.
        scale: (D,) standard deviation of each component.
    """

    def __init__(self, signs: Words, seconds: Words, scale: Floats) -> None:
        self.signs, self.seconds, self.scale = signs, seconds, scale

    @classmethod
    def of(cls, vectors: Vectors, create: Create = _in_memory, *, progress: bool = False) -> Self:
        """Take the bits of (N, D) vectors; `create` makes the arrays for them by their names, such as memory maps."""
        from lamplit.retrieval.kernels import GROUP

        size, width = vectors.shape
        num_words = -(-width // 64)
        signs = create("signs", (-(-size // GROUP), num_words, GROUP), np.uint64)
        seconds = create("seconds", (size, num_words), np.uint64)
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
            for first in range(start, stop, _PACKED):
                last = min(first + _PACKED, stop)
                part = slice(first * GROUP, min(last * GROUP, size))
                rows = to_floats(vectors[part]) - center
                signs[first:last] = _group(_pack(rows >= 0), GROUP)
                seconds[part] = _pack((rows >= step) | ((rows < 0) & (rows >= -step)))
                advance(len(rows), "")

        with progress_bar("bits", size, shown=progress) as advance:
            in_threads(pack, len(signs), _LEAST)
        return cls(signs, seconds, scale)

    def candidates(self, query: Floats, kept: tuple[int, int], allowed: Flags | None = None) -> Rows:
        """Find rows that are likely to be near a query.

        Args:
            query: (D,) unit vector.
            kept: how many rows at least the first sieve lets through, and how many the second; equal rows come through
                together.
            allowed: (N,) the rows to choose from; by default all.

        Returns:
            Rows, ascending.
        """
        [parts] = self._first_sieve([self._prepare(query)], kept[0], allowed)
        return _joined(parts).keep(kept[1])

    def ranks(self, query: Floats, true: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count the rows that are as near as each of the `true` ones: by the first sieve, and by the second."""
        prepared = self._prepare(query)
        sums = self._scan(prepared)
        first = np.cumsum(np.bincount(sums))[sums[true]]
        rows = np.flatnonzero(sums <= sums[true].max())
        closer = np.sort(self._closer(rows, sums, prepared))
        second = np.searchsorted(closer, self._closer(true, sums, prepared), side="right")
        return first, second

    def find(
        self, vectors: Vectors, query: Floats, k: int, kept: tuple[int, int], allowed: Flags | None = None
    ) -> Found:
        """Find the k best candidates of a (D,) unit vector; `kept` as `recall.choose_kept` measured it."""
        [found] = self._find_some(vectors, query[None], k, kept, allowed)
        return found

    def find_all(
        self, vectors: Vectors, queries: Floats, k: int, kept: tuple[int, int], *, progress: bool = False
    ) -> list[Found]:
        """Do what `find` does for each of (Q, D) queries; many share a pass over the rows."""
        found: list[Found] = []
        together = min(_TOGETHER, max(1, _ROOM // max(1, kept[0])))
        with progress_bar("recall", len(queries), shown=progress) as advance:
            for start in range(0, len(queries), together):
                some = queries[start : start + together]
                found += self._find_some(vectors, some, k, kept)
                advance(len(some), "")
        return found

    def _find_some(
        self, vectors: Vectors, queries: Floats, k: int, kept: tuple[int, int], allowed: Flags | None = None
    ) -> list[Found]:
        prepared = [self._prepare(query) for query in queries]
        kept = (max(k, kept[0]), max(k, kept[1]))
        sifted, found = self._first_sieve(prepared, kept[0], allowed), dict[int, Found]()

        def answer(start: int, stop: int) -> None:
            for number in range(start, stop):
                found[number] = rank(vectors, queries[number], k, _joined(sifted[number]).keep(kept[1]))

        in_threads(answer, len(queries), least=1)
        return [found[number] for number in range(len(queries))]

    def _first_sieve(self, queries: Sequence[_Query], count: int, allowed: Flags | None) -> list[list[_Sifted]]:
        """Find for each query at least `count` rows that come through the first sieve, in parts of all rows."""
        available = len(self.seconds) if allowed is None else int(np.count_nonzero(allowed))
        count = min(count, available)
        step = max(1, len(self.seconds) // _SAMPLE)
        # In all likelihood so many rows of a sample leave enough of all rows.
        most = count if step == 1 else int(count / step + 4 * (count / step) ** 0.5) + 1
        while True:
            limits = self._likely_limits(queries, step, most, allowed)
            sifted = self._sift(queries, limits, 2 * count / max(1, len(self.seconds)), allowed)
            if all(sum(len(part.rows) for part in parts) >= count for parts in sifted):
                return sifted
            most *= 2

    def _prepare(self, query: Floats) -> _Query:
        magnitudes = np.abs(query) * self.scale
        largest = _CLIP_RMS * float(np.sqrt(np.mean(magnitudes**2))) or 1.0
        weights = np.rint(np.minimum(magnitudes / largest, 1) * (2**_WEIGHT_BITS - 1)).astype(np.uint8)
        planes = _pack((weights >> np.arange(_WEIGHT_BITS, dtype=np.uint8)[:, None] & 1) > 0)
        return _Query(_pack(query[None] >= 0)[0], planes)

    def _scan(self, query: _Query) -> NDArray[np.uint32]:
        """Sum the weights whose signs differ, for each row (N,)."""
        from lamplit.retrieval.kernels import scan  # numba takes half a second to import

        sums = np.empty(len(self.seconds), np.uint32)

        def add_up(start: int, stop: int) -> None:
            scan(self.signs[start:stop], query.signs, query.weights, sums[self._rows(start, stop)])

        in_threads(add_up, len(self.signs), _LEAST)
        return sums

    def _likely_limits(
        self, queries: Sequence[_Query], step: int, count: int, allowed: Flags | None
    ) -> NDArray[np.uint64]:
        """Find for each query the sum that `count` rows of every `step`-th group have at most, (Q,)."""
        from lamplit.retrieval.kernels import likely_limits

        limits = np.empty(len(queries), np.uint64)

        def look(start: int, stop: int) -> None:
            signs, weights = _stacked(queries[start:stop])
            size = len(self.seconds)
            likely_limits(self.signs, size, _flags(allowed), signs, weights, step, count, limits[start:stop])

        in_threads(look, len(queries), least=1)
        return limits

    def _sift(
        self, queries: Sequence[_Query], limits: NDArray[np.uint64], share: float, allowed: Flags | None
    ) -> list[list[_Sifted]]:
        """Find for each query the rows whose sums are within its limit; at first there is room for a share of all."""
        from lamplit.retrieval.kernels import sift

        signs, weights = _stacked(queries)
        found: dict[int, list[_Sifted]] = {}  # by each thread, by its first group

        def look(start: int, stop: int) -> None:
            some = self._rows(start, stop)
            words = self.signs[start:stop], self.seconds[some], _flags(allowed)[some]
            room, numbers = int(share * (some.stop - some.start)) + 1024, np.empty(len(queries), np.int64)
            while True:
                rows, closer = np.empty((2, len(queries), room), np.uint32)
                if sift(*words, signs, weights, limits, rows, closer, numbers):
                    break
                room *= 4  # many rows are equal
            found[start] = [
                _Sifted(rows[query, :number] + np.uint32(some.start), closer[query, :number])
                for query, number in enumerate(numbers)
            ]

        in_threads(look, len(self.signs), _LEAST)
        return [list(parts) for parts in zip(*(found[start] for start in sorted(found)), strict=True)]

    def _rows(self, start: int, stop: int) -> slice:
        """Return the rows of some groups."""
        together = self.signs.shape[2]
        return slice(start * together, min(stop * together, len(self.seconds)))

    def _closer(self, rows: Rows, sums: NDArray[np.uint32], query: _Query) -> NDArray[np.uint32]:
        """Sum the weights whose bits differ, those of signs twice."""
        from lamplit.retrieval.kernels import look_closer

        closer = np.empty(len(rows), np.uint32)

        def add_up(start: int, stop: int) -> None:
            some = rows[start:stop]
            look_closer(sums[some], self.seconds, some, query.signs, query.weights, closer[start:stop])

        in_threads(add_up, len(closer), least=4096)
        return closer


def _joined(parts: Sequence[_Sifted]) -> _Sifted:
    return _Sifted(*map(np.concatenate, zip(*parts, strict=True)))


def _stacked(queries: Sequence[_Query]) -> tuple[Words, Words]:
    return np.stack([query.signs for query in queries]), np.stack([query.weights for query in queries])


def _group(words: Words, together: int) -> Words:
    """Bring (n, W) words to (g, W, R) for R rows together."""
    size, width = words.shape
    full = np.zeros((-(-size // together) * together, width), np.uint64)
    full[:size] = words
    return full.reshape(-1, together, width).swapaxes(1, 2)


def _flags(allowed: Flags | None) -> Flags:
    return np.empty(0, bool) if allowed is None else allowed


def _pack(flags: NDArray[np.bool_]) -> Words:
    """Pack (n, D) flags into (n, W) words; the last word is filled up with zeros."""
    packed = np.packbits(flags, axis=1, bitorder="little")
    padded = np.zeros((len(flags), 8 * -(-flags.shape[1] // 64)), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)
