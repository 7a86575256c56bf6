"""What a store holds when a run begins: keys of ids and contents in 57 bytes a row; the rows stay on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamplit.data.sorted_keys import Keys, SortedKeys, keys_of
from lamplit.data.valid_text import file_named
from lamplit.locations.addresses import is_remote
from lamplit.store.embed.same_rows import surely_same
from lamplit.store.lance_store import Store
from lamplit.store.table.column_types import UnfitError, fitted, is_ours, is_same
from lamplit.store.table.rows import FIXED_COLUMNS, Row


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One row of a store, without its vector."""

    path: str
    hash: str
    texts: list[str]
    metadata: dict[str, Any]


class StoredRows:
    """The rows that a store has when a run begins; the run's own commits do not change it.

    A place is the number of a row among these N, in the order of the table; -1 for none.

    Args:
        store: whose rows these are, or None.
        files: of rows that are none of these: fragments of the table that have no other files are left out.

    Attributes:
        contents: the keys of all content hashes.
        types: of the metadata columns.
        is_seen: (N,) whether the source has named a row, by its place; who reads the source sets it.
    """

    def __init__(self, store: Store | None, files: Collection[str] = ()) -> None:
        self._store = store
        self.types = {} if store is None else store.column_types
        self._foreign = {name: kind for name, kind in self.types.items() if not is_ours(kind)}
        fragments, self._parts = _fragments_beside(store, frozenset(files))
        size = self._parts.size
        self.is_seen = np.zeros(size, bool)
        self._ids = SortedKeys.of(_column_keys(store, "id", size, fragments))
        contents = _column_keys(store, "hash", size, fragments)
        self._content_at = contents[:, 0].copy()
        self.contents = SortedKeys.of(contents)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Return the places of the rows with the ids of these (K, 2) keys."""
        return self._ids.find(keys)

    def content_keys(self, ids: Sequence[str]) -> list[int]:
        """Return the `content_key` of each of these rows, -1 for an id that the store does not have."""
        places = self.find(keys_of(ids))
        if not len(self._content_at):
            return [-1] * len(ids)
        known: list[int] = self._content_at[places].tolist()
        return [key if is_there else -1 for key, is_there in zip(known, (places >= 0).tolist(), strict=True)]

    def read(self, ids: Sequence[str]) -> list[StoredRow | None]:
        """Read the rows with these ids; None for an id that the store does not have."""
        places = self.find(keys_of(ids))
        there = np.flatnonzero(places >= 0)
        found: list[StoredRow | None] = [None] * len(ids)
        if len(there):
            for at, row in zip(there.tolist(), _to_rows(self._take(places[there])), strict=True):
                found[at] = row
        return found

    def unlike(self, rows: Sequence[Row]) -> list[Row]:
        """Return those of which the store does not have all that they name."""
        places = self.find(keys_of([row.id for row in rows]))
        is_unlike = places < 0
        there = np.flatnonzero(~is_unlike)
        if len(there):
            table, known = self._take(places[there]), [rows[at] for at in there.tolist()]
            unsure = np.flatnonzero(~surely_same(known, table))
            stored = _to_rows(table.take(unsure))
            is_unlike[there[unsure]] = [
                not self.has_same(known[at], row) for at, row in zip(unsure.tolist(), stored, strict=True)
            ]
        return [rows[at] for at in np.flatnonzero(is_unlike).tolist()]

    def vectors(self, hashes: Sequence[str]) -> Tensor:
        """Return the (K, D) float16 vectors of images with these contents."""
        assert self._store is not None, "no content is stored without a store"
        there, back = np.unique(self.contents.find(keys_of(hashes)), return_inverse=True)
        column = self._store.take_at(self._parts.positions(there), ["vector"])["vector"].combine_chunks()
        halves = column.flatten().to_numpy(zero_copy_only=False).reshape(len(there), -1)
        return torch.from_numpy(halves[back])

    def has_same(self, row: Row, stored: StoredRow) -> bool:
        """Tell whether the store has all that a row names; columns that it does not name may hold anything."""
        if row.path != stored.path or list(row.texts) != stored.texts:
            return False
        return all(self._keeps(name, value, stored.metadata.get(name)) for name, value in row.metadata.items())

    def refuses(self, name: str, value: Any) -> bool:
        """Tell whether a column that other software made cannot hold a value."""
        kind = self._foreign.get(name)
        if kind is None:
            return False
        try:
            fitted(value, kind)
        except UnfitError:
            return True
        return False

    def missing(self, root: Path | None) -> list[str]:
        """Return the ids of files below `root` that are gone and that the source does not name."""
        if root is None or is_remote(root) or self._store is None:
            return []
        folder = os.path.abspath(root)

        def is_below(name: str, path: str) -> bool:
            below = os.path.relpath(path, folder).replace(os.sep, "/")
            return not below.startswith("../") and re.sub(r"(#\d+)*$", "", name) in (below, path)

        return [
            name
            for name, path in self._unseen(self._store)
            if os.path.isabs(path) and is_below(name, path) and not file_exists(path)
        ]

    def _take(self, places: NDArray[np.int64]) -> pa.Table:
        """Read rows, without their vectors, by their places, which come in any order and may come twice."""
        assert self._store is not None, "no row is stored without a store"
        there, back = np.unique(places, return_inverse=True)
        return self._store.take_at(self._parts.positions(there), ["path", "hash", "texts", *self.types]).take(back)

    def _unseen(self, store: Store) -> Iterator[tuple[str, str]]:
        """Yield ids and paths of the rows that the source does not name."""
        start = 0
        for batch in store.batches("id", "path"):
            unseen = batch.take(np.flatnonzero(~self.is_seen[start : start + len(batch)]))
            yield from zip(unseen["id"].to_pylist(), unseen["path"].to_pylist(), strict=True)
            start += len(batch)

    def _keeps(self, name: str, value: Any, stored: Any) -> bool:
        if value is stored or (type(value) is type(stored) is str and value == stored):
            return True  # most often; to find what the column keeps of a value takes far longer
        if name not in self.types:
            return value is None
        try:
            return is_same(fitted(value, self.types[name]), stored)
        except UnfitError:
            return False


def file_exists(path: str) -> bool:
    """Tell whether a file is there; its name may have been made valid Unicode."""
    return os.path.lexists(file_named(path))


def _to_rows(table: pa.Table) -> list[StoredRow]:
    paths, hashes, texts = (table[name].to_pylist() for name in ("path", "hash", "texts"))
    names = [name for name in table.column_names if name not in FIXED_COLUMNS]
    metadata: list[dict[str, Any]] = table.select(names).to_pylist() if names else [{} for _ in paths]
    return list(map(StoredRow, paths, hashes, texts, metadata))


@dataclass(frozen=True)
class _Parts:
    """Where the rows of some fragments are in a table.

    Attributes:
        starts: (F,) the place of the first row of each fragment among these.
        shifts: (F,) how many rows of the table that are left out lie before it.
        size: how many rows they have.
    """

    starts: NDArray[np.int64]
    shifts: NDArray[np.int64]
    size: int

    def positions(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions in the table of rows by their places."""
        moved: NDArray[np.int64] = places + self.shifts[np.searchsorted(self.starts, places, side="right") - 1]
        return moved


def _fragments_beside(store: Store | None, files: frozenset[str]) -> tuple[list[Any], _Parts]:
    """Return the fragments of a store that have another file than these, and where their rows are."""
    found, starts, shifts, size, left_out = [], [], [], 0, 0
    for fragment in [] if store is None else store.fragments():
        rows = fragment.count_rows()
        if files.issuperset(file.path for file in fragment.data_files()):
            left_out += rows
        else:
            found.append(fragment)
            starts.append(size)
            shifts.append(left_out)
            size += rows
    return found, _Parts(np.array(starts, np.int64), np.array(shifts, np.int64), size)


def _column_keys(store: Store | None, name: str, size: int, fragments: list[Any]) -> NDArray[np.uint64]:
    """Return the keys of a column of text in some fragments, (N, 2), in the order of the table."""
    keys = np.empty((size, 2), np.uint64)
    start = 0
    for batch in store.batches(name, fragments=fragments) if store is not None and fragments else ():
        keys[start : start + len(batch)] = keys_of(batch[name].fill_null("").to_pylist())
        start += len(batch)
    return keys
