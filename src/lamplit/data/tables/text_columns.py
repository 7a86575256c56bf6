"""The texts and paths in columns of Arrow, a block at a time: as cell by cell, without a Python object a row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.data.tables.columns import text_cells
from lamplit.data.tables.readers import to_rows

# What `str.strip` takes off.
_SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_Flat = tuple[NDArray[np.int64], pa.Array]  # the row of each text, ascending, and the texts


def text_lists(columns: Mapping[str, pa.Array], num_rows: int) -> pa.ListArray:
    """Return the texts of each row, of all columns, as `text_cells` finds them in one column after the other.

    A text that an earlier column has is left out.

    Args:
        columns: cells of any type that can hold texts, by the name of the column.
        num_rows: B, their length.

    Returns:
        (B,) lists of text.

    Raises:
        CellError: a cell holds something else.
    """
    parts = [_flat(cells, name) for name, cells in columns.items()]
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.empty(0, np.int64)
    texts = pa.concat_arrays([texts for _, texts in parts]) if parts else pa.array([], pa.string())
    if len(parts) > 1:
        column = np.repeat(np.arange(len(parts)), [len(rows) for rows, _ in parts])
        kept = _first_columns(rows, column, texts)
        kept = kept[np.argsort(rows[kept], kind="stable")]
        rows, texts = rows[kept], texts.take(pa.array(kept))
    offsets = np.zeros(num_rows + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), texts)


def count_texts(lists: pa.Array) -> int:
    """Count the texts in lists of them that are not blank."""
    filled = pc.not_equal(pc.utf8_trim(pc.list_flatten(lists), _SPACE), "")
    return int(pc.sum(filled).as_py() or 0)


def first_texts(lists: pa.Array) -> pa.Array:
    """Return the first text of each list, None of an empty one."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    return pc.list_flatten(lists).take(pa.array(starts, mask=lengths == 0))


def path_texts(cells: pa.Array) -> pa.Array:
    """Return the path in each cell, (B,) text: of an image of `datasets` its `path`; empty where there is none."""
    cells = _decoded(cells)
    if pa.types.is_struct(cells.type) and cells.type.get_field_index("path") >= 0:
        cells = _decoded(pc.struct_field(cells, "path"))
    if not _is_text(cells.type):
        return pa.repeat(pa.scalar(""), len(cells))
    return cells.cast(pa.string()).fill_null("")


def _flat(cells: pa.Array, name: str) -> _Flat:
    cells = _decoded(cells)
    kind = cells.type
    if pa.types.is_fixed_size_list(kind):
        cells = cells.cast(pa.list_(kind.value_type))
    is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    if is_list and _is_text(cells.type.value_type):
        lengths = pc.list_value_length(cells).fill_null(0).to_numpy(zero_copy_only=False)
        rows, texts = np.repeat(np.arange(len(cells)), lengths), pc.list_flatten(cells)
    elif _is_text(kind):
        rows, texts = np.arange(len(cells)), cells
    else:
        return _cell_by_cell(cells, name)
    texts = pc.utf8_trim(texts.cast(pa.string()), _SPACE)
    looks_like_list = pc.and_(pc.starts_with(texts, "["), pc.ends_with(texts, "]"))
    if pc.any(looks_like_list).as_py():  # texts as JSON or Python writes them
        return _cell_by_cell(cells, name)
    is_text = pc.not_equal(texts, "").fill_null(False)
    return rows[is_text.to_numpy(zero_copy_only=False)], texts.filter(is_text)


def _cell_by_cell(cells: pa.Array, name: str) -> _Flat:
    found = [text_cells(row, (name,)) for row in to_rows(pa.record_batch([cells], [name]))]
    rows = np.repeat(np.arange(len(found)), [len(texts) for texts in found])
    return rows, pa.array([text for texts in found for text in texts], pa.string())


def _first_columns(rows: NDArray[np.int64], column: NDArray[np.int64], texts: pa.Array) -> NDArray[np.int64]:
    """Return the places of the texts that no earlier column has in the same row."""
    codes = texts.dictionary_encode().indices.to_numpy().astype(np.int64)
    keys = rows * (codes.max(initial=0) + 1) + codes
    places = np.arange(len(rows))
    kept: NDArray[np.int64] = places[column == 0]
    for number in range(1, int(column.max(initial=0)) + 1):
        of_column = places[column == number]
        kept = np.concatenate([kept, of_column[~np.isin(keys[of_column], keys[kept])]])
    return kept


def _decoded(cells: pa.Array) -> pa.Array:
    return cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
