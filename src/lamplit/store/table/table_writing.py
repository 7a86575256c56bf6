"""How rows get into a table that several processes may write to: every commit merges with what others committed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import lance
import numpy as np
import pyarrow as pa
from lance.commit import CommitConflictError
from lance.file import LanceFileReader
from lance.fragment import FragmentMetadata, write_fragments
from numpy.typing import NDArray

from lamplit.errors import LamplitError, StoreError
from lamplit.locations.addresses import is_remote
from lamplit.locations.object_errors import known_reason
from lamplit.locations.paths import lance_options
from lamplit.store.table.rows import FIXED_COLUMNS, Row, to_table
from lamplit.store.table.schema_changes import allow_empty_cells, make_room
from lamplit.store.table.store_lock import StoreBusyError, store_lock
from lamplit.store.table.table_opening import open_table

# With it, Lance sees that two processes insert the same id at once, and tries the second again.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}
# A reader goes on with the version that it opened. It is deleted when a newer one has been there for so long.
KEPT_FOR = timedelta(days=1)
# Merging fragments writes them anew, so a run that adds a few rows to a large store leaves it for later.
_MOST_FRAGMENTS = 16
_MOST_DELETED = 0.2
# A scan reads fragments of so many rows as fast as one of a million, and single rows take twice as long. In a larger
# table than that, to write them all anew would take hours, and twice the disk.
_LARGE_FRAGMENT, _LARGE_TABLE = 16_384, 20_000_000
_IDS_TOGETHER = 4096  # in one condition
_ATTEMPTS = 20
# Above it, new columns for whole fragments are smaller than whole new rows for some.
_SHARE_FOR_COLUMNS = 0.05
Written = TypeVar("Written")
_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EFBIG: "a file may not grow further",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
}


class StoreExistsError(Exception):
    """Another process has just made the store."""


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Make one sentence of what a disk has against a write, in the words of Lance.

    Raises:
        StoreError: the disk is full, read-only or not the user's.
    """
    try:
        yield
    except OSError as error:
        for number, reason in _REASONS.items():
            if f"(os error {number})" in str(error) or error.errno == number or os.strerror(number) in str(error):
                raise StoreError(_not_written(path, reason)) from error
        if is_remote(path) and (said := known_reason(error)):
            raise StoreError(_not_written(path, said)) from error
        raise


def _not_written(path: str, reason: str) -> str:
    return f"{path} cannot be written: {reason}; what was committed before is kept, and the next run goes on"


def create_table(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a new table in one commit, in a stream.

    Raises:
        StoreExistsError: there is a table.
        LamplitError: `batches` raised it.
        StoreBusyError: another process has been making it for more than a minute.
    """
    # Lance looks whether there is a table before it writes, not when it commits, and that may be long after.
    with explained(path):
        if not is_remote(path):
            Path(path).mkdir(parents=True, exist_ok=True)  # where the lock is
        with store_lock(path, "makes the store"):
            if open_table(path) is not None:
                raise StoreExistsError
            try:
                _write(path, schema, batches, "create")
            except OSError as error:
                if "already exists" in str(error):  # by other software, which knows no lock
                    raise StoreExistsError from None
                raise


def append_batches(table: Any, batches: Iterable[pa.RecordBatch]) -> None:
    """Add rows of the table's schema in one commit, in a stream. Their ids must be new: hold `store_lock`.

    Raises:
        LamplitError: `batches` raised it.
    """
    _write(table.uri, table.schema, batches, "append")
    table.checkout_latest()


def _write(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], mode: str) -> None:
    failures: list[LamplitError] = []

    def passed() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except LamplitError as error:  # Lance raises an error of its own instead
            failures.append(error)
            raise

    try:
        with explained(path):
            reader = pa.RecordBatchReader.from_batches(schema, passed())
            lance.write_dataset(reader, path, schema=schema, mode=mode, storage_options=lance_options(path))
    except OSError:
        if failures:
            raise failures[0] from None
        raise


def prepare_table(table: Any) -> list[str]:
    """Let several processes write at once, delete rows that are no use, and let columns of other software be empty.

    Other software adds columns that must not be empty, and then no image could be added. Into a table of an earlier
    lamplit it could write rows without a vector. Rows were doubled by two writers of an earlier lamplit.

    Returns:
        What of that there was to do, in plain sentences.
    """
    notes = []
    _require_key(table)
    if doubled := _delete_doubled(table):
        notes.append(
            f"{doubled} rows of {table.uri} were there twice, left by two writers at once; one of each is kept"
        )
    if missing := _require_vectors(table):
        notes.append(f"{missing} rows of {table.uri} had no vector, left by other software; they are deleted")
    return notes + [
        f"the column {name} of {table.uri}, which other software added, may be empty from now on"
        for name in allow_empty_cells(table)
    ]


def insert_rows(table: Any, rows: Sequence[Row]) -> int:
    """Add the rows whose ids are new in one commit; return how many these are."""

    def write() -> int:
        new = _as_table(table, rows, [*FIXED_COLUMNS, "vector"])
        return int(table.merge_insert("id").when_not_matched_insert_all().execute(new)["num_inserted_rows"])

    return _committed(table, rows, write)


def stage_rows(table: Any, rows: Sequence[Row]) -> list[FragmentMetadata]:
    """Write rows beside a table, with columns as it has them now, and commit nothing; return what is to be."""

    def write() -> list[FragmentMetadata]:
        staged = write_fragments(_as_table(table, rows, [*FIXED_COLUMNS, "vector"]), table, mode="append")
        return cast("list[FragmentMetadata]", staged)

    return _committed(table, rows, write) if rows else []


def read_staged(table: Any, fragment: FragmentMetadata) -> Iterator[list[Row]]:
    """Yield the rows of a fragment that was staged, in blocks."""
    import torch  # not needed to read a store, and slow to import

    [file] = fragment.files
    name = f"{table.uri}/data/{file.path}"
    for batch in (
        LanceFileReader(name, storage_options=lance_options(name)).read_all(batch_size=_IDS_TOGETHER).to_batches()
    ):
        halves = torch.from_numpy(_halves(batch["vector"]).copy())
        cells = batch.drop_columns(["vector", *FIXED_COLUMNS]).to_pylist()
        fixed = (batch[name].to_pylist() for name in FIXED_COLUMNS)
        yield list(map(Row, *fixed, halves, cells))


def fits(table: Any, fragments: Iterable[FragmentMetadata]) -> bool:
    """Tell whether staged fragments have their columns as a table has them; not if one has been widened since."""
    known = set(_field_ids(table.lance_schema.fields()))
    return all(known.issuperset(file.fields) for fragment in fragments for file in fragment.files)


def append_staged(table: Any, fragments: Sequence[FragmentMetadata]) -> None:
    """Add staged fragments in one commit, which succeeds or fails as a whole. Hold `store_lock`.

    Raises:
        OSError: the columns are changed at this moment.
    """
    with explained(table.uri):
        lance.LanceDataset.commit(table, lance.LanceOperation.Append(list(fragments)), read_version=table.version)
    table.checkout_latest()


def replace_rows(table: Any, rows: Sequence[Row]) -> None:
    """Replace rows by id in one commit: the columns that they name, and the vectors that they have."""

    def write() -> int:
        update = table.merge_insert("id").when_matched_update_all()
        if all(row.vector is None for row in rows):
            share = len(rows) / max(1, table.count_rows())
            update = update.write_mode("rewrite_columns" if share > _SHARE_FOR_COLUMNS else "rewrite_rows")
            new = _as_table(table, rows, list(FIXED_COLUMNS))
        else:
            new = _as_table(table, _with_vectors(table, rows), [*FIXED_COLUMNS, "vector"])
        return int(update.execute(new)["num_updated_rows"])

    _committed(table, rows, write)


def delete_rows(table: Any, ids: Sequence[str]) -> None:
    """Delete rows by id, in commits of some thousands; unknown ids are ignored."""
    with explained(table.uri), store_lock(table.uri, "deletes rows"):
        for start in range(0, len(ids), _IDS_TOGETHER):
            table.delete(_condition(ids[start : start + _IDS_TOGETHER]))


def tidy(table: Any, kept_for: timedelta = KEPT_FOR, *, merges: bool = True) -> None:
    """Merge small fragments if it `merges`, and delete the versions replaced long enough ago, with their files.

    If another process writes at this moment, its work goes first, and the next run tidies.
    """
    table.checkout_latest()
    merges = merges and _has_much_to_merge(table)
    if not (merges or _old_versions(table, kept_for)):
        return  # a store that the user may only read needs no lock
    with suppress(StoreBusyError), explained(table.uri), store_lock(table.uri, "cleans up", patience=0):
        try:
            if merges:
                table.optimize.compact_files()
                table.checkout_latest()
            if old := _old_versions(table, kept_for):
                table.cleanup_old_versions(versions=old, error_if_tagged_old_versions=False)
        except OSError as error:
            if not is_conflict(error):
                raise


def _require_key(table: Any) -> None:
    """Declare the ids the key of a table that was made before they were."""
    field = table.schema.field("id")
    if b"lance-schema:unenforced-primary-key" not in (field.metadata or {}):
        with suppress(OSError):  # another process does it, or other software wrote rows without an id
            table.alter_columns({"path": "id", "nullable": False})
            table.update_field_metadata({"id": PRIMARY_KEY})
            table.checkout_latest()


def _require_vectors(table: Any) -> int:
    """Declare that every row of an older table has a vector; count the rows without one, which are deleted."""
    if not table.schema.field("vector").nullable:
        return 0
    with explained(table.uri), store_lock(table.uri, "deletes rows"):
        table.checkout_latest()
        if missing := int(table.count_rows("vector IS NULL")):
            table.delete("vector IS NULL")
        with suppress(OSError):  # another process does it, or other software writes more of them
            table.alter_columns({"path": "vector", "nullable": False})
        table.checkout_latest()
    return missing


def _delete_doubled(table: Any) -> int:
    """Delete the rows whose id comes again later, as writers of an earlier lamplit could leave them; count them."""
    if not len(_doubled(table)):
        return 0
    with explained(table.uri), store_lock(table.uri, "deletes rows"):
        table.checkout_latest()
        doubled = _doubled(table)  # another process may have done it
        for start in range(0, len(doubled), _IDS_TOGETHER):
            table.delete(f"_rowid IN ({', '.join(map(str, doubled[start : start + _IDS_TOGETHER]))})")
    return len(doubled)


def _doubled(table: Any) -> list[int]:
    """Return the row ids of Lance of all rows but the last of each id."""
    hashes = [
        np.fromiter(map(hash, batch["id"].to_pylist()), np.int64, len(batch))
        for batch in table.to_batches(columns=["id"])
    ]
    if not hashes or len(np.unique(np.concatenate(hashes))) == sum(map(len, hashes)):
        return []  # nearly always, and in 8 bytes a row
    found = table.to_table(columns=["id"], with_row_id=True)
    last = dict(zip(found["id"].to_pylist(), found["_rowid"].to_pylist(), strict=True)).values()
    doubled: list[int] = np.setdiff1d(found["_rowid"].to_numpy(), np.array(list(last), np.uint64)).tolist()
    return doubled


def _has_much_to_merge(table: Any) -> bool:
    fragments, rows = table.get_fragments(), table.count_rows()
    deleted = sum(fragment.num_deletions for fragment in fragments)
    are_small = rows < max(_LARGE_TABLE, _LARGE_FRAGMENT * len(fragments))
    return bool((len(fragments) > _MOST_FRAGMENTS and are_small) or deleted > _MOST_DELETED * rows)


def _old_versions(table: Any, kept_for: timedelta) -> list[int]:
    limit = datetime.now() - kept_for
    return [
        version["version"]
        for version, next_one in pairwise(table.versions())
        if next_one["timestamp"].replace(tzinfo=None) <= limit
    ]


def _committed(table: Any, rows: Sequence[Row], write: Callable[[], Written]) -> Written:
    """Write rows to the newest version of a table; again, if another process changed it meanwhile."""
    for attempt in range(_ATTEMPTS):
        table.checkout_latest()
        schema = table.schema
        try:
            with explained(table.uri):
                make_room(table, rows)
                schema = table.schema
                return write()
        except OSError as error:
            table.checkout_latest()
            if not is_conflict(error) and table.schema == schema:
                raise
            time.sleep(0.05 * attempt)
    raise StoreError(f"{table.uri} is written by others all the time: a commit failed {_ATTEMPTS} times; run it again")


def is_conflict(error: OSError) -> bool:
    """Tell whether another process committed first; merging fragments says so in words alone."""
    return isinstance(error, CommitConflictError) or any(
        word in str(error) for word in ("ontention", "commit conflict")
    )


def _as_table(table: Any, rows: Sequence[Row], columns: list[str]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row.metadata)
    return to_table(rows, table.schema, [*columns, *names])


def _with_vectors(table: Any, rows: Sequence[Row]) -> list[Row]:
    """Give the rows without a vector the one that is stored; a row that has none there either is gone meanwhile."""
    import torch  # not needed to read a store, and slow to import

    ids = [row.id for row in rows if row.vector is None]
    vectors: dict[str, torch.Tensor] = {}
    for start in range(0, len(ids), _IDS_TOGETHER):
        found = table.to_table(columns=["id", "vector"], filter=_condition(ids[start : start + _IDS_TOGETHER]))
        halves = torch.from_numpy(_halves(found["vector"].combine_chunks()).copy())
        vectors |= dict(zip(found["id"].to_pylist(), halves, strict=True))
    filled = (row if row.vector is not None else replace(row, vector=vectors.get(row.id)) for row in rows)
    return [row for row in filled if row.vector is not None]


def _halves(column: pa.Array) -> NDArray[np.float16]:
    halves: NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return halves


def _field_ids(fields: Iterable[Any]) -> Iterator[int]:
    for field in fields:
        yield field.id()
        yield from _field_ids(field.children())


def _condition(ids: Sequence[str]) -> str:
    listed = ", ".join("'" + name.replace("'", "''") + "'" for name in ids)
    return f"id IN ({listed})"
