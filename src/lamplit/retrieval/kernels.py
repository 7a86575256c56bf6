"""The inner loops of search, compiled by numba at their first call and kept for later processes.

They release the lock, so threads run them at once. Shapes: N rows, D width, W words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])
_BLOCK = 512  # rows whose turned words stay in a core's first cache
_1, _2 = np.uint64(1), np.uint64(2)
_TO_HALF = np.float32(2.0**112)  # between the exponents of a float16's bits inside a float32, and its own


def _compile(*, fastmath: bool = False) -> Callable[[Function], Function]:
    def compile_one(function: Function) -> Function:
        try:
            compiled: Function = njit(nogil=True, cache=True, fastmath=fastmath)(function)
        except RuntimeError:  # neither this folder nor the user's cache can be written to
            compiled = njit(nogil=True, fastmath=fastmath)(function)
        return compiled

    return compile_one


@intrinsic  # type: ignore[untyped-decorator]
def _count_ones(_: Any, word: Any) -> Any:
    """Population count, one instruction on most processors."""
    return types.uint64(types.uint64), lambda _, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(_: Any, bits: Any) -> Any:
    """Read 32 bits as a float32."""
    return types.float32(types.uint32), lambda _, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.FloatType()
    )


@_compile()
def scan(words: Any, signs: Any, weights: Any, out: Any) -> None:
    """Sum the query's weights of 3 bits for the bits of a row that differ from its signs.

    (N, W) words, (W,) signs and (3, W) bit planes of the weights, lowest first, in; (N,) sums out.
    """
    turned, sums = np.empty((words.shape[1], _BLOCK), np.uint64), np.empty(_BLOCK, np.uint64)
    for start in range(0, words.shape[0], _BLOCK):
        size = min(_BLOCK, words.shape[0] - start)
        _turn(words, start, size, turned)
        _add_up(turned, size, signs, weights, sums)
        for i in range(size):
            out[start + i] = sums[i]


@_compile()
def sift(words: Any, allowed: Any, signs: Any, weights: Any, count: int, rows: Any, sums: Any, found: Any) -> bool:
    """Find the rows with the `count` smallest sums of `scan`, and all that equal the last of them, for several queries.

    A block of rows is read once for all queries. A query's room is emptied of what is not among the smallest so far
    whenever it is full.

    (N, W) words, (N,) flags of the rows to look at or none for all, (Q, W) signs and (Q, 3, W) weights in; (Q, room)
    rows, ascending, their sums, and (Q,) how many there are out. Returns whether there was room for all.
    """
    turned, block_sums = np.empty((words.shape[1], _BLOCK), np.uint64), np.empty(_BLOCK, np.uint64)
    limits, room = np.full(len(signs), 2**62, np.uint64), rows.shape[1]
    found[:] = 0
    for start in range(0, words.shape[0], _BLOCK):
        size = min(_BLOCK, words.shape[0] - start)
        _turn(words, start, size, turned)
        for query in range(len(signs)):
            if found[query] + size > room:
                found[query], limits[query] = _smallest(rows[query], sums[query], found[query], count, limits[query])
                if found[query] + size > room:
                    return False
            _add_up(turned, size, signs[query], weights[query], block_sums)
            number, limit = found[query], limits[query]
            for i in range(size):
                if block_sums[i] <= limit and (len(allowed) == 0 or allowed[start + i]):
                    rows[query, number], sums[query, number] = start + i, block_sums[i]
                    number += 1
            found[query] = number
    for query in range(len(signs)):
        found[query], _ = _smallest(rows[query], sums[query], found[query], count, limits[query])
    return True


@_compile()
def look_closer(sums: Any, finer: Any, rows: Any, signs: Any, weights: Any, out: Any) -> None:
    """Add the same sum over the second bits of some rows to twice what `scan` found for them.

    (n,) sums of `scan`, (N, W) words, (n,) rows, signs and weights of `scan` in; (n,) sums out.
    """
    for i in range(len(rows)):
        ones, twos, fours = np.uint64(0), np.uint64(0), np.uint64(0)
        for word in range(finer.shape[1]):
            differ = finer[rows[i], word] ^ signs[word]
            ones += _count_ones(differ & weights[0, word])
            twos += _count_ones(differ & weights[1, word])
            fours += _count_ones(differ & weights[2, word])
        out[i] = 2 * np.uint64(sums[i]) + ones + 2 * twos + 4 * fours


@_compile(fastmath=True)
def products(halves: Any, query: Any, out: Any) -> None:
    """Multiply (n, D) rows of float16, given as their 16 bits, by a (D,) float32 query: (n,) float32 out."""
    for row in range(halves.shape[0]):
        total = np.float32(0)
        for column in range(halves.shape[1]):
            total += _widen(halves[row, column]) * query[column]
        out[row] = total * _TO_HALF


@_compile()
def widen(halves: Any, out: Any) -> None:
    """Turn (n, D) float16, given as their 16 bits, into float32 (numpy takes several times as long)."""
    for row in range(halves.shape[0]):
        for column in range(halves.shape[1]):
            out[row, column] = _widen(halves[row, column]) * _TO_HALF


@_compile()
def _turn(words: Any, start: int, size: int, turned: Any) -> None:
    """Write the words of `size` rows to (W, _BLOCK) words, so that the same word of many rows lies side by side."""
    for row in range(size):
        for word in range(words.shape[1]):
            turned[word, row] = words[start + row, word]


@_compile()
def _add_up(turned: Any, size: int, signs: Any, weights: Any, sums: Any) -> None:
    """Do what `scan` does for turned words; the compiler makes it work on several rows at once."""
    sums[:size] = 0
    for word in range(len(signs)):
        sign, one, two, four = signs[word], weights[0, word], weights[1, word], weights[2, word]
        for row in range(size):
            differ = turned[word, row] ^ sign
            sums[row] += (
                _count_ones(differ & one) + (_count_ones(differ & two) << _1) + (_count_ones(differ & four) << _2)
            )


@_compile()
def _smallest(rows: Any, sums: Any, number: int, count: int, limit: Any) -> Any:
    """Keep of `number` rows those with the `count` smallest sums; return how many are left, and the largest sum."""
    if number <= count:
        return number, limit
    counts = np.zeros(sums[:number].max() + 1, np.int64)
    for i in range(number):
        counts[sums[i]] += 1
    reached, largest = counts[0], 0
    while reached < count:
        largest += 1
        reached += counts[largest]
    left = 0
    for i in range(number):
        if sums[i] <= largest:
            rows[left], sums[left] = rows[i], sums[i]
            left += 1
    return left, np.uint64(largest)


@_compile()
def _widen(half: Any) -> Any:
    bits = np.uint32(half)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    return _as_float(magnitude | ((bits & np.uint32(0x8000)) << np.uint32(16)))
