"""What has become of the units of a source: a file for each in the store, and the commits that take many at once.

A unit is done by whoever writes its record first. The record names fragments that lie beside the table; a committer
adds those of all such units in one commit, and then marks them. If it dies between the two, the table itself tells that
the fragments are in it. Nothing here is needed by who reads a store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lance.fragment import FragmentMetadata

from lamplit.data.skipped import Skipped
from lamplit.errors import StoreError
from lamplit.locations.paths import path_of, write_new, write_whole
from lamplit.store.embed_report import EmbedReport
from lamplit.store.table.store_lock import store_lock
from lamplit.store.table.table_opening import open_table
from lamplit.store.table.table_writing import append_staged, fits, is_conflict, read_staged, stage_rows

_FOLDER = "_units"  # in the store, where Lance leaves it alone
_RECORD, _MARK = ".json", ".committed"
_ATTEMPTS = 20


@dataclass
class UnitRecord:
    """A unit that was embedded.

    Attributes:
        name: of the unit.
        report: what was done.
        fragments: where its new rows are; rows that the store had before are changed there at once.
    """

    name: str
    report: EmbedReport
    fragments: list[FragmentMetadata]

    def to_json(self) -> str:
        """Return the text of its file."""
        fragments = [fragment.to_json() for fragment in self.fragments]
        return json.dumps({"unit": self.name, "fragments": fragments, "report": asdict(self.report)})

    @classmethod
    def from_json(cls, text: str) -> UnitRecord:
        """Read it again."""
        values = json.loads(text)
        report = values["report"]
        report["skipped"] = [Skipped(**each) for each in report["skipped"]]
        fragments = [FragmentMetadata.from_json(json.dumps(each)) for each in values["fragments"]]
        return cls(values["unit"], EmbedReport(**report), fragments)


class UnitRecords:
    """The records of a store, by the names of the units; they are there before the table is, and as long as it is."""

    def __init__(self, store: str | Path) -> None:
        self._folder = path_of(store) / _FOLDER

    def done(self) -> set[str]:
        """Name the units that were embedded, committed or not."""
        return self._named(_RECORD)

    def committed(self) -> set[str]:
        """Name the units that are in the table."""
        return self._named(_MARK)

    def staged(self) -> list[str]:
        """Name the units that were embedded and are not known to be in the table."""
        return sorted(self.done() - self.committed())

    def read(self, name: str) -> UnitRecord:
        """Return the record of a unit."""
        return UnitRecord.from_json(self._file(name).read_text(encoding="utf-8"))

    def put(self, record: UnitRecord) -> bool:
        """Write a record, whole; if another attempt at its unit was first, delete the fragments and return False."""
        self._folder.mkdir(parents=True, exist_ok=True)
        is_first = write_new(self._file(record.name), record.to_json().encode())
        if not is_first:
            for file in (file for fragment in record.fragments for file in fragment.files):
                (self._folder.parent / "data" / file.path).unlink(missing_ok=True)
        return is_first

    def replace(self, record: UnitRecord) -> None:
        """Write a record in the place of that of the same unit."""
        write_whole(self._file(record.name), record.to_json())

    def mark(self, name: str) -> None:
        """Note that a unit is in the table."""
        self._file(name).with_suffix(_MARK).write_bytes(b"")

    def drop(self, names: Iterable[str]) -> None:
        """Forget units of which the table has no row, so that they are embedded again."""
        for name in names:
            self._file(name).with_suffix(_MARK).unlink(missing_ok=True)
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}{_RECORD}"

    def _named(self, ending: str) -> set[str]:
        try:
            names = [file.name for file in self._folder.iterdir()]
        except FileNotFoundError:
            return set()
        return {name.removesuffix(ending) for name in names if name.endswith(ending) and not name.startswith(".")}


def commit_units(store: str | Path, *, patience: float | None = None) -> None:
    """Commit all units that are staged in a store, whoever embedded them; several may do it at once.

    Units whose columns have been widened since they were staged are written anew. Those whose files are gone are
    forgotten. Without a table, which the first unit with rows makes, nothing is done.

    Args:
        store: where it is.
        patience: seconds to wait for another committer; by default a minute.

    Raises:
        StoreBusyError: another process holds the lock for longer.
        StoreError: the disk is full, or others change the columns all the time.
    """
    records = UnitRecords(store)
    failures = 0
    while records.staged() and (table := open_table(store)) is not None:
        try:
            with store_lock(store, "commits units", patience):
                table.checkout_latest()
                late = _commit_fitting(table, records)
        except OSError as error:
            failures += 1
            if not is_conflict(error):
                raise
            if failures == _ATTEMPTS:
                raise StoreError(f"{store} is changed by others all the time: {_ATTEMPTS} commits failed") from error
            time.sleep(0.05 * failures)
            continue
        if late is None:
            return
        # Not under the lock, which widening takes, too; and one at a time, so that its values settle the columns.
        rows = (rows for fragment in late.fragments for rows in read_staged(table, fragment))
        late.fragments = [fragment for block in rows for fragment in stage_rows(table, block)]
        records.replace(late)


def _commit_fitting(table: Any, records: UnitRecords) -> UnitRecord | None:
    """Commit and mark the staged units that fit the table; return the first that does not."""
    there = {file.path for fragment in table.get_fragments() for file in fragment.data_files()}
    new: list[UnitRecord] = []
    late: UnitRecord | None = None
    present: list[str] = []
    for name in records.staged():
        record = records.read(name)
        files = [file.path for fragment in record.fragments for file in fragment.files]
        if there.issuperset(files):  # a committer ended before it could say so; or there are none
            present.append(name)
        elif not all((path_of(table.uri) / "data" / file).exists() for file in files):
            records.drop([name])
        elif fits(table, record.fragments):
            new.append(record)
        else:
            late = late or record
    if new:
        append_staged(table, [fragment for record in new for fragment in record.fragments])
    for name in [*present, *(record.name for record in new)]:
        records.mark(name)
    return late
