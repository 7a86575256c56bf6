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
_STRIDE = _BLOCK + 8  # between them; a power of two would put the same word of all rows into few places of that cache
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
    turned, sums = np.empty((words.shape[1], _STRIDE), np.uint64), np.empty(_BLOCK, np.uint64)
    for start in range(0, words.shape[0], _BLOCK):
        size = min(_BLOCK, words.shape[0] - start)
        _turn(words, start, size, turned)
        _add_up(turned, size, signs, weights, sums)
        part = out[start : start + size]
        for i in range(size):
            part[i] = sums[i]


@_compile()
def likely_limits(words: Any, allowed: Any, signs: Any, weights: Any, step: int, count: int, limits: Any) -> None:
    """Write for each of several queries the `count`-th smallest sum of `scan` among every `step`-th block of rows.

    (N, W) words, (N,) flags of the rows to look at or none for all, (Q, W) signs and (Q, 3, W) weights in; (Q,) out.
    """
    turned, sums = np.empty((words.shape[1], _STRIDE), np.uint64), np.empty(_BLOCK, np.uint64)
    counts = np.zeros((len(signs), 64 * 7 * words.shape[1] + 1), np.int64)
    for start in range(0, words.shape[0], step * _BLOCK):
        size = min(_BLOCK, words.shape[0] - start)
        _turn(words, start, size, turned)
        for query in range(len(signs)):
            _add_up(turned, size, signs[query], weights[query], sums)
            its_counts = counts[query]
            for i in range(size):
                if len(allowed) == 0 or allowed[start + i]:
                    its_counts[sums[i]] += 1
    for query in range(len(signs)):
        limits[query] = _where_reached(counts[query], count)


@_compile()
def sift(
    words: Any, finer: Any, allowed: Any, signs: Any, weights: Any, limits: Any, rows: Any, sums: Any, closer: Any,
    found: Any,
) -> bool:  # fmt: skip
    """Find the rows whose sums of `scan` are within the limits of several queries; a block is read once for all.

    (N, W) words of signs and of second bits, (N,) flags of the rows to look at or none for all, (Q, W) signs,
    (Q, 3, W) weights and (Q,) limits in; (Q, room) rows, ascending, their sums, and those of both bits, as
    `look_closer` gives them, and (Q,) how many there are out. Returns whether there was room for all.
    """
    turned, block_sums = np.empty((words.shape[1], _STRIDE), np.uint64), np.empty(_BLOCK, np.uint64)
    passing = np.empty(_BLOCK + 1, np.int64)
    found[:] = 0
    for start in range(0, words.shape[0], _BLOCK):
        size = min(_BLOCK, words.shape[0] - start)
        _turn(words, start, size, turned)
        for query in range(len(signs)):
            its_signs, its_weights, number = signs[query], weights[query], found[query]
            if number + size > rows.shape[1]:
                return False
            _add_up(turned, size, its_signs, its_weights, block_sums)
            for k in range(_within(block_sums, size, limits[query], passing)):
                i = passing[k]
                row = start + i
                if len(allowed) == 0 or allowed[row]:
                    rows[query, number], sums[query, number] = row, block_sums[i]
                    closer[query, number] = 2 * block_sums[i] + _weigh(finer, row, its_signs, its_weights)
                    number += 1
            found[query] = number
    return True


@_compile()
def look_closer(sums: Any, finer: Any, rows: Any, signs: Any, weights: Any, out: Any) -> None:
    """Add the same sum over the second bits of some rows to twice what `scan` found for them.

    (n,) sums of `scan`, (N, W) words, (n,) rows, signs and weights of `scan` in; (n,) sums out.
    """
    for i in range(len(rows)):
        out[i] = 2 * np.uint64(sums[i]) + _weigh(finer, rows[i], signs, weights)


@_compile()
def smallest(rows: Any, sums: Any, closer: Any, first: int, second: int) -> int:
    """Keep the rows with the `first` smallest sums and, of these, with the `second` smallest closer ones.

    All that equal the last one stay, too. The kept ones of (n,) rows come first, in their order; returns how many.
    """
    left = _keep(rows, sums, closer, sums, len(rows), first)
    return int(_keep(rows, sums, closer, closer, left, second))


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
def _within(sums: Any, size: int, limit: Any, places: Any) -> Any:
    """Write the places of the sums up to the limit; return how many there are. Nothing here has to be guessed."""
    number = np.uint64(0)
    for i in range(size):
        places[number] = i
        number += np.uint64(sums[i] <= limit)
    return number


@_compile()
def _weigh(words: Any, row: int, signs: Any, weights: Any) -> Any:
    total = np.uint64(0)
    for word in range(len(signs)):
        differ = words[row, word] ^ signs[word]
        total += _count_ones(differ & weights[0, word])
        total += _count_ones(differ & weights[1, word]) << _1
        total += _count_ones(differ & weights[2, word]) << _2
    return total


@_compile()
def _where_reached(counts: Any, count: int) -> int:
    """Return the first place where the counts up to it reach `count`, or the last one."""
    reached = 0
    for place in range(len(counts)):
        reached += counts[place]
        if reached >= count:
            return place
    return len(counts) - 1


@_compile()
def _keep(rows: Any, sums: Any, closer: Any, values: Any, number: int, count: int) -> int:
    """Move the rows with the `count` smallest of `values`, one of the other two, to the front."""
    if number <= count:
        return number
    counts = np.zeros(values[:number].max() + 1, np.int64)
    for i in range(number):
        counts[values[i]] += 1
    largest, left = _where_reached(counts, count), 0
    for i in range(number):
        if values[i] <= largest:
            rows[left], sums[left], closer[left] = rows[i], sums[i], closer[i]
            left += 1
    return left


@_compile()
def _widen(half: Any) -> Any:
    bits = np.uint32(half)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    return _as_float(magnitude | ((bits & np.uint32(0x8000)) << np.uint32(16)))
