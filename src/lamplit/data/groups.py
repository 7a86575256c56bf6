"""Rows of one image: which rows of a table name the same image, and the one row that is made of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_ALONE, _WAITS, _LAST = range(3)


class ImageRow(NamedTuple):
    """What a table says about one image."""

    id: str
    image: Path | bytes
    texts: tuple[str, ...]
    metadata: dict[str, Any]
    not_kept: tuple[str, ...] = ()  # columns of values that other rows of the image have
    place: str = ""  # where in the table its bytes lie, if `read_image` can read them there


class Groups:
    """Which rows name one image, kept as one byte a row and 24 an image, and 8 an image if every row names another.

    Args:
        keys: the 8-byte hash of what each row names.

    Attributes:
        count: number of distinct keys.
        num_rows: number of rows.
    """

    def __init__(self, keys: Iterable[int]) -> None:
        hashes: NDArray[np.int64] = np.frombuffer(array("q", keys), np.int64)
        self.num_rows = len(hashes)
        self._distinct = np.unique(hashes)
        self.count = len(self._distinct)
        self._codes: bytes | None = None
        if self.count < self.num_rows:
            order = np.argsort(hashes, kind="stable")
            differs = hashes[order][1:] != hashes[order][:-1]
            is_first, is_last = np.append(True, differs), np.append(differs, True)
            codes = np.full(self.num_rows, _WAITS, np.uint8)
            codes[order[is_last]] = _LAST
            codes[order[is_first & is_last]] = _ALONE
            self._codes = codes.tobytes()
            self._first, self._last = order[is_first], order[is_last]  # rows of each distinct key

    def first_row(self, start: int, stop: int) -> int:
        """Return the first row of all images whose last row is one of those from `start` to `stop`; at most `start`."""
        if self._codes is None:
            return start
        is_here = (self._last >= start) & (self._last < stop)
        return min(start, int(self._first[is_here].min(initial=start)))

    def named(self, keys: Iterable[int]) -> NDArray[np.bool_]:
        """Tell which of some keys a row has; return (K,) bool."""
        return np.isin(np.frombuffer(array("q", keys), np.int64), self._distinct)

    def merge(
        self,
        rows: Iterable[ImageRow | None],
        key_of: Callable[[ImageRow], int],
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[ImageRow]:
        """Yield one row an image, where its last row is read; only images that have more rows to come are held.

        Args:
            rows: in the order of the keys before, from `first_row(start, stop)` to `stop`; None for one that cannot be
                used.
            key_of: gives the key of a row; 0 for one that stands alone.
            start: images whose last row is before this one are left out.
            stop: as are those whose last row is this one or later; by default there is no such.
        """
        if self._codes is None:
            yield from (row for row in rows if row is not None)
            return
        first = 0 if stop is None else self.first_row(start, stop)
        codes = chain(memoryview(self._codes)[first:], repeat(_ALONE))
        held: dict[int, dict[str, _Held]] = {}
        for number, row, code in zip(count(first), rows, codes, strict=False):
            if row is None:
                continue
            key = 0 if code == _ALONE else key_of(row)
            if key == 0:
                if number >= start:
                    yield row
                continue
            # By file too: two names may have one hash.
            group = held.setdefault(key, {})
            file = os.path.normpath(str(row.image))
            if file in group:
                group[file].add(row)
            else:
                group[file] = _Held(row)
            if code == _LAST:
                done = held.pop(key).values()
                if number >= start:
                    yield from (each.row() for each in done)
        for key, group in held.items():  # the last row could not be used, or the file has changed since
            if stop is None or start <= self._last_row(key) < stop:
                yield from (each.row() for each in group.values())

    def _last_row(self, key: int) -> int:
        place = int(np.searchsorted(self._distinct, key))
        is_there = place < self.count and self._distinct[place] == key
        return int(self._last[place]) if is_there else -1


class _Held:
    """The rows of one image so far."""

    def __init__(self, row: ImageRow) -> None:
        self._first = row
        self._texts = dict.fromkeys(row.texts)
        self._metadata = dict(row.metadata)
        self._not_kept: list[str] = []

    def add(self, row: ImageRow) -> None:
        self._texts |= dict.fromkeys(row.texts)
        for name, value in row.metadata.items():
            if value is None or value == "":
                continue
            if self._metadata.get(name) in (None, ""):
                self._metadata[name] = value
            elif self._metadata[name] != value:
                self._not_kept.append(name)

    def row(self) -> ImageRow:
        return ImageRow(self._first.id, self._first.image, tuple(self._texts), self._metadata, tuple(self._not_kept))
