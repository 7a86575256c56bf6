"""The inner loops of search, compiled by numba at their first call and kept for later processes.

They release the lock, so threads run them at once. What is read of all rows lies as it is read: `GROUP` rows together,
first the first word of each, then the second, so that the processor adds up several rows at once and memory is read
from one end to the other. Shapes: N rows in G groups of R = `GROUP`, D width, W words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])
GROUP = 32  # rows whose words lie together
_1 = np.uint64(1)
_TOGETHER = 8  # rows in a vector
_AHEAD = 4  # groups, or rows of vectors, that are fetched before they are needed
_BITS_AHEAD = 16  # the same of rows of bits, which lie anywhere
_MANY = 8  # queries, of which one or another asks for the second bits of many a row
_ALL = np.uint64((1 << GROUP) - 1)
_LINE = 64  # bytes that are fetched together
_WORD, _INT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_WORDS, _FOUR_WORDS = ir.VectorType(_WORD, _TOGETHER), ir.VectorType(_WORD, 4)
_NOTHING = ir.Constant(_WORDS, [0] * _TOGETHER)
_LIES = "these arrays are read as they lie in memory, row after row"


def _compile(*, fastmath: bool = False) -> Callable[[Function], Function]:
    def compile_one(function: Function) -> Function:
        try:
            compiled: Function = njit(nogil=True, cache=True, fastmath=fastmath)(function)
        except RuntimeError:  # neither this folder nor the user's cache can be written to
            compiled = njit(nogil=True, fastmath=fastmath)(function)
        return compiled

    return compile_one


@intrinsic  # type: ignore[untyped-decorator]
def _add_up(_: Any, groups: Any, group: Any, ahead: Any, signs: Any, weights: Any, limit: Any, sums: Any) -> Any:
    """Do what `scan` does for one group, while the processor fetches the group `ahead`: (R,) sums out.

    Returns a word of which bit i is set if the sum of row i is at most `limit`.

    Written out with vectors, because a compiler that is left alone makes a loop that is fast or slow as the number of
    rows happens to suit it, and leaves the sums in memory.
    """
    if any(array.layout != "C" for array in (groups, signs, weights, sums)):
        raise TypeError(_LIES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        def array(place: int) -> Any:
            return context.make_array(signature.args[place])(context, builder, arguments[place])

        def element(data: Any, place: Any, kind: Any = _WORD) -> Any:
            return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())

        def everywhere(word: Any) -> Any:
            first = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), word, _INT(0))
            return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT, _TOGETHER), None))

        def repeated(data: Any, place: Any) -> Any:
            return everywhere(builder.load(element(data, place)))

        words, query, planes, out = (array(place).data for place in (0, 3, 4, 6))
        _, num_words, num_rows = cgutils.unpack_tuple(builder, array(0).shape)
        size = builder.mul(num_words, num_rows)
        these, later = (builder.gep(words, [builder.mul(arguments[place], size)]) for place in (1, 2))
        count_ones = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_WORDS, [_WORDS]), f"llvm.ctpop.v{_TOGETHER}i64"
        )
        vectors = [_WORD(_TOGETHER * vector) for vector in range(GROUP // _TOGETHER)]
        before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("word", "sums"))
        builder.branch(loop)
        builder.position_at_end(loop)
        word = builder.phi(_WORD)
        counts = [[builder.phi(_WORDS) for _ in range(3)] for _ in vectors]
        sign = repeated(query, word)
        weight = [repeated(planes, builder.add(builder.mul(_WORD(bit), num_words), word)) for bit in range(3)]
        added = []
        for first, its_counts in zip(vectors, counts, strict=True):
            place = builder.add(builder.mul(word, num_rows), first)
            _prefetch(builder, element(later, place, _BYTE))  # one by one: many at once hold up what is read now
            differ = builder.xor(builder.load(element(these, place, _WORDS), align=8), sign)
            ones = [builder.call(count_ones, [builder.and_(differ, plane)]) for plane in weight]
            added.append([builder.add(count, more) for count, more in zip(its_counts, ones, strict=True)])
        following = builder.add(word, _WORD(1))
        builder.cbranch(builder.icmp_unsigned("<", following, num_words), loop, after)
        for value, start, end in ((word, _WORD(0), following), *zip(chain(*counts), repeat(_NOTHING), chain(*added))):
            value.add_incoming(start, before)
            value.add_incoming(end, loop)
        builder.position_at_end(after)
        within, most = _WORD(0), everywhere(arguments[5])
        for first, (total, twos, fours) in zip(vectors, added, strict=True):
            for bit, count in ((1, twos), (2, fours)):
                total = builder.add(total, builder.shl(count, ir.Constant(_WORDS, [bit] * _TOGETHER)))
            builder.store(total, element(out, first, _WORDS), align=8)
            bits = builder.bitcast(builder.icmp_unsigned("<=", total, most), ir.IntType(_TOGETHER))
            within = builder.or_(within, builder.shl(builder.zext(bits, _WORD), first))
        return within

    return types.uint64(groups, types.intp, types.intp, signs, weights, types.uint64, sums), generate


@intrinsic  # type: ignore[untyped-decorator]
def _weigh(_: Any, finer: Any, row: Any, signs: Any, weights: Any) -> Any:
    """Sum the weights of 3 bits for the second bits of one of (N, W) rows that differ from the signs.

    Four words at once, then those that are left: rows of 512 dimensions have eight.
    """
    if any(array.layout != "C" for array in (finer, signs, weights)):
        raise TypeError(_LIES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        arrays = [context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 2, 3)]
        num_words = cgutils.unpack_tuple(builder, arrays[0].shape)[1]
        words = builder.gep(arrays[0].data, [builder.mul(arguments[1], num_words)])
        signs, planes = arrays[1].data, arrays[2].data

        def sums(kind: Any, start: Any, stop: Any, step: int, ones: Callable[[Any], Any], total: Any) -> Any:
            def read(data: Any, place: Any) -> Any:
                return builder.load(builder.bitcast(builder.gep(data, [place]), kind.as_pointer()), align=8)

            held = cgutils.alloca_once_value(builder, total)
            with cgutils.for_range_slice(builder, start, stop, _WORD(step), _WORD) as (word, _):
                differ = builder.xor(read(words, word), read(signs, word))
                for bit in range(3):
                    plane = read(planes, builder.add(builder.mul(_WORD(bit), num_words), word))
                    shift = bit if step == 1 else [bit] * step
                    more = builder.shl(ones(builder.and_(differ, plane)), ir.Constant(kind, shift))
                    builder.store(builder.add(builder.load(held), more), held)
            return builder.load(held)

        def function(name: str, out: Any) -> Any:
            return cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(out, [_FOUR_WORDS]), f"llvm.{name}.v4i64"
            )

        count_ones, add_up = function("ctpop", _FOUR_WORDS), function("vector.reduce.add", _WORD)
        whole = builder.and_(num_words, _WORD(~3 & 2**64 - 1))
        nothing = ir.Constant(_FOUR_WORDS, [0] * 4)
        by_four = sums(_FOUR_WORDS, _WORD(0), whole, 4, lambda bits: builder.call(count_ones, [bits]), nothing)
        return sums(_WORD, whole, num_words, 1, builder.ctpop, builder.call(add_up, [by_four]))

    return types.uint64(finer, types.intp, signs, weights), generate


@intrinsic  # type: ignore[untyped-decorator]
def _lowest_bit(_: Any, word: Any) -> Any:
    """Number of zeros below the lowest one of a word."""
    return types.uint64(types.uint64), lambda _, builder, signature, arguments: builder.cttz(
        arguments[0], ir.IntType(1)(1)
    )


@intrinsic  # type: ignore[untyped-decorator]
def _fetch(_: Any, rows: Any, row: Any) -> Any:
    """Let the processor fetch one of (n, D) rows from memory while it works on what is before it."""
    if rows.layout != "C":
        raise TypeError(_LIES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        array = context.make_array(rows)(context, builder, arguments[0])
        size = builder.mul(array.itemsize, cgutils.unpack_tuple(builder, array.shape)[1])
        start = builder.gep(builder.bitcast(array.data, _BYTE.as_pointer()), [builder.mul(arguments[1], size)])
        with cgutils.for_range_slice(builder, _WORD(0), size, _WORD(_LINE), _WORD) as (byte, _):
            _prefetch(builder, builder.gep(start, [byte]))
        return context.get_dummy_value()

    return types.void(rows, types.intp), generate


def _prefetch(builder: Any, byte: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [byte, _INT(0), _INT(3), _INT(1)])  # data, to be read, and worth keeping


@intrinsic  # type: ignore[untyped-decorator]
def _widen(_: Any, half: Any) -> Any:
    """Turn the bits of a finite float16 into a float32, without a branch.

    Its exponent is moved by 112. Numbers below float16's normal range have none: as the fraction of 2^-14 and a bit,
    they are what is left without the 2^-14. To scale them instead would take many times as long.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        def read(bits: Any) -> Any:
            return builder.bitcast(bits, ir.FloatType())

        bits = builder.zext(arguments[0], _INT)
        magnitude = builder.shl(builder.and_(bits, _INT(0x7FFF)), _INT(13))
        normal = read(builder.add(magnitude, _INT(112 << 23)))
        small = builder.fsub(read(builder.add(magnitude, _INT(113 << 23))), ir.FloatType()(2.0**-14))
        value = builder.select(builder.icmp_unsigned("<", magnitude, _INT(1 << 23)), small, normal)
        sign = builder.shl(builder.and_(bits, _INT(0x8000)), _INT(16))
        return read(builder.or_(builder.bitcast(value, _INT), sign))

    return types.float32(types.uint16), generate


@_compile()
def scan(groups: Any, signs: Any, weights: Any, out: Any) -> None:
    """Sum the query's weights of 3 bits for the bits of a row that differ from its signs.

    (G, W, R) words, (W,) signs and (3, W) bit planes of the weights, lowest first, in; (N,) sums out.
    """
    sums = np.empty(GROUP, np.uint64)
    for group in range(groups.shape[0]):
        _add_up(groups, group, min(group + _AHEAD, len(groups) - 1), signs, weights, np.uint64(0), sums)
        part = out[group * GROUP : (group + 1) * GROUP]
        for i in range(len(part)):
            part[i] = sums[i]


@_compile()
def look_closer(sums: Any, finer: Any, rows: Any, signs: Any, weights: Any, out: Any) -> None:
    """Add the same sum over the second bits of some rows to twice what `scan` found for them.

    (n,) sums of `scan`, (N, W) words, (n,) rows, signs and weights of `scan` in; (n,) sums out.
    """
    for i in range(len(rows)):
        _fetch(finer, rows[min(i + _BITS_AHEAD, len(rows) - 1)])
        out[i] = 2 * np.uint64(sums[i]) + _weigh(finer, np.int64(rows[i]), signs, weights)


@_compile()
def likely_limits(
    groups: Any, size: int, allowed: Any, signs: Any, weights: Any, step: int, count: int, limits: Any
) -> None:
    """Write for each of several queries the `count`-th smallest sum of `scan` among every `step`-th group of rows.

    (G, W, R) words of `size` rows, (N,) flags of the rows to look at or none for all, (Q, W) signs and (Q, 3, W)
    weights in; (Q,) out.
    """
    sums = np.empty(GROUP, np.uint64)
    counts = np.zeros((len(signs), 64 * 7 * groups.shape[1] + 1), np.int64)
    for group in range(0, groups.shape[0], step):
        start = group * GROUP
        for query in range(len(signs)):
            later = min(group + step, len(groups) - 1)
            _add_up(groups, group, later, signs[query], weights[query], np.uint64(0), sums)
            its_counts = counts[query]
            for i in range(min(GROUP, size - start)):
                if len(allowed) == 0 or allowed[start + i]:
                    its_counts[sums[i]] += 1
    for query in range(len(signs)):
        limits[query] = _where_reached(counts[query], count)


@_compile()
def sift(
    groups: Any, finer: Any, allowed: Any, signs: Any, weights: Any, limits: Any, rows: Any, closer: Any, found: Any
) -> bool:
    """Find the rows whose sums of `scan` are within the limits of several queries; a group is read once for all.

    (G, W, R) words of signs and (N, W) of second bits, (N,) flags of the rows to look at or none for all, (Q, W)
    signs, (Q, 3, W) weights and (Q,) limits in; (Q, room) rows, ascending, their sums of both bits, as `look_closer`
    gives them, and (Q,) how many there are out. Returns whether there was room for all.
    """
    sums = np.empty(GROUP, np.uint64)
    found[:] = 0
    at_once = len(signs) >= _MANY
    for group in range(groups.shape[0]):
        start = group * GROUP
        size = min(GROUP, len(finer) - start)
        full = _ALL if size == GROUP else (_1 << np.uint64(size)) - _1
        later = min(group + _AHEAD, len(groups) - 1)
        if at_once:
            for later_row in range(later * GROUP, min((later + 1) * GROUP, len(finer))):
                _fetch(finer, later_row)
        for query in range(len(signs)):
            number = found[query]
            if number + size > rows.shape[1]:
                return False
            left = full & _add_up(groups, group, later, signs[query], weights[query], limits[query], sums)
            while left:
                i = _lowest_bit(left)
                left &= left - _1
                row = start + np.int64(i)
                if len(allowed) == 0 or allowed[row]:
                    rows[query, number], closer[query, number] = row, sums[i]
                    if at_once:
                        closer[query, number] = 2 * sums[i] + _weigh(finer, row, signs[query], weights[query])
                    number += 1
            found[query] = number
    for query in range(0 if at_once else len(signs)):  # here several rows that lie anywhere are waited for at once
        those = slice(0, found[query])
        look_closer(closer[query, those], finer, rows[query, those], signs[query], weights[query], closer[query, those])
    return True


@_compile()
def smallest(rows: Any, closer: Any, count: int) -> int:
    """Keep the `count` of (n,) rows with the smallest sums, and all that equal the last one.

    They come first, in their order; returns how many.
    """
    if len(rows) <= count:
        return len(rows)
    counts = np.zeros(closer.max() + 1, np.int64)
    for value in closer:
        counts[value] += 1
    largest, left = _where_reached(counts, count), 0
    for i in range(len(rows)):
        if closer[i] <= largest:
            rows[left] = rows[i]
            left += 1
    return left


@_compile(fastmath=True)
def products(halves: Any, query: Any, out: Any) -> None:
    """Multiply (n, D) rows of float16, given as their 16 bits, by a (D,) float32 query: (n,) float32 out."""
    for row in range(len(halves)):
        out[row] = _product(halves, row, query)


@_compile(fastmath=True)
def products_of(rows: Any, halves: Any, query: Any, out: Any) -> None:
    """Do the same with some rows of many; to copy them first would take longer than to multiply."""
    for place in range(len(rows)):
        _fetch(halves, rows[min(place + _AHEAD, len(rows) - 1)])
        out[place] = _product(halves, rows[place], query)


@_compile()
def widen(halves: Any, out: Any) -> None:
    """Turn (n, D) float16, given as their 16 bits, into float32 (numpy takes several times as long)."""
    for row in range(halves.shape[0]):
        for column in range(halves.shape[1]):
            out[row, column] = _widen(halves[row, column])


@_compile(fastmath=True)
def _product(halves: Any, row: int, query: Any) -> Any:
    total = np.float32(0)
    for column in range(halves.shape[1]):
        total += _widen(halves[row, column]) * query[column]
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
