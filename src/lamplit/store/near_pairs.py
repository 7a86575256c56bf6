"""All pairs of vectors with a cosine above a limit, exactly, of which most pairs are never multiplied.

The vectors are turned so that few coordinates hold most of their length. What the others add to a cosine is at most the
product of the two lengths that are left. So if `a` and `b` are those coordinates of two vectors, and `r` and `s` the
lengths of what is left, `(a, r) · (b, s)` is at least their cosine. A pair goes through sieves of 32 and 128 numbers,
and only what may be near is multiplied in full.

Shapes: M vectors, D width, S of a sieve.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SIEVES = (32, 128)  # numbers of a vector; used where they are at most half of its width
_SAMPLE = 4096  # vectors that tell how to turn
_BLOCK = 8192  # vectors that are turned at once
_SLACK = 1e-5  # more than rounding moves a bound or a cosine
_DENSE = 0.02  # share of a tile above which the full product is faster than one pair after the other
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]  # lower rows, higher rows, cosines


def near_pairs(halves: Tensor, limit: float, chunk_size: int) -> Iterator[tuple[int, Pairs]]:
    """Yield the pairs of (M, D) float16 vectors with a cosine of at least `limit`, each pair once.

    Vectors must be finite and not zero; their lengths do not count.

    Yields:
        How many vectors are done since the last time, and pairs of them with all others.
    """
    sieves = _sieves(halves)
    scale = torch.empty(len(halves))
    for start in range(0, len(halves), _BLOCK):
        scale[start : start + _BLOCK] = 1 / halves[start : start + _BLOCK].float().norm(dim=1)
    chunks = [slice(start, start + chunk_size) for start in range(0, len(halves), chunk_size)]
    memory = torch.empty(chunk_size * chunk_size)
    for number, rows in enumerate(chunks):
        found = [_tile(halves, scale, sieves, rows, others, memory, limit) for others in chunks[number:]]
        left, right, cosines = (np.concatenate(parts) for parts in zip(*found, strict=True))
        yield len(scale[rows]), (left, right, cosines)


def _tile(
    halves: Tensor, scale: Tensor, sieves: list[Tensor], rows: slice, others: slice, memory: Tensor, limit: float
) -> Pairs:
    """Return the near pairs of one chunk of vectors with another, or within one."""
    for sieve in sieves[:1]:
        bounds = _product(sieve[rows], sieve[others], memory)
        left, right = _places(bounds, limit - _SLACK, rows, others)
        if len(left) > _DENSE * bounds.size:
            break
        for finer in sieves[1:]:
            kept = (finer[left] * finer[right]).sum(1).numpy() >= limit - _SLACK
            left, right = left[kept], right[kept]
        parts = np.array_split(np.stack([left, right]), len(left) // _BLOCK + 1, axis=1)
        cosines = np.concatenate([_cosines(halves, scale, *part) for part in parts])
        near = cosines >= limit
        return left[near], right[near], cosines[near]
    first, second = (halves[part].float() * scale[part, None] for part in (rows, others))
    cosines = _product(first, second, memory)
    left, right = _places(cosines, limit, rows, others)
    return left, right, cosines[left - rows.start, right - others.start]


def _product(left: Tensor, right: Tensor, memory: Tensor) -> NDArray[np.float32]:
    """Multiply (m, S) with (n, S) vectors: (m, n), which the next product overwrites."""
    tile = memory[: len(left) * len(right)].view(len(left), len(right))
    torch.mm(left, right.T, out=tile)
    product: NDArray[np.float32] = tile.numpy()
    return product


def _places(
    tile: NDArray[np.float32], limit: float, rows: slice, others: slice
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs, as rows of all vectors, whose number in a tile is at least `limit`."""
    found = np.flatnonzero(tile >= np.float32(limit))  # 20 times as fast as nonzero in two dimensions
    left, right = np.unravel_index(found, tile.shape)
    left, right = left + rows.start, right + others.start
    if rows != others:
        return left, right
    is_once = left < right
    return left[is_once], right[is_once]


def _cosines(halves: Tensor, scale: Tensor, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float32]:
    products = (halves[left].float() * halves[right].float()).sum(1)
    cosines: NDArray[np.float32] = (products * scale[left] * scale[right]).numpy()
    return cosines


def _sieves(halves: Tensor) -> list[Tensor]:
    """Return (M, S) float32 vectors for each sieve: coordinates, and the length of what they leave out."""
    sizes = [size for size in _SIEVES if 2 * size <= halves.shape[1]]
    if not sizes:
        return []
    sample = halves[torch.linspace(0, len(halves) - 1, min(_SAMPLE, len(halves))).long()].double()
    sample /= sample.norm(dim=1, keepdim=True)
    _, axes = torch.linalg.eigh(sample.T @ sample)  # the longest last
    sieves = [torch.empty(len(halves), size) for size in sizes]
    for start in range(0, len(halves), _BLOCK):
        # In float64: of a short rest, float32 would not know the length.
        units = halves[start : start + _BLOCK].double()
        units /= units.norm(dim=1, keepdim=True)
        turned = units @ axes.flip(1)[:, : sizes[-1] - 1]
        for sieve, size in zip(sieves, sizes, strict=True):
            part = turned[:, : size - 1]
            rest = (1 - (part * part).sum(1)).clamp(min=0).sqrt()
            sieve[start : start + _BLOCK] = torch.cat([part, rest[:, None]], 1).float()
    return sieves
