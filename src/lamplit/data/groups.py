"""Rows of one image: which rows of a table name the same image, and the one row that is made of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
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


class Groups:
    """Which rows name one image, kept as one byte a row, and none if every row names another.

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
        self._codes: NDArray[np.uint8] | None = None
        if self.count < self.num_rows:
            order = np.argsort(hashes, kind="stable")
            differs = hashes[order][1:] != hashes[order][:-1]
            is_first, is_last = np.append(True, differs), np.append(differs, True)
            codes = np.full(self.num_rows, _WAITS, np.uint8)
            codes[order[is_last]] = _LAST
            codes[order[is_first & is_last]] = _ALONE
            self._codes = codes

    def named(self, keys: Iterable[int]) -> NDArray[np.bool_]:
        """Tell which of some keys a row has; return (K,) bool."""
        return np.isin(np.frombuffer(array("q", keys), np.int64), self._distinct)

    def merge(self, rows: Iterable[tuple[int, ImageRow | None]]) -> Iterator[ImageRow]:
        """Yield one row an image, where its last row is read; only images that have more rows to come are held.

        Args:
            rows: every row with its key, in the order of the keys before; key 0 for a row that stands alone, None for
                one that cannot be used.
        """
        if self._codes is None:
            yield from (row for _, row in rows if row is not None)
            return
        held: dict[int, dict[str, _Held]] = {}
        for number, (key, row) in enumerate(rows):
            if row is None:
                continue
            code = self._codes[number] if number < self.num_rows else _ALONE
            if key == 0 or code == _ALONE:
                yield row
                continue
            # By file too: two names may have one hash.
            group = held.setdefault(key, {})
            file = os.path.normpath(os.fsdecode(row.image))
            if file in group:
                group[file].add(row)
            else:
                group[file] = _Held(row)
            if code == _LAST:
                yield from (each.row() for each in held.pop(key).values())
        for group in held.values():  # the last row could not be used, or the file has changed since
            yield from (each.row() for each in group.values())


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
