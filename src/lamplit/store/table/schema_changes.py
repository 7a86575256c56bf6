"""Columns of metadata that come later, or turn out to be of a wider type: the changes of the table that they need.

A new column costs no data. A wider type is a new column with the converted values, which takes the place of the old one
in one commit, so that a reader always finds the column whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import lance
import pyarrow as pa

from lamplit.store.table.column_types import UnfitError, becomes_text, column_type, fitted, is_ours
from lamplit.store.table.rows import COLUMNS, Row
from lamplit.store.table.store_lock import store_lock

_WIDER, _NARROWER = "~lamplit_wider", "~lamplit_narrower"  # the endings of columns on their way in and out
_SAMPLE = 100  # rows


def is_passing(name: str) -> bool:
    """Tell whether a column is there only while another one is widened."""
    return name.endswith((_WIDER, _NARROWER))


def make_room(table: Any, rows: Sequence[Row]) -> None:
    """Give a table the columns that rows need; widen those that lamplit made, if a value does not fit."""
    if any(is_passing(name) for name in table.schema.names):
        with store_lock(table.uri, "mends its columns"):
            table.checkout_latest()
            _mend(table)
    names = dict.fromkeys(name for row in rows for name in row.metadata)
    columns = {name: [row.metadata.get(name) for row in rows] for name in names}
    schema = table.schema
    new = [pa.field(name, column_type(values)) for name, values in columns.items() if name not in schema.names]
    if new:
        table.add_columns(pa.schema(new))
    for name, values in columns.items():
        if name in schema.names and _needed(table, name, values) is not None:
            _widen(table, name, values)


def allow_empty_cells(table: Any) -> list[str]:
    """Let the columns of other software be empty in rows that do not name them; return those that could not before."""
    names = [field.name for field in table.schema if field.name not in COLUMNS and not field.nullable]
    if names:
        table.alter_columns(*({"path": name, "nullable": True} for name in names))
        table.checkout_latest()
    return names


def _needed(table: Any, name: str, values: Sequence[Any]) -> pa.DataType | None:
    """Return the type that a column needs for more values; None if it can stay, or was made elsewhere."""
    kind = table.schema.field(name).type
    if not is_ours(kind):
        return None  # what does not fit is counted
    try:
        for value in values:
            fitted(value, kind)
    except UnfitError:
        return column_type(chain(_stored(table, name), values))
    if not any(becomes_text(value, kind) for value in values):
        return None
    # A column is of text as long as it is empty. Mostly some rows tell that it is of text indeed.
    some = table.to_table(columns=[name], filter=f"`{name}` IS NOT NULL", limit=_SAMPLE)[name].to_pylist()
    if column_type(chain(some, values)) == kind:
        return None
    needed = column_type(chain(_stored(table, name), values))
    return None if needed == kind else needed


def _widen(table: Any, name: str, values: Sequence[Any]) -> None:
    with store_lock(table.uri, f"widens the column {name}"):
        table.checkout_latest()
        kind = _needed(table, name, values)
        if kind is None:
            return  # another process did it
        wider = pa.field(f"{name}{_WIDER}", kind)

        @lance.batch_udf(output_schema=pa.schema([wider]))  # type: ignore[untyped-decorator]
        def convert(batch: pa.RecordBatch) -> pa.RecordBatch:
            cells = [fitted(value, kind) for value in batch[name].to_pylist()]
            return pa.record_batch([pa.array(cells, kind)], schema=pa.schema([wider]))

        table.add_columns(convert, read_columns=[name])
        # Both names change in one commit.
        table.alter_columns({"path": name, "name": f"{name}{_NARROWER}"}, {"path": wider.name, "name": name})
        _mend(table)


def _stored(table: Any, name: str) -> Iterator[Any]:
    for batch in table.to_batches(columns=[name]):
        yield from batch[name].to_pylist()


def _mend(table: Any) -> None:
    """Finish what was begun, here or by a process that was killed: values that came meanwhile, columns that pass."""
    for old in [name for name in table.schema.names if name.endswith(_NARROWER)]:
        name = old.removesuffix(_NARROWER)
        if name in table.schema.names:
            kind = table.schema.field(name).type
            late = table.to_table(columns=["id", old], filter=f"`{name}` IS NULL AND `{old}` IS NOT NULL")
            if len(late):
                cells = [fitted(value, kind) for value in late[old].to_pylist()]
                schema = pa.schema([table.schema.field("id"), table.schema.field(name)])
                mended = pa.table([late["id"], pa.array(cells, kind)], schema=schema)
                table.merge_insert("id").when_matched_update_all().execute(mended)
    if passing := [name for name in table.schema.names if is_passing(name)]:
        table.drop_columns(passing)
