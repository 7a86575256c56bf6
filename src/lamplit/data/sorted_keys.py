"""Many names, kept as keys of 16 bytes: which of them some others are, and where they stood."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]  # (N, 2)
_MERGED = 65536  # keys that are merged at once, at least


def keys_of(names: Iterable[str]) -> Keys:
    """Return a key for each name, (N, 2): two names with one key are not found in practice."""
    return _keys(name.encode("utf-8", "surrogatepass") for name in names)


def keys_of_rows(rows: NDArray[Any]) -> Keys:
    """Return a key for the bytes of each row of an array, (N, 2)."""
    return _keys(np.ascontiguousarray(rows))


def _keys(contents: Iterable[Any]) -> Keys:
    digests = b"".join([blake2b(content, digest_size=16).digest() for content in contents])
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


class SortedKeys(NamedTuple):
    """N keys in their order, in 24 bytes each.

    Attributes:
        first: (N,) the first half of each key, ascending.
        second: (N,) the second half of each.
        places: (N,) where each stood before it was sorted; of equal keys the first one comes first.
    """

    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    places: NDArray[np.int64]

    @classmethod
    def of(cls, keys: Keys) -> Self:
        """Sort (N, 2) keys."""
        places = np.argsort(keys[:, 0], kind="stable")
        return cls(keys[:, 0][places], keys[:, 1][places], places)

    def __len__(self) -> int:
        """Count the keys."""
        return len(self.first)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Return where some keys stood, (K,), -1 for those that are not there."""
        places = np.full(len(keys), -1, np.int64)
        if not len(self):
            return places
        at = np.searchsorted(self.first, keys[:, 0])
        at[at == len(self)] = 0  # where the first half is another, as the largest is smaller
        left = np.flatnonzero(self.first[at] == keys[:, 0])
        while len(left):  # a second turn only where two keys have one first half
            is_same = self.second[at[left]] == keys[left, 1]
            places[left[is_same]] = self.places[at[left[is_same]]]
            left = left[~is_same]
            at[left] += 1
            left = left[at[left] < len(self)]
            left = left[self.first[at[left]] == keys[left, 0]]
        return places


class KeySet:
    """Keys that come a block at a time, in 24 bytes each and some more for the newest."""

    def __init__(self) -> None:
        self._sorted = SortedKeys.of(np.empty((0, 2), np.uint64))
        self._newest: set[bytes] = set()

    def __len__(self) -> int:
        """Count the keys."""
        return len(self._sorted) + len(self._newest)

    def has(self, keys: Keys) -> NDArray[np.bool_]:
        """Tell which of (K, 2) keys are there."""
        is_there = self._sorted.find(keys) >= 0
        for place in np.flatnonzero(~is_there) if self._newest else ():
            is_there[place] = keys[place].tobytes() in self._newest
        return is_there

    def add(self, keys: Keys) -> NDArray[np.bool_]:
        """Add (K, 2) keys; return for each whether it is new, and no earlier one of them."""
        is_new = self._sorted.find(keys) < 0
        for place in np.flatnonzero(is_new):
            key = keys[place].tobytes()
            is_new[place] = key not in self._newest
            self._newest.add(key)
        if len(self._newest) > max(_MERGED, len(self._sorted) // 8):  # so that all merging is linear
            newest = np.frombuffer(b"".join(self._newest), np.uint64).reshape(-1, 2)
            kept = np.stack([self._sorted.first, self._sorted.second], 1)
            self._sorted = SortedKeys.of(np.concatenate([kept, newest]))
            self._newest.clear()
        return is_new
