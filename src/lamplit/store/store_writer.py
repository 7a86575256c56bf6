"""How the rows of an embedding run get into a store: new ones, changed ones, and those that are there already."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lamplit.data.pairs import Pair
from lamplit.errors import StoreError
from lamplit.store.lance_store import Store
from lamplit.store.rows import Row, metadata_name
from lamplit.towers.identity import TowerIdentity

COMMIT_SECONDS = 15.0  # at most this much work is lost when the process is killed
COMMIT_ROWS = 4096


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One row of a store, without its vector."""

    path: str
    hash: str
    texts: list[str]
    metadata: dict[str, Any]


class StoredRows:
    """The rows that a store has when a run begins; the run's own commits do not change it.

    Attributes:
        by_id: every row.
        hashes: content hash of every image, by id.
        row_by_hash: number of a row with each content.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        names = [] if store is None else store.metadata_columns
        rows = [] if store is None else store.rows()
        self.by_id = {
            row["id"]: StoredRow(row["path"], row["hash"], row["texts"], {name: row[name] for name in names})
            for row in rows
        }
        self.hashes = {row["id"]: row["hash"] for row in rows}
        self.row_by_hash = {row["hash"]: number for number, row in enumerate(rows)}

    def vectors(self, hashes: Sequence[str]) -> Tensor:
        """Return the (K, D) float16 vectors of images with these contents."""
        assert self._store is not None, "no content is stored without a store"
        return self._store.vectors_at([self.row_by_hash[content_hash] for content_hash in hashes])

    def has_same(self, row: Row) -> bool:
        """Tell whether the store has this row already, as far as its columns can keep it."""
        stored = self.by_id[row.id]
        if (row.path, row.texts) != (stored.path, stored.texts):
            return False
        if row.metadata == stored.metadata:
            return True  # most often; to find what the columns keep of a row takes far longer
        assert self._store is not None, "it has rows"
        return self._store.as_stored(row.metadata) == stored.metadata

    def missing(self, root: Path | None, seen: Set[str]) -> list[str]:
        """Return the ids of files below `root` that are gone and that the source does not name."""
        if root is None:
            return []
        folder = os.path.abspath(root)

        def is_below(name: str, path: str) -> bool:
            below = os.path.relpath(path, folder).replace(os.sep, "/")
            return not below.startswith("../") and re.sub(r"(#\d+)*$", "", name) in (below, path)

        gone = ((name, row.path) for name, row in self.by_id.items() if name not in seen and os.path.isabs(row.path))
        return [name for name, path in gone if is_below(name, path) and not os.path.lexists(path)]


class StoreWriter:
    """Collects rows and commits them, each commit atomic: what is in the store is whole and there once.

    Attributes:
        before: what the store had when the run began.
        seen: ids that the source has.
        store: None until the first commit makes it.
        updated: how many rows were replaced.
    """

    def __init__(self, out: str | Path, tower: TowerIdentity, *, centered: bool) -> None:
        self.store: Store | None = None
        self.seen: set[str] = set()
        self.updated = 0
        self._out, self._tower, self._centered = out, tower, centered
        self._backend = "none"
        self._rows: list[Row] = []
        self._last_commit = time.monotonic()
        if Store.exists(out):
            self.store = Store(out)
            self.store.require_tower(tower)
            if centered and not self.store.centered:
                raise StoreError(f"{out} was made without --mean-center; give another --out to have a centred store")
        # Another Store, which stays at this version: two files that swap their names give each other their vectors.
        self.before = StoredRows(None if self.store is None else Store(out))

    def add(self, pairs: Sequence[Pair], hashes: Sequence[str], vectors: Tensor, backend: str) -> None:
        """Take images that `backend` embedded, with their (B, D) vectors."""
        self._backend = backend
        for pair, content_hash, vector in zip(pairs, hashes, vectors, strict=True):
            self._take(pair, content_hash, vector)
        self._commit_if_due()

    def reuse(self, stored: Sequence[tuple[Pair, str]]) -> None:
        """Take images whose content the store has under other ids, with the vectors that are there."""
        if stored:
            vectors = self.before.vectors([content_hash for _, content_hash in stored])
            for (pair, content_hash), vector in zip(stored, vectors, strict=True):
                self._take(pair, content_hash, vector)
            self._commit_if_due()

    def keep(self, pairs: Sequence[Pair]) -> None:
        """Take images whose vectors are in the store; write those whose texts, metadata or path are new."""
        for pair in pairs:
            self.seen.add(pair.id)
            row = _row(pair, self.before.hashes[pair.id], None)
            if not self.before.has_same(row):
                self._rows.append(row)
        self._commit_if_due()

    def finish(self, root: Path | None, *, prune: bool) -> tuple[int, int]:
        """Commit what is left; count the rows that are missing below `root` and stay, and those that were deleted."""
        self._commit()
        if self.store is None:
            return 0, 0
        missing = self.before.missing(root, self.seen)
        if prune:  # after the commit: what was moved has its new row before it loses the old one
            self.store.delete(missing)
        self.store.finish()
        return (0, len(missing)) if prune else (len(missing), 0)

    def _take(self, pair: Pair, content_hash: str, vector: Tensor) -> None:
        self.seen.add(pair.id)
        self._rows.append(_row(pair, content_hash, vector))

    def _commit_if_due(self) -> None:
        if len(self._rows) >= COMMIT_ROWS or time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        rows, self._rows = self._rows, []
        self._last_commit = time.monotonic()
        if not rows:
            return
        if self.store is None:
            names = list(dict.fromkeys(name for row in rows for name in row.metadata))
            self.store = Store.create(
                self._out,
                self._tower,
                rows,
                backend=self._backend,
                centered=self._centered,
                metadata_columns=names,
            )
            return
        changed = [row for row in rows if row.id in self.before.by_id]
        self.updated += len(changed)
        self.store.append([row for row in rows if row.id not in self.before.by_id])
        self.store.replace(changed)


def _row(pair: Pair, content_hash: str, vector: Tensor | None) -> Row:
    path = pair.id if isinstance(pair.image, bytes) else str(pair.image)
    metadata = {metadata_name(name): value for name, value in pair.metadata.items()}
    return Row(pair.id, path, content_hash, list(pair.texts), vector, metadata)
