"""Vectors of other software as rows of a store, a block at a time and without a Python object a row.

Shapes: B rows of a block, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.data.skipped import Skipped
from lamplit.data.sorted_keys import SortedKeys, keys_of
from lamplit.data.vectors.foreign_tables import plain_cells
from lamplit.data.vectors.foreign_vectors import Block
from lamplit.store.table.rows import metadata_name, to_column

_UNIT_TOLERANCE = 1e-3  # how much rounding to float16 changes the length of a unit vector, at most
_SURE = 0.99  # of this tolerance: the lengths of a block are measured less exactly than one alone
_ID_DIGITS = 9


@dataclass(frozen=True)
class StoreBatch:
    """Some rows as a store keeps them, and what of the source is not among them.

    Attributes:
        rows: (B,) or fewer.
        skipped: vectors that cannot be used.
        lost: number of values that do not fit the type of their column, by column.
        known: number of rows that were left out, because their contents are known.
    """

    rows: pa.RecordBatch
    skipped: list[Skipped]
    lost: Counter[str]
    known: int


def to_store_batch(block: Block, start: int, schema: pa.Schema, known: SortedKeys | None = None) -> StoreBatch:
    """Make rows of a store's schema; their ids are the numbers from `start` on, those of skipped rows included.

    Rows with a known content are left out, and have no number.
    """
    values, without, described = block
    units, reasons = to_unit(values)
    for row, reason in without.items():
        reasons[row] = reason
    hashes = [blake2b(unit, digest_size=16).hexdigest() for unit in units]
    is_good = reasons == ""
    is_new = np.ones(len(units), bool) if known is None else ~is_good | (known.find(keys_of(hashes)) < 0)
    numbers = start + np.cumsum(is_new) - 1
    ids = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), _ID_DIGITS, "0")
    paths = pc.if_else(pc.equal(described.paths, ""), ids, described.paths)
    columns = {
        "id": ids,
        "path": paths,
        "hash": pa.array(hashes, pa.string()),
        "texts": described.texts,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(units.reshape(-1)), units.shape[1]),
    }
    metadata = {metadata_name(name): cells for name, cells in described.metadata.items()}
    lost: Counter[str] = Counter()
    for name in schema.names:
        if name not in columns:
            kind = schema.field(name).type
            columns[name], unfit = _column(metadata.get(name, pa.nulls(len(units))), kind)
            lost.update({name: unfit} if unfit else {})
    rows = pa.record_batch([columns[name] for name in schema.names], schema=schema)
    broken = np.flatnonzero(~is_good)
    skipped = [
        Skipped(name, path, reasons[row])
        for row, name, path in zip(broken, ids.take(broken).to_pylist(), paths.take(broken).to_pylist(), strict=True)
    ]
    kept = is_good & is_new
    return StoreBatch(rows if kept.all() else rows.filter(pa.array(kept)), skipped, lost, int((~is_new).sum()))


def to_unit(values: NDArray[Any]) -> tuple[NDArray[np.float16], NDArray[Any]]:
    """Scale (B, D) floats to unit length; return them, and for each the reason why it cannot be used, or "".

    Vectors that are float16 and of unit length already keep their bytes.
    """
    wide = values.astype(np.float64 if values.dtype.itemsize == 8 else np.float32)
    if values.dtype.itemsize == 2:
        with np.errstate(invalid="ignore", over="ignore"):
            lengths = np.sqrt(np.vecdot(wide, wide))
        if (np.abs(lengths - 1) < _SURE * _UNIT_TOLERANCE).all():  # of most sources, all are
            return np.ascontiguousarray(values, np.float16), np.full(len(values), "", object)
    largest = np.abs(wide).max(1, keepdims=True)
    finite, zero = np.isfinite(largest), largest == 0
    usable = finite & ~zero
    wide, largest = np.where(usable, wide, 1), np.where(usable, largest, 1)
    wide = wide / largest  # so that no square overflows or becomes zero
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    units = (wide / norms).astype(np.float16)
    if values.dtype.itemsize == 2:
        units = np.where(np.abs(norms * largest - 1) < _UNIT_TOLERANCE, values.astype(np.float16), units)
    reasons = np.full(len(values), "", object)
    reasons[~finite[:, 0]] = "the vector has NaN, infinite or missing values"
    reasons[zero[:, 0]] = "the vector is all zeros"
    return units, reasons


def _column(cells: pa.Array | Sequence[Any], kind: pa.DataType) -> tuple[pa.Array, int]:
    """Make a column of metadata of a type; return it, and how many values do not fit and are left empty.

    Numbers, booleans, text and lists of text that Arrow holds are taken as a whole, all else value by value.
    """
    if isinstance(cells, pa.Array):
        column = _cast(cells, kind)
        if column is not None:
            return column, 0
        cells = plain_cells(cells)
    return to_column(cells, kind)


def _cast(cells: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """Return cells as a column of a type, if all of them fit as they are; None if each has to be looked at."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    have = cells.type
    if pa.types.is_null(have):
        return pa.nulls(len(cells), kind)
    if pa.types.is_floating(have) and pa.types.is_float64(kind):
        wide = cells.cast(kind)
        return pc.if_else(pc.is_finite(wide), wide, pa.scalar(None, kind))
    if pa.types.is_integer(have) and (pa.types.is_integer(kind) or pa.types.is_float64(kind)):
        try:
            return cells.cast(kind)
        except pa.ArrowInvalid:  # a number that the type does not hold
            return None
    if pa.types.is_large_string(have) and pa.types.is_string(kind):
        return cells.cast(kind)
    is_plain = pa.types.is_string(kind) or pa.types.is_boolean(kind) or kind == pa.list_(pa.string())
    return cells if is_plain and have == kind else None
