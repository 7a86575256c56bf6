"""Texts of a column of a store, which holds a text or a list of texts in each row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.errors import StoreError


def read_cells(values: pa.Array, column: str, path: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return all texts of n rows, stripped, those that are not empty, and how many each row has, (n,).

    Args:
        values: some rows of the column.
        column: its name, for messages.
        path: of the store, for messages.

    Raises:
        StoreError: it holds something else than text or lists of it.
    """
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        counts, cells = pc.list_value_length(values).fill_null(0).to_numpy(), values.flatten().to_pylist()
    else:
        counts, cells = values.is_valid().to_numpy(zero_copy_only=False), values.drop_null().to_pylist()
    row_of = np.repeat(np.arange(len(values)), counts)
    wrong = next((place for place, cell in enumerate(cells) if not isinstance(cell, str)), None)
    if wrong is not None:
        raise StoreError(f"column {column!r} of {path} holds no text: {values[int(row_of[wrong])].as_py()!r}")
    stripped = [cell.strip() for cell in cells]
    kept = np.fromiter(map(bool, stripped), bool, len(stripped))
    return list(filter(None, stripped)), np.bincount(row_of[kept], minlength=len(values))
