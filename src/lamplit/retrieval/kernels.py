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
    for row in range(words.shape[0]):
        out[row] = _weigh(words, row, signs, weights)


@_compile()
def look_closer(distances: Any, finer: Any, rows: Any, signs: Any, weights: Any, out: Any) -> None:
    """Add the same sum over the second bits of some rows to twice what `scan` found for them.

    (N,) sums of `scan`, (N, W) words, (n,) rows, signs and weights of `scan` in; (n,) sums out.
    """
    for i in range(len(rows)):
        row = rows[i]
        out[i] = 2 * np.uint64(distances[row]) + _weigh(finer, row, signs, weights)


@_compile()
def count_values(values: Any, counts: Any) -> None:
    """Count how often each of (N,) small numbers occurs."""
    for value in values:
        counts[value] += 1


@_compile()
def rows_within(values: Any, limit: Any, out: Any) -> int:
    """Write the rows of the values up to `limit` into `out`; return how many there are."""
    found = 0
    for row in range(len(values)):
        if values[row] <= limit:
            out[found] = row
            found += 1
    return found


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
def _weigh(words: Any, row: int, signs: Any, weights: Any) -> Any:
    ones, twos, fours = np.uint64(0), np.uint64(0), np.uint64(0)
    for word in range(words.shape[1]):
        differ = words[row, word] ^ signs[word]
        ones += _count_ones(differ & weights[0, word])
        twos += _count_ones(differ & weights[1, word])
        fours += _count_ones(differ & weights[2, word])
    return ones + 2 * twos + 4 * fours


@_compile()
def _widen(half: Any) -> Any:
    bits = np.uint32(half)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    return _as_float(magnitude | ((bits & np.uint32(0x8000)) << np.uint32(16)))
