"""Captions and contents by 64 bits: what split, order of the split and the record of a model compare."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


def hash_captions(texts: Iterable[str], seed: int | None = None) -> NDArray[np.uint64]:
    """Hash captions, stripped and case folded: (N,); the same numbers on every machine.

    Args:
        texts: N captions.
        seed: gives each run of a split an order of its own; None for what a model keeps of its captions.
    """
    return hash_names((text.strip().casefold() for text in texts), seed)


def hash_names(names: Iterable[str], seed: int | None = None) -> NDArray[np.uint64]:
    """Hash texts as they are, such as a store's content hashes: (N,)."""
    key = b"" if seed is None else str(seed).encode()
    digests = (blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def number(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Number (N,) hashes in the order in which they appear; no array of more than 64 bits a hash is made.

    Returns:
        Where each distinct one is first, (M,), ascending; and the numbers, (N,).
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    begins = np.ones(len(hashes), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    del ordered
    first = order[begins]
    numbers = np.empty(len(hashes), np.int32)
    numbers[order] = np.cumsum(begins, dtype=np.int32) - 1
    del order, begins
    by_appearance = np.argsort(first)
    place = np.empty(len(first), np.int32)
    place[by_appearance] = np.arange(len(first), dtype=np.int32)
    return first[by_appearance], place[numbers]
