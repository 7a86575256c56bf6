"""All pairs of vectors with a cosine above a limit, exactly, of which most pairs are never multiplied.

The vectors are turned so that few coordinates hold most of their length. What the others add to a cosine is at most the
product of the two lengths that are left: with `x = (a, r)`, `r` being the length of the rest, `(a, r) · (b, s)` is an upper
bound. So a pair goes through sieves of 32 and 128 numbers, and only what may be near is multiplied in full.

Shapes: M vectors, D width, S of a sieve.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

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
        How many vectors are done since the last time, and pairs.
    """
    if not len(halves):
        return
    coarse, *finer = [*_sieves(halves), None]
    scale = torch.cat([1 / part.float().norm(dim=1) for part in halves.split(_BLOCK)])
    chunks = [slice(start, stop) for start, stop in pairwise([*range(0, len(halves), chunk_size), len(halves)])]
    memory = torch.empty(chunk_size * chunk_size)
    for number, rows in enumerate(chunks):
        found = []
        units = _units(halves, scale, rows) if coarse is None else None
        for others in chunks[number:]:
            left, right = _survivors(coarse, units, halves, scale, rows, others, memory, limit)
            for sieve in finer:
                if sieve is not None and len(left):
                    kept = np.einsum("ns,ns->n", sieve[left], sieve[right]) >= limit - _SLACK
                    left, right = left[kept], right[kept]
            if len(left):
                found.append(_exact(halves, scale, left, right, limit))
        lefts, rights, cosines = zip(*found, strict=True) if found else ([], [], [])
        yield (
            rows.stop - rows.start,
            (
                np.concatenate([np.empty(0, np.int64), *lefts]),
                np.concatenate([np.empty(0, np.int64), *rights]),
                np.concatenate([np.empty(0, np.float32), *cosines]),
            ),
        )
