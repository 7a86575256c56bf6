"""The rows of a table in the order of their ids: where each lies in the table, and which one a row id of Lance is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.errors import UsageError
from lamplit.store.table.table_opening import reading


class RowOrder:
    """Row numbers of one version of a Lance table, whose column `id` sorts the rows.

    Args:
        table: the Lance dataset.
        positions: what `positions` is, if it is known: sorting the ids takes a second for each million.
    """

    def __init__(self, table: Any, positions: NDArray[np.int64] | None = None) -> None:
        self._table = table
        if positions is not None:
            self.positions = positions

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(N,) position in the table of each row, in the order of the ids."""
        with reading(self._table.uri):
            if self._ascends():
                return np.arange(self._table.count_rows())
            found: NDArray[np.uint64] = pc.sort_indices(self._table.to_table(columns=["id"])["id"]).to_numpy()
        return found.astype(np.int64)  # they are unsigned, and differences would be, too

    def _ascends(self) -> bool:
        """Tell whether the rows lie in the order of their ids, as imports often do; it takes no memory."""
        before = pa.array([], pa.string())
        for batch in self._table.to_batches(columns=["id"]):
            ids = pa.concat_arrays([before, batch["id"]])
            if not pc.all(pc.less(ids[:-1], ids[1:])).as_py():
                return False
            before = ids[-1:]
        return True

    def by_position(self) -> NDArray[np.int32]:
        """Return the row at each position of the table, (N,)."""
        rows = np.empty(len(self.positions), np.int32)
        rows[self.positions] = np.arange(len(rows), dtype=np.int32)
        return rows

    def take(self, rows: Sequence[int] | NDArray[np.integer[Any]], columns: Sequence[str]) -> pa.Table:
        """Return some columns of some rows."""
        places = self.positions[np.asarray(rows, np.int64)].tolist()
        with reading(self._table.uri):
            return self._table.take(places, columns=list(columns))

    def matching(self, sql: str, condition: str) -> NDArray[np.int64]:
        """Return the rows, unsorted, for which an SQL condition holds, which was written as `condition`.

        Raises:
            UsageError: Lance cannot use it.
        """
        try:
            return self.from_lance(self._lance_ids(sql))
        except (ValueError, OSError, RuntimeError) as error:  # a RuntimeError if Lance's planner breaks
            reason = re.split(r"\. Valid fields are|, \S+\.rs:\d", str(error).strip())[0]
            raise UsageError(f"the condition {condition!r} cannot be used ({reason})") from error

    def from_lance(self, lance_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows that Lance gives these `_rowid`s."""
        known, rows = self._rows_by_lance_id
        found: NDArray[np.int64] = rows[np.searchsorted(known, lance_ids)]
        return found

    @cached_property
    def _rows_by_lance_id(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All ids that Lance gives, ascending, and their rows."""
        lance_ids = self._lance_ids(None)
        rows = np.empty(len(lance_ids), np.int64)
        rows[self.positions] = np.arange(len(lance_ids))
        ascending = np.argsort(lance_ids, kind="stable")
        return lance_ids[ascending], rows[ascending]

    def _lance_ids(self, condition: str | None) -> NDArray[np.int64]:
        with reading(self._table.uri):
            found = self._table.to_table(columns=[], filter=condition, with_row_id=True)["_rowid"]
        ids: NDArray[np.int64] = found.to_numpy().astype(np.int64)
        return ids
