"""Rows of one content: the same image, embedded under several names.

Shapes: N rows of the store, M rows whose content others have too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Copies:
    """Which rows are copies of each other; of most stores, none.

    Attributes:
        rows: (M,) ascending.
        contents: (M,) the number of each row's content.
    """

    rows: NDArray[np.int64]
    contents: NDArray[np.int64]

    @classmethod
    def of(cls, contents: NDArray[np.int64]) -> Self:
        """Find the copies among (N,) numbers of contents."""
        counts = np.bincount(contents) if len(contents) else np.zeros(0, np.int64)
        rows = np.flatnonzero(counts[contents] > 1)
        return cls(rows, contents[rows])

    def __len__(self) -> int:
        """Count the rows that are not the only one of their content."""
        return len(self.rows)

    def first_only(self, size: int, allowed: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
        """Mark of each content the first row that is allowed: (N,), N being `size`; None if that is every row."""
        if not len(self):
            return allowed
        first = np.ones(size, bool) if allowed is None else allowed.copy()
        candidates = np.flatnonzero(first[self.rows])
        _, kept = np.unique(self.contents[candidates], return_index=True)  # of equal ones the first, so the lowest row
        first[self.rows] = False
        first[self.rows[candidates[kept]]] = True
        return first

    def of_rows(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return for each row the other rows that have its content."""
        none = np.empty(0, np.int64)
        if not len(self):
            return [none] * len(rows)
        places = np.minimum(np.searchsorted(self.rows, rows), len(self) - 1)
        found: list[NDArray[Any]] = []
        for row, place in zip(rows, places, strict=True):
            if self.rows[place] != row:
                found.append(none)
                continue
            same = self.rows[self.contents == self.contents[place]]
            found.append(same[same != row])
        return found
