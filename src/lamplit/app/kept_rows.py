"""Rows of a store that the page shows, from memory: Lance takes 10 ms to find twenty."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

from lamplit.data.places.image_places import image_name
from lamplit.store.lance_store import Store

_KEPT = 20_000  # rows, of some kB each
_FEW = 5_000  # rows of a store that are read at once, when it is opened


class KeptRows:
    """What the page shows of a store's rows: id, name of the file, texts and metadata, as JSON has them.

    Args:
        store: an open store.
        kept: rows that are kept, those that were shown last.
    """

    def __init__(self, store: Store, kept: int = _KEPT) -> None:
        self._store = store
        self._names = ["id", "path", "texts", *store.metadata_columns]
        self._kept = kept
        self._rows: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._lock = Lock()
        if len(store) <= min(_FEW, kept):
            self.take(range(len(store)))

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return some rows, each a dict with id, name, texts and metadata; not to be changed."""
        with self._lock:
            found = {row: self._rows[row] for row in rows if row in self._rows}
        missing = [row for row in dict.fromkeys(rows) if row not in found]
        if missing:
            taken = self._store.take(missing, self._names).to_pylist()
            found.update((row, _shown(each)) for row, each in zip(missing, taken, strict=True))
        with self._lock:
            for row in rows:
                self._rows[row] = found[row]
                self._rows.move_to_end(row)
            while len(self._rows) > self._kept:
                self._rows.popitem(last=False)
        return [found[row] for row in rows]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    path, texts = row.pop("path"), row.pop("texts")
    name = row.pop("id")
    metadata = {column: plain(value) for column, value in row.items() if value is not None}
    return {"id": name, "name": image_name(path or name), "texts": texts or [], "metadata": metadata}


def typical_text(texts: Sequence[str]) -> str | None:
    """Return the text of median length among those of several words, or among all; None if there is none."""
    several = [text for text in texts if len(text.split()) > 2] or [t for t in texts if len(t.split()) > 1] or texts
    return sorted(several, key=lambda text: (len(text), text))[len(several) // 2] if several else None


def plain(value: Any, max_length: int = 2000) -> Any:
    """Turn a cell of a store into a value that JSON has; long texts are cut."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)  # a browser's numbers hold no more digits
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item, max_length) for item in value[:100]]
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
