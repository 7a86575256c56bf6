"""Rows of a store that the page shows, from memory: Lance takes 10 ms to find twenty."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import pyarrow as pa

from lamplit.store.lance_store import Store

SMALL = 64 * 2**20  # bytes of a table that is kept whole
_KEPT = 20_000  # rows of a larger one, those that were shown last


class KeptRows:
    """Everything but the vectors of a store's rows.

    Args:
        store: an open store.
        small: largest table that is kept whole, in bytes.
        kept: rows of a larger one that are kept.
    """

    def __init__(self, store: Store, small: int = SMALL, kept: int = _KEPT) -> None:
        self._store = store
        self._names = ["id", "path", "texts", *store.metadata_columns]
        self._kept = kept
        self._rows: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._lock = Lock()
        self._table = self._whole(small)

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return id, path, texts and metadata of some rows."""
        if self._table is not None:
            whole: list[dict[str, Any]] = self._table.take(pa.array(rows, pa.int64())).to_pylist()
            return whole
        with self._lock:
            found = {row: self._rows[row] for row in rows if row in self._rows}
        missing = [row for row in dict.fromkeys(rows) if row not in found]
        if missing:
            found.update(zip(missing, self._store.take(missing, self._names).to_pylist(), strict=True))
        with self._lock:
            for row in rows:
                self._rows[row] = found[row]
                self._rows.move_to_end(row)
            while len(self._rows) > self._kept:
                self._rows.popitem(last=False)
        return [found[row] for row in rows]

    def _whole(self, small: int) -> pa.Table | None:
        """Read the table if it is small, as a sample of it says."""
        some = range(0, len(self._store), max(1, len(self._store) // 256))
        if not len(some) or self._store.take(some, self._names).nbytes / len(some) * len(self._store) > small:
            return None
        return self._store.take(range(len(self._store)), self._names).combine_chunks()
