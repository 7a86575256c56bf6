"""Rows of a store, and the Arrow tables they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lamplit.data.caption_hash import hash_names, number
from lamplit.data.valid_text import valid_id, valid_text
from lamplit.store.table.column_types import UnfitError, fitted

if TYPE_CHECKING:
    from torch import Tensor

FIXED_COLUMNS = {"id": pa.string(), "path": pa.string(), "hash": pa.string(), "texts": pa.list_(pa.string())}
COLUMNS = (*FIXED_COLUMNS, "vector")  # every other column is the user's metadata


@dataclass(slots=True)
class Row:
    """One image of the store; `vector` is (D,) with unit length, or None to keep the one that is stored."""

    id: str
    path: str
    hash: str
    texts: Sequence[str]
    vector: Tensor | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=4096)  # it is called for every cell
def metadata_name(name: str) -> str:
    """Return a name that a store can give to a column of the pairs: `id` becomes `id_`, `a.b` becomes `a_b`."""
    name = name.replace(".", "_").replace("`", "_").replace("\0", "_")  # a zero would end it
    return f"{name}_" if name in ("", *COLUMNS) or name.startswith("_row") else name


def to_table(rows: Sequence[Row], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Make a table of a store's schema from rows, with all columns or some; what does not fit is left empty.

    Text that is not valid Unicode is made valid.
    """
    columns = columns or schema.names
    arrays = {
        "id": pa.array([valid_id(row.id) for row in rows], pa.string()),
        "path": pa.array([valid_id(row.path) for row in rows], pa.string()),
        "hash": pa.array([row.hash for row in rows], pa.string()),
        "texts": pa.array([list(map(valid_text, row.texts)) for row in rows], pa.list_(pa.string())),
    }
    if "vector" in columns:
        import torch  # not needed to read a store, and slow to import

        flat = torch.cat([row.vector for row in rows if row.vector is not None]).to(torch.float16).numpy()
        arrays["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), schema.field("vector").type.list_size)
    for name in columns:
        if name not in arrays:
            arrays[name], _ = to_column([row.metadata.get(name) for row in rows], schema.field(name).type)
    described = pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)
    return pa.table([arrays[name] for name in columns], schema=described)


def to_column(values: Iterable[Any], kind: pa.DataType) -> tuple[pa.Array, int]:
    """Make a column of metadata of a type; return it, and how many values do not fit and are left empty."""
    kept, lost = [], 0
    for value in values:
        try:
            kept.append(fitted(value, kind))
        except UnfitError:
            kept.append(None)
            lost += 1
    return pa.array(kept, kind), lost


def number_contents(hashes: Iterable[pa.Array]) -> NDArray[np.int64]:
    """Number (N,) content hashes, of which some come at a time: equal ones have one number, an empty one its own."""
    parts, unknown = [np.empty(0, np.uint64)], [np.empty(0, bool)]
    for cells in hashes:
        names = cells.fill_null("").to_pylist()
        parts.append(hash_names(names))
        unknown.append(np.fromiter((not name for name in names), bool, len(names)))
    first, found = number(np.concatenate(parts))
    numbers = found.astype(np.int64)
    places = np.flatnonzero(np.concatenate(unknown))
    numbers[places] = len(first) + np.arange(len(places))
    return numbers
