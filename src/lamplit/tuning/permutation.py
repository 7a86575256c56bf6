"""One endless stream of permutations in constant memory: what comes at a place is a function of seed and place alone.

A file that is larger than memory is slow to read in such an order: a page for each row. `windows` is a stream that
comes from few places at a time: blocks of neighbouring numbers are shuffled, then the numbers of some thousand blocks.

Each pass over N things is a Feistel network on the bits of 0 to N - 1 (Luby & Rackoff, 1988). It permutes the next
power of two; a number that falls outside 0 to N - 1 goes through it again until it falls inside (cycle walking, Black
& Rogaway, 2002), which is less than once more on average. The order is part of what a seed means: it must not change.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # neighbouring numbers that stay in one window: 256 KB of 512 numbers in half precision
WINDOW = 1024 * BLOCK  # numbers that are shuffled among each other
_ROUNDS = 8  # a digest of blake2b has as many keys of 64 bits
_LEAST_BITS = 6  # fewer have too few orders to choose from
_TABLE_BITS = 10  # up to here it is faster to permute all numbers once than some of them again and again
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64 (Steele et al., 2014)


def stream(start: int, stop: int, size: int, seed: int) -> NDArray[np.int64]:
    """Return what comes at the places `start` to `stop` of the stream: (stop - start,) numbers below `size`.

    Args:
        start: the first place, from 0; pass p has the places from p * size to (p + 1) * size.
        stop: the place behind the last.
        size: N; each pass has 0 to N - 1 once each.
        seed: of the stream.

    Example:
        >>> stream(0, 4, 4, seed=0), stream(4, 8, 4, seed=0)  # two passes
    """
    parts = [np.empty(0, np.int64)]
    for number in range(start // size, -(-stop // size)):
        first, last = max(start - number * size, 0), min(stop - number * size, size)
        parts.append(permute(np.arange(first, last, dtype=np.uint64), size, seed, number))
    return np.concatenate(parts)


def windows(start: int, stop: int, size: int, seed: int) -> NDArray[np.int64]:
    """Return what comes at the places `start` to `stop` of the stream in windows; arguments as in `stream`."""
    parts = [np.empty(0, np.int64)]
    while start < stop:
        first, last = window_at(start, size)
        number, until = start // size, min(stop, last)
        places = np.arange(start - first, until - first, dtype=np.uint64)
        mixed = permute(places, last - first, seed, f"{number} {first % size}") + first % size
        parts.append(_in_blocks(mixed, size, seed, number))
        start = until
    return np.concatenate(parts)


def window_at(place: int, size: int) -> tuple[int, int]:
    """Return the first place of the window that a place lies in, and the one behind its last."""
    first = place - place % size % WINDOW
    return first, min(first + WINDOW, (place // size + 1) * size)


def blocks_of_window(place: int, size: int, seed: int) -> NDArray[np.int64]:
    """Return the first number of each block of the window that a place lies in, (K,) ascending.

    What is left over behind the last whole block is a block of its own.
    """
    first, last = window_at(place, size)
    return np.sort(_in_blocks(np.arange(first % size, first % size + last - first, BLOCK), size, seed, place // size))


def _in_blocks(places: NDArray[np.int64], size: int, seed: int, number: int) -> NDArray[np.int64]:
    """Return what comes at places of a pass in which whole blocks are shuffled."""
    blocks, inside = np.divmod(places, BLOCK)
    is_whole = blocks < size // BLOCK
    found = places.copy()
    if is_whole.any():
        shuffled = permute(blocks[is_whole].astype(np.uint64), size // BLOCK, seed, f"{number} blocks")
        found[is_whole] = shuffled * BLOCK + inside[is_whole]
    return found


def permute(places: NDArray[np.uint64], size: int, seed: int, number: int | str) -> NDArray[np.int64]:
    """Return what comes at each place, (K,) below `size`, of pass `number` of a seed: a bijection of 0 to size - 1."""
    bits = max((size - 1).bit_length(), _LEAST_BITS)
    digest = blake2b(f"{seed} {number}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8").astype(np.uint64)
    table = _encrypt(np.arange(1 << bits, dtype=np.uint64), bits, keys) if bits <= _TABLE_BITS else None
    found, inside = places.copy(), np.zeros(len(places), bool)
    while not inside.all():
        walking = found[~inside]
        found[~inside] = _encrypt(walking, bits, keys) if table is None else table[walking]
        inside = found < size
    return found.astype(np.int64)


def _encrypt(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute numbers of `bits` bits: in turn, one half of each changes by a function of its other half."""
    width = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & masks[0], values >> width
    for key_low, key_high in zip(keys[::2], keys[1::2], strict=True):
        low ^= _mixed(high ^ key_low) & masks[0]
        high ^= _mixed(low ^ key_high) & masks[1]
    return low | (high << width)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, multiplier in zip((np.uint64(30), np.uint64(27)), _MULTIPLIERS, strict=True):
        values = (values ^ (values >> shift)) * multiplier
    return values ^ (values >> np.uint64(31))
