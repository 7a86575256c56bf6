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
