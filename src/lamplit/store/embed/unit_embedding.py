"""Units of a source that are embedded apart, by any number of processes, and end up in one store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from lance.fragment import FragmentMetadata

from lamplit.data.pairs import Pairs
from lamplit.data.skipped import Skipped
from lamplit.data.units import Unit, pairs_of, plan_units
from lamplit.errors import StoreError
from lamplit.progress import progress_bar
from lamplit.store.embed.backends import BackendName
from lamplit.store.embed.contents import Contents
from lamplit.store.embed.embedding_pass import Runner, embed_pairs
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.embed.stored_rows import StoredRows
from lamplit.store.embed_report import EmbedReport, list_skipped
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.store.table.store_lock import StoreBusyError, store_lock
from lamplit.store.table.store_metadata import StoreMetadata
from lamplit.store.table.table_opening import open_table
from lamplit.store.table.table_writing import StoreExistsError, create_table, stage_rows
from lamplit.store.unit_records import UnitRecord, UnitRecords, commit_units
from lamplit.towers.images.image_tower import ImageTower

COMMIT_SECONDS = 180.0  # between the commits of a process that goes on embedding
PATIENCE = 900.0  # seconds that a process waits with its last commit: many may end at once
STAGED_ROWS = 32_768  # of a fragment


@dataclass(frozen=True)
class HowToEmbed:
    """Options of `embed` that a unit needs."""

    centered: bool
    backend: BackendName
    device: torch.device
    batch_size: int
    workers: int
    max_pixels: int


class UnitEmbedder:
    """Embeds units of one source into one store; what the store held is read once, when it is made.

    Attributes:
        units: all units of the source, in its order.
        records: of the store.
        notes: what to know about the source and the store before any unit is read.
        problems: parts of the source that could not be read before that.
    """

    def __init__(self, pairs: Pairs, tower: ImageTower, out: str | Path, how: HowToEmbed, rows: int | None) -> None:
        self._pairs, self._out, self._how = pairs, out, how
        self._tower = tower.identity()
        self.units = plan_units(pairs, salt=self._tower.fingerprint, rows=rows)
        self.records = UnitRecords(out)
        writer = StoreWriter(out, self._tower, centered=how.centered, before=self._rows_beside())
        self._before = writer.before
        self._runner = Runner(tower, how.backend, how.device, pairs.count, how.batch_size)
        self.problems, self.notes = list(pairs.problems), [*pairs.notes, *writer.notes]
        self._num_notes = len(pairs.notes)

    def _rows_beside(self) -> StoredRows | None:
        """Read the rows that no unit of this source has made; the ids and images of its units are others.

        Returns:
            These rows; None if no unit is committed yet, and the table has to be prepared.
        """
        committed = self.records.committed().intersection(unit.name for unit in self.units)
        fragments = chain.from_iterable(self.records.read(name).fragments for name in committed)
        files = {file.path for fragment in fragments for file in fragment.files}
        return StoredRows(Store(self._out), files) if files else None

    def left(self) -> list[Unit]:
        """List the units that nobody has embedded yet."""
        done = self.records.done()
        return [unit for unit in self.units if unit.name not in done]

    def embed(self, unit: Unit, advance: Callable[[int], None]) -> EmbedReport | None:
        """Embed a unit and stage its rows; return what was done, None if another process was first.

        Raises:
            PairsError: the source cannot be read.
            TowerError: the backend cannot run the tower.
            StoreError: the store has been made by another tower meanwhile, or the disk is full.
        """
        began = time.monotonic()
        pairs, how = self._pairs, self._how
        del pairs.problems[len(self.problems) :], pairs.notes[self._num_notes :]  # of the units before
        writer = UnitWriter(self._out, self._tower, centered=how.centered, before=self._before)
        report = EmbedReport(str(self._out), self._tower.spec)
        embed_pairs(
            pairs_of(pairs, unit), self._runner, writer, report,
            workers=how.workers, max_pixels=how.max_pixels, advance=advance,
        )  # fmt: skip
        fragments = writer.staged()
        report.skipped += pairs.problems[len(self.problems) :]
        report.updated, report.without_text = writer.updated, writer.without_text
        report.not_kept, report.notes = dict(writer.not_kept), [*pairs.notes[self._num_notes :], *writer.notes]
        report.seconds = time.monotonic() - began
        return report if self.records.put(UnitRecord(unit.name, report, fragments)) else None

    def commit(self) -> None:
        """Commit what is staged, by whomever; if another process is at it, leave it to that one."""
        with suppress(StoreBusyError):
            commit_units(self._out, patience=0)

    def finish(self, report: EmbedReport) -> None:
        """Commit what is staged, list what was skipped in all units, and tidy the store if all are in it.

        Raises:
            StoreError: no image of the whole source could be used, or another process holds the lock.
        """
        commit_units(self._out, patience=PATIENCE)
        names = [unit.name for unit in self.units]
        left = set(names) - self.records.committed()
        report.units, report.units_left = len(names), len(left)
        report.notes = list(dict.fromkeys([*self.notes, *report.notes]))
        report.skipped = list(dict.fromkeys([*self.problems, *report.skipped]))
        with store_lock(self._out, "lists skipped images", PATIENCE):
            done = self.records.done().intersection(names)
            skipped = [item for name in names if name in done for item in self.records.read(name).report.skipped]
            skipped = list(dict.fromkeys([*self.problems, *skipped]))
            report.skipped_file = list_skipped(self._out, skipped)
        if not left - done and not _has_rows(self._out):
            self.records.drop(names)  # so that they are tried again
            raise nothing_embedded(self._pairs.source, skipped, report.skipped_file)
        if not left:
            store = Store(self._out)
            report.notes += store.prepare_to_write()
            store.finish()


class UnitWriter(StoreWriter):
    """Stages new rows, in place of committing them; changed rows of the store are replaced at once."""

    _fragments: Sequence[FragmentMetadata] = ()
    _num_new = 0

    def commit_if_due(self) -> None:
        """Stage what was taken if there is much of it."""
        if len(self._rows) >= STAGED_ROWS:
            self._commit()
            self._contents = Contents()  # what is staged cannot be read from the store
        if len(self._kept) >= STAGED_ROWS:
            self._commit_kept()

    def staged(self) -> list[FragmentMetadata]:
        """Stage the rest; return all that is to be committed.

        Raises:
            StoreError: it does not have as many rows as were staged.
        """
        self.commit()
        found = sum(fragment.physical_rows for fragment in self._fragments)
        if found != self._num_new:
            raise StoreError(f"{self._num_new} rows were written beside {self._out}, and {found} are there; try again")
        return list(self._fragments)

    def _append(self, rows: Sequence[Row]) -> None:
        self._fragments = [*self._fragments, *stage_rows(open_table(self._out), rows)]
        self._num_new += len(rows)

    def _create(self, rows: Sequence[Row]) -> bool:
        """Make an empty table, so that fragments have a place; return False, for the rows are still to be staged."""
        if self.store is None:
            with suppress(StoreExistsError):
                schema = StoreMetadata(self._tower, self._backend, self._centered).schema({})
                create_table(str(self._out), schema, [])
        return False


def embed_shard(embedder: UnitEmbedder, shard: tuple[int, int], report: EmbedReport, *, progress: bool) -> None:
    """Embed the units I, I + N, I + 2N and so on that nobody has embedded yet, and commit them.

    Args:
        embedder: of the whole source.
        shard: I and N.
        report: what the units' own reports are added to.
        progress: show a bar on stderr.
    """
    index, count = shard
    mine = embedder.units[index::count]
    committed_at, kinds = time.monotonic(), Counter[str]()
    embedder.commit()
    with progress_bar("embed", None, shown=progress) as shown:
        for number, unit in enumerate(mine, start=1):
            if unit.name in embedder.records.done():
                continue
            note = f"unit {number} of {len(mine)}{by_kind(kinds)}"
            done = embedder.embed(unit, lambda more, note=note: shown(more, note))  # type: ignore[misc]
            if done is not None:
                report.add(done)
                kinds.update(map(kind_of_reason, done.skipped))
            if time.monotonic() - committed_at >= COMMIT_SECONDS:
                embedder.commit()
                committed_at = time.monotonic()
    embedder.finish(report)


def kind_of_reason(skipped: Skipped) -> str:
    """Return the reason without what it says of the one image.

    Example:
        >>> kind_of_reason(Skipped("a", "a.jpg", "file cannot be read (Permission denied)"))
        'file cannot be read'
    """
    return skipped.reason.partition(" (")[0]


def by_kind(kinds: Counter[str]) -> str:
    """Say how many images were skipped, and the three most frequent kinds of reasons; "" if none was."""
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3))
    return f"; {kinds.total()} skipped: {listed}" if kinds else ""


def nothing_embedded(source: str, skipped: Sequence[Skipped], listed: str | None) -> StoreError:
    """Make the error of a source without any image that could be used."""
    found = "no images" if not skipped else f"none of {len(skipped)} images could be used"
    return StoreError(f"nothing to embed: {found} in {source}{f'; reasons in {listed}' if listed else ''}")


def _has_rows(out: str | Path) -> bool:
    return Store.exists(out) and len(Store(out)) > 0
