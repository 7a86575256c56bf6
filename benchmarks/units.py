"""What a store of 400 million rows asks of those who make it: commits, manifest, memory, by real commits.

    python benchmarks/units.py [--rows 400000000] [--together 12] [--quick]

One unit of 250,000 rows is written, as a process of `embed --shard` would stage it, with vectors of 8 numbers. Every
other unit is that one again, by links to its files: what a commit costs depends on fragments and columns, not on what
is in them. A commit takes `--together` units, which is what 16 GPUs of 1,000 images a second make in three minutes.
Memory is resident anonymous memory of this process, less what it had before the first commit.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import psutil
import torch
from lance.fragment import FragmentMetadata
from rich.table import Table
from scale import anonymous
from timing import console, filled, finish, parser

import lamplit
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.store.embed.stored_rows import StoredRows
from lamplit.store.embed.unit_embedding import STAGED_ROWS
from lamplit.store.embed_report import EmbedReport
from lamplit.store.table.rows import Row
from lamplit.store.table.store_metadata import StoreMetadata
from lamplit.store.table.table_writing import create_table, stage_rows
from lamplit.store.unit_records import UnitRecord, UnitRecords, commit_units
from lamplit.towers.identity import TowerIdentity

UNIT_ROWS, WIDTH = 250_000, 8


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=400_000_000, help="of the whole store")
    options.add_argument("--together", type=int, default=12, help="units in a commit")
    options = filled(options.parse_args())
    options.turns = 1
    if options.quick:
        options.rows = 24 * UNIT_ROWS
    with tempfile.TemporaryDirectory() as folder:
        figures = simulate(Path(folder) / "units.lance", options.rows // UNIT_ROWS, options.together)
    table = Table("", "", title=f"{options.rows:,} rows in {options.rows // UNIT_ROWS:,} units")
    for name, value in figures.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:,}")
    console.print(table)
    finish(options, [{"title": "units", "figures": figures}])


def simulate(out: Path, units: int, together: int) -> dict[str, Any]:
    """Make the store, commit by commit, and look at it."""
    first = first_unit(out)
    records, process = UnitRecords(out), psutil.Process()
    seconds: list[float] = []
    before = most = anonymous(process)
    for start in range(0, units, together):
        for number in range(start, min(start + together, units)):
            records.put(UnitRecord(f"{number:032x}", EmbedReport(str(out), "made:up"), linked(out, first, number)))
        seconds.append(timed(lambda: commit_units(out))[0])
        most = max(most, anonymous(process))
    opening, store = timed(lambda: lamplit.Store(out))
    reading, found = timed(lambda: [records.read(name) for name in records.committed()])
    files = {file.path for record in found for fragment in record.fragments for file in fragment.files}
    beside, rows = timed(lambda: StoredRows(lamplit.Store(out), files))
    manifests = [file.stat().st_size for file in (out / "_versions").glob("*.manifest")]
    return {
        "rows": len(store),
        "fragments": len(store.fragments()),
        "commits": len(seconds),
        "first commit": f"{seconds[0]:.2f} s",
        "median of the last ten commits": f"{float(np.median(seconds[-10:])):.2f} s",
        "memory of the committer": f"{(most - before) / 1e6:.0f} MB",
        "largest manifest": f"{max(manifests) / 1e6:.1f} MB",
        "all manifests": f"{sum(manifests) / 1e6:.0f} MB",
        "records of units": f"{sum(file.stat().st_size for file in (out / '_units').iterdir()) / 1e6:.0f} MB",
        "a reader opens the store": f"{opening:.2f} s",
        "a process that goes on reads the records": f"{reading:.2f} s",
        "and finds rows that are not of units": f"{beside:.2f} s, {len(rows.is_seen)} rows",
    }


def first_unit(out: Path) -> list[FragmentMetadata]:
    """Make an empty store, and stage the rows of one unit."""
    gray = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)
    tower = TowerIdentity("made:up", "0" * 32, WIDTH, gray, {"library": "module", "name": "made.up"})
    create_table(str(out), StoreMetadata(tower, "torch", False).schema({}), [])
    table = lance.dataset(str(out))
    staged: list[FragmentMetadata] = []
    for rows in blocks():
        staged += stage_rows(table, rows)
    return staged


def blocks() -> Iterator[list[Row]]:
    vectors = torch.nn.functional.normalize(torch.randn(STAGED_ROWS, WIDTH), dim=-1)
    for start in range(0, UNIT_ROWS, STAGED_ROWS):
        numbers = range(start, min(start + STAGED_ROWS, UNIT_ROWS))
        yield [
            Row(
                f"shard-00001/{n:09}", f"shard-00001.tar/{n:09}.jpg", f"{n:032x}", ["a caption"], vectors[n - start], {}
            )
            for n in numbers
        ]


def linked(out: Path, fragments: list[FragmentMetadata], number: int) -> list[FragmentMetadata]:
    """Give a unit files of its own, which are links to those of another."""
    own = []
    for place, fragment in enumerate(fragments):
        [file] = fragment.files
        name = f"{number:06}-{place}.lance"
        os.link(out / "data" / file.path, out / "data" / name)
        described = json.dumps(fragment.to_json())
        own.append(FragmentMetadata.from_json(described.replace(file.path, name)))
    return own


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found


if __name__ == "__main__":
    main()
