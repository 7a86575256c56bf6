"""Rows that are equal to what is stored, a column at a time: most are, and need not be read as Python objects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.store.table.rows import Row

# Values of one of these types are kept as they are by a column of its type.
_EXACT: dict[pa.DataType, type] = {pa.string(): str, pa.int64(): int, pa.float64(): float, pa.bool_(): bool}


def surely_same(rows: Sequence[Row], stored: pa.Table) -> NDArray[np.bool_]:
    """Tell of which rows, (N,), a store has the path, the texts and the metadata; False also where that is not plain.

    Args:
        rows: N rows of valid text; their vectors, hashes and ids are not looked at.
        stored: what is stored for each of them, with the columns `path`, `texts` and those of metadata.
    """
    table = stored.combine_chunks()
    is_same = _equal([row.path for row in rows], table["path"]) & _equal_lists([row.texts for row in rows], table)
    for name in dict.fromkeys(chain.from_iterable(row.metadata for row in rows)):
        values = [row.metadata.get(name) for row in rows]
        if name in table.column_names:
            is_same &= _equal(values, table[name])
        else:
            is_same &= [value is None for value in values]
    return is_same


def _equal(values: list[Any], stored: pa.ChunkedArray) -> NDArray[np.bool_]:
    exact = _EXACT.get(stored.type)
    is_plain = np.fromiter((value is None or type(value) is exact for value in values), bool, len(values))
    both_missing = is_plain & [value is None for value in values] & _flags(stored.is_null())
    try:
        plain = [value if flag else None for value, flag in zip(values, is_plain.tolist(), strict=True)]
        ours = pa.array(plain, stored.type)
    except (pa.ArrowException, OverflowError):  # a whole number that is too large
        return both_missing
    return both_missing if exact is None else both_missing | _flags(pc.fill_null(pc.equal(ours, stored), False))


def _equal_lists(texts: list[Sequence[str]], table: pa.Table) -> NDArray[np.bool_]:
    [stored] = table["texts"].chunks
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    is_same: NDArray[np.bool_] = pc.fill_null(pc.list_value_length(stored), -1).to_numpy() == lengths
    theirs = stored.filter(pa.array(is_same)).flatten()
    ours = pa.array(list(chain.from_iterable(compress(texts, is_same))), theirs.type)
    differs = ~_flags(pc.fill_null(pc.equal(ours, theirs), False))
    is_same[np.repeat(np.flatnonzero(is_same), lengths[is_same])[differs]] = False
    return is_same


def _flags(column: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    flags: NDArray[np.bool_] = np.asarray(column)
    return flags
