"""Vectors that lie in several arrays, one for each part of a store.

Shapes: N rows of the store, n of a part, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int32] | None  # of a part, ascending; None: all of the store


class JoinedVectors:
    """(N, E) vectors that lie in several arrays, read as one.

    Args:
        rows: (n,) those of each array, ascending.
        arrays: (n, E) each.
    """

    def __init__(self, rows: Sequence[NDArray[np.int32]], arrays: Sequence[NDArray[Any]]) -> None:
        self.rows, self.arrays = rows, arrays
        self.shape, self.dtype = (sum(map(len, rows)), arrays[0].shape[1]), arrays[0].dtype

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, asked: slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return (n, E) vectors of a range of rows, or of (n,) rows."""
        asked = np.arange(*asked.indices(len(self))) if isinstance(asked, slice) else np.asarray(asked)
        order = np.argsort(asked, kind="stable")  # a file is read twice as fast from its beginning to its end
        ascending = asked[order].astype(np.int32)  # as the rows of the parts are, or numpy would copy these
        taken = np.empty((len(asked), self.shape[1]), self.dtype)
        for own, vectors in zip(self.rows, self.arrays, strict=True):
            places = np.minimum(np.searchsorted(own, ascending), len(own) - 1)
            here = own[places] == ascending
            taken[order[here]] = vectors[places[here]]
        return taken


def join(rows: Sequence[Rows], arrays: Sequence[NDArray[Any]]) -> NDArray[Any] | JoinedVectors:
    """Return the vectors of a store, of whose parts these are the rows and arrays."""
    some = [each for each in rows if each is not None]
    return JoinedVectors(some, arrays) if some else arrays[0]
