"""How the rows of an embedding run get into a store: new ones, changed ones, and those that are there already."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lamplit.data.pairs import Pair
from lamplit.data.places.image_files import file_holding
from lamplit.data.sorted_keys import KeySet, keys_of
from lamplit.errors import StoreError
from lamplit.store.embed.contents import Contents
from lamplit.store.embed.stored_rows import StoredRow, StoredRows, file_exists
from lamplit.store.lance_store import Store
from lamplit.store.published_stores import require_writable
from lamplit.store.table.rows import Row, metadata_name
from lamplit.store.table.store_metadata import require_kind
from lamplit.store.table.table_writing import StoreExistsError
from lamplit.towers.identity import TowerIdentity

COMMIT_SECONDS = 15.0  # at most this much work is lost when the process is killed
COMMIT_ROWS = 4096
# Rows that keep their vectors cost no work of the tower. Many together are new columns, and no new vectors.
COMMIT_KEPT_ROWS = 65536
COMPARED_ROWS = 4096  # rows whose stored texts and metadata are read at once
_TO_HAVE_BOTH = "to have both, embed the folder that both are in, or give another --out"
logger = logging.getLogger(__name__)


class StoreWriter:
    """Collects rows and commits them, each commit atomic: what is in the store is whole and there once.

    Several processes may write to one store. A row whose id another one has added meanwhile is left as it is there.

    Args:
        out: the store.
        tower: that makes the vectors.
        centered: whether a new store is to be centred.
        before: what the store had when the run began, if that is known; else it is read, and an older table prepared.

    Attributes:
        before: what the store had when the run began.
        store: None until the first commit makes it.
        updated: how many rows were replaced.
        without_text: how many images have no text.
        not_kept: how many values of metadata could not be kept, by column.
        notes: what to know about the store, in plain sentences.
    """

    def __init__(
        self, out: str | Path, tower: TowerIdentity, *, centered: bool, before: StoredRows | None = None
    ) -> None:
        self.store: Store | None = None
        self._new_ids = KeySet()  # that the source has named, and the store does not have
        self.updated = self.without_text = 0
        self.not_kept: Counter[str] = Counter()
        self.notes: list[str] = []
        self._out, self._tower, self._centered = out, tower, centered
        self._backend = "none"
        self._rows: list[Row] = []
        self._kept: list[Row] = []
        self._unchanged: list[Row] = []  # of which some belong to those
        self._named: dict[str, None] = {}  # the columns that the source has named so far
        self._num_replaced = 0  # images that took the place of others
        self._first_replaced: tuple[str, str] | None = None  # paths of the first of these, before and after
        self._of_others: Counter[str] = Counter()  # values of other contents, by columns that the source does not name
        self._contents = Contents()
        self._last_commit = time.monotonic()
        require_writable(out)
        if Store.exists(out):
            self._open(prepares=before is None)
        # Another Store, which stays at this version: two files that swap their names give each other their vectors.
        self.before = before or StoredRows(None if self.store is None else Store(out))
        self.before.is_seen[:] = False

    def note(self, ids: Sequence[str]) -> list[bool]:
        """Note that the source names these ids; return for each whether this is the first time."""
        keys = keys_of(ids)
        places = self.before.find(keys)
        is_first = places < 0
        if is_first.any():
            is_first[is_first] = self._new_ids.add(keys[is_first])
        there, first = np.unique(places, return_index=True)
        there, first = there[there >= 0], first[there >= 0]
        is_first[first] = ~self.before.is_seen[there]
        self.before.is_seen[there] = True
        flags: list[bool] = is_first.tolist()
        return flags

    def find_copies(self, hashes: Sequence[str]) -> NDArray[np.bool_]:
        """Tell which images of a batch, (B,), have the content of an earlier one of this run."""
        return self._contents.find(hashes, self.store)

    def add(self, pairs: Sequence[Pair], hashes: Sequence[str], vectors: Tensor, backend: str) -> None:
        """Take images that `backend` embedded, with their (B, D) vectors; `commit_if_due` comes after."""
        self._backend = backend
        self._take(pairs, hashes, vectors)
        for content_hash, vector in zip(hashes, vectors, strict=True):
            self._contents.add(content_hash, vector)

    def add_copies(self, pairs: Sequence[Pair], hashes: Sequence[str]) -> list[Pair]:
        """Take images with the vectors of earlier ones of this run; return those of which the tower gave none."""
        vectors = [self._contents.vectors.get(content_hash) for content_hash in hashes]
        found = [(*each, vector) for *each, vector in zip(pairs, hashes, vectors, strict=True) if vector is not None]
        if found:
            self._take(*zip(*found, strict=True))
        return [pair for pair, vector in zip(pairs, vectors, strict=True) if vector is None]

    def reuse(self, stored: Sequence[tuple[Pair, str]]) -> None:
        """Take images whose content the store has under other ids, with the vectors that are there."""
        if stored:
            pairs, hashes = zip(*stored, strict=True)
            self._take(pairs, hashes, self.before.vectors(hashes))

    def keep(self, unchanged: Sequence[tuple[Pair, str]]) -> None:
        """Take images whose vectors are in the store; write those whose texts, metadata or path are new."""
        self._unchanged += [self._row(pair, content_hash, None, None) for pair, content_hash in unchanged]
        if len(self._unchanged) >= COMPARED_ROWS:
            self._compare()

    def _compare(self) -> None:
        """Compare rows of unchanged images with what is stored."""
        rows, self._unchanged = self._unchanged, []
        self._kept += self.before.unlike(rows)

    def commit_if_due(self) -> None:
        """Commit what was taken if there is much of it, or if the last commit was long ago."""
        if len(self._rows) >= COMMIT_ROWS or time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self._commit()
        if len(self._kept) >= COMMIT_KEPT_ROWS:
            self._commit_kept()

    def finish(self, root: Path | None, *, prune: bool) -> tuple[int, int]:
        """Commit what is left; count the rows that are missing below `root` and stay, and those that were deleted."""
        self.commit()
        if self.store is None:
            return 0, 0
        missing = self.before.missing(root)
        if prune and missing:  # after the commit: what was moved has its new row before it loses the old one
            self.store.delete(missing)
        self.store.finish()
        return (0, len(missing)) if prune else (len(missing), 0)

    def commit(self) -> None:
        """Commit all that was taken; notes tell of images that took the place of others."""
        self._commit()
        self._compare()
        self._commit_kept()
        if self._first_replaced:
            old, new = self._first_replaced
            self.notes.append(
                f"images that took the place of others of the same id, whose files are still there: "
                f"{self._num_replaced:,}, such as {new} of {old}; {_TO_HAVE_BOTH}"
            )
        if self._of_others:
            found = ", ".join(f"{count:,} of {name}" for name, count in self._of_others.items())
            self.notes.append(
                f"values that were stored for other contents of the same images, and stay: {found}; the source does "
                "not name these columns. With them in the source, empty cells too, they are written anew"
            )

    def _open(self, *, prepares: bool = True) -> None:
        self.store = Store(self._out)
        self.store.require_tower(self._tower)
        require_kind(self.store.backend, self.store.path, of_texts=False)
        if self._centered and not self.store.centered:
            raise StoreError(f"{self._out} was made without --mean-center; give another --out to have a centred store")
        if prepares:
            self.notes += self.store.prepare_to_write()

    def _take(self, pairs: Sequence[Pair], hashes: Sequence[str], vectors: Iterable[Tensor]) -> None:
        stored = self.before.read([pair.id for pair in pairs])
        self._rows += map(self._row, pairs, hashes, vectors, stored)

    def _row(self, pair: Pair, content_hash: str, vector: Tensor | None, stored: StoredRow | None) -> Row:
        path = pair.path
        self.without_text += not pair.texts
        if stored and stored.hash != content_hash and stored.path != path and _is_other(stored.path, path):
            self._num_replaced += 1
            if self._first_replaced is None:  # at once: a long run can be stopped before it has replaced more
                logger.warning(
                    "%s takes the place of %s, which is still there: both have the id %r; %s",
                    path, stored.path, pair.id, _TO_HAVE_BOTH,
                )  # fmt: skip
                self._first_replaced = (stored.path, path)
        return Row(pair.id, path, content_hash, pair.texts, vector, self._metadata(pair))

    def _metadata(self, pair: Pair) -> Mapping[str, Any]:
        """Return the values to write by their columns; a column that the source has named before is empty, then."""
        if pair.not_kept:
            self.not_kept.update(map(metadata_name, pair.not_kept))
        if not pair.metadata:
            return self._named
        values: dict[str, Any] = {}
        refused = []
        for column, value in pair.metadata.items():
            name = metadata_name(column)
            if name in values:  # of `a.b` and `a_b`, one is kept
                self.not_kept[column] += value not in (None, values[name])
            elif self.before.refuses(name, value):
                self.not_kept[name] += 1
                refused.append(name)
            else:
                values[name] = value
        if not self._named.keys() >= values.keys():
            self._named = self._named | dict.fromkeys(values)  # rows have the one before
        row: dict[str, Any] = self._named | values
        for name in refused:
            row.pop(name, None)
        return row

    def _commit(self) -> None:
        rows, self._rows = self._rows, []
        self._last_commit = time.monotonic()
        if rows and not self._create(rows):
            if self.store is None:
                self._open()  # another process made it a moment ago
            assert self.store is not None
            stored = self.before.read([row.id for row in rows])
            changed = [self._filled(row, old) for row, old in zip(rows, stored, strict=True) if old]
            for row, old in zip(rows, stored, strict=True):
                if old and old.hash != row.hash:
                    named = self._named.keys() | row.metadata.keys()
                    self._of_others.update(
                        name for name, value in old.metadata.items() if value is not None and name not in named
                    )
            self.updated += len(changed)
            self._append([row for row, old in zip(rows, stored, strict=True) if old is None])
            self.store.replace(changed)
        self._contents.commit()

    def _append(self, rows: Sequence[Row]) -> None:
        assert self.store is not None, "it is made or opened before"
        self.store.append(rows)

    def _commit_kept(self) -> None:
        rows, self._kept = self._kept, []
        if rows and self.store is not None:
            self.updated += len(rows)
            stored = self.before.read([row.id for row in rows])
            self.store.replace([self._filled(row, old) for row, old in zip(rows, stored, strict=True) if old])

    def _create(self, rows: Sequence[Row]) -> bool:
        """Make the store of its first rows; return False if there is one."""
        if self.store is not None:
            return False
        names = list(dict.fromkeys(name for row in rows for name in row.metadata))
        try:
            self.store = Store.create(
                self._out,
                self._tower,
                rows,
                backend=self._backend,
                centered=self._centered,
                metadata_columns=names,
            )
        except StoreExistsError:
            return False
        return True

    def _filled(self, row: Row, stored: StoredRow) -> Row:
        """Give a row what is stored in the columns that it does not name, but others of its block do."""
        others = {name: stored.metadata.get(name) for name in self._named if name not in row.metadata}
        return replace(row, metadata=others | dict(row.metadata)) if others else row


def _is_other(stored: str, path: str) -> bool:
    """Tell whether a path of a store leads into another file than `path` does, which is there."""
    file = file_holding(stored)
    return os.path.isabs(file) and file != file_holding(path) and file_exists(file)
