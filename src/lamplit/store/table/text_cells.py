"""Texts of columns of a store, each of which holds a text or a list of texts in each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def column_names(column: str, present: Sequence[str]) -> list[str]:
    """Return the columns that a text column names: the one of that name, or else several with commas between."""
    return [column] if column in present else [name.strip() for name in column.split(",")]


def read_columns(columns: Mapping[str, pa.Array], path: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return what `read_cells` does, of each row the texts of one column after the other.

    A text that an earlier column has in the same row is left out, as `embed` does with several columns.

    Args:
        columns: the same rows of each, by the name of the column.
        path: of the store, for messages.

    Raises:
        StoreError: a column holds something else than text or lists of it.
    """
    found = [read_cells(values, name, path) for name, values in columns.items()]
    if len(found) == 1:
        return found[0]
    rows: list[list[str]] = [[] for _ in found[0][1]]
    for texts, counts in found:
        begin = 0
        for row, count in zip(rows, counts.tolist(), strict=True):
            row += [text for text in texts[begin : begin + count] if text not in row]
            begin += count
    return [text for row in rows for text in row], np.fromiter(map(len, rows), np.int64, len(rows))
