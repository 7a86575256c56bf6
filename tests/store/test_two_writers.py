"""Several processes that write to one store: nothing twice, nothing lost, nothing deleted that another one needs."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import pyarrow as pa
import pytest
import torch
from lance.optimize import Compaction
from pyarrow import parquet
from torch.nn import functional as F

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.pairs import Pair
from lamplit.errors import StoreError
from lamplit.store.embed import store_writer
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.exchange import import_vectors
from lamplit.store.lance_store import Store
from lamplit.store.table import store_lock as locking
from lamplit.store.table import table_writing
from lamplit.store.table.rows import Row, to_table
from lamplit.store.table.store_lock import store_lock
from lamplit.store.table.store_metadata import StoreMetadata
from lamplit.towers.identity import TowerIdentity

HALF = (0.5, 0.5, 0.5)
TOWER = TowerIdentity("timm:tower", "f" * 32, 4, Preprocessing((32, 32), HALF, HALF), {"library": "timm"})


def vectors(numbers: Sequence[int]) -> torch.Tensor:
    return F.normalize(torch.tensor([[1.0, number, number % 7, -3.0] for number in numbers]), dim=1)


def add(writer: StoreWriter, numbers: Sequence[int], **metadata: Any) -> None:
    pairs = [Pair(f"{number:04}", b"", (f"text {number}",), metadata) for number in numbers]
    writer.add(pairs, [f"{number:032x}" for number in numbers], vectors(numbers), "torch")
    writer.commit_if_due()


def write_all(out: Path, start: int, stop: int, step: int) -> None:
    store_writer.COMMIT_ROWS = 5
    writer = StoreWriter(out, TOWER, centered=False)
    for number in range(start, stop, step):
        add(writer, [number], **({} if number % 3 else {"n": number if number % 2 else "odd"}))
    writer.finish(None, prune=False)


def require_whole(out: Path, numbers: Sequence[int]) -> None:
    store = Store(out)
    assert store.column("id") == [f"{number:04}" for number in numbers]
    assert store.texts() == [[f"text {number}"] for number in numbers]
    assert torch.equal(store.vectors(), F.normalize(vectors(numbers).half().float(), dim=-1))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pairs.lance"


def test_two_writers_that_began_together(out: Path) -> None:
    first, second = (StoreWriter(out, TOWER, centered=False) for _ in range(2))
    add(first, range(10))
    add(second, range(5, 15), note="theirs")
    for writer in (first, second):  # both make the store
        writer.finish(None, prune=False)
    require_whole(out, range(15))
    assert Store(out).column("note") == [None] * 10 + ["theirs"] * 5
    first, second = (StoreWriter(out, TOWER, centered=False) for _ in range(2))
    add(first, range(12, 20), n=1)
    add(second, range(12, 22), n=1.5)
    for writer in (second, first):
        writer.finish(None, prune=False)
    require_whole(out, range(22))
    assert Store(out).column("n") == [None] * 12 + [1.0] * 3 + [1.5] * 7


def test_store_that_was_made_before_ids_were_a_key(out: Path) -> None:
    Store.create(out, TOWER, [Row("0000", "0000", "0" * 32, ["text 0"], vectors([0])[0], {})], backend="torch")
    table = lance.dataset(str(out)).to_table()
    schema = table.schema.set(0, pa.field("id", pa.string()))
    lance.write_dataset(table.cast(schema), out, mode="overwrite", schema=schema)
    test_two_writers_that_began_together(out)


def test_nothing_young_is_deleted(out: Path) -> None:
    """A file that another process has written, and not committed yet, is there after a run has ended."""
    write_all(out, 0, 30, 1)
    stray = out / "data" / "0123456789abcdef.lance"
    stray.write_bytes(b"written a moment ago")
    reader = lance.dataset(str(out))
    write_all(out, 30, 160, 1)
    require_whole(out, range(160))
    assert stray.exists()
    assert reader.count_rows() == len(reader.to_table()) == 30


@pytest.mark.parametrize("change", ["writes", "merges"])
def test_merging_gives_way(out: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Another process commits while this one merges fragments: its rows stay, and this run ends as usual."""
    write_all(out, 0, 20, 1)
    monkeypatch.setattr(table_writing, "_MOST_FRAGMENTS", 0)
    kept = []

    def overtaken(table: Any, options: dict[str, Any]) -> None:
        plan = Compaction.plan(table, options)
        done = [task.execute(table) for task in plan.tasks]
        if change == "writes":
            Store(out).replace([Row("0003", "0003", f"{3:032x}", ["newer"], vectors([3])[0], {})])
        else:
            Compaction.execute(lance.dataset(str(out)), options)
        with pytest.raises(OSError, match="commit conflict") as raised:
            Compaction.commit(table, done, options)
        kept.append(raised.value)
        raise raised.value

    monkeypatch.setattr(sys.modules["lance.dataset"], "Compaction", SimpleNamespace(execute=overtaken))
    Store(out).finish()
    assert len(kept) == 1
    assert Store(out).texts() == [["newer"] if i == 3 and change == "writes" else [f"text {i}"] for i in range(20)]


def test_lock_names_its_holder(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(out, 0, 3, 1)
    code = (
        "import sys; from lamplit.store.table.store_lock import store_lock\n"
        f"with store_lock({str(out)!r}, 'deletes rows'):\n    print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(locking, "PATIENCE", 0.1)
        store = Store(out)
        with pytest.raises(StoreError) as raised:
            store.delete(["0001"])
        assert f"in use: process {holder.pid} on " in str(raised.value)
        assert " deletes rows since 2" in str(raised.value)
        write_all(out, 3, 6, 1)  # embedding does not wait
        holder.kill()
    Store(out).delete(["0005"])  # a lock ends with its process
    require_whole(out, range(5))
    assert not (out / "_writers" / "holder.json").exists()


def test_lock_of_threads(out: Path) -> None:
    write_all(out, 0, 1, 1)
    inside = []

    def enter() -> None:
        with store_lock(out, "waits"):
            inside.append(json.loads((out / "_writers" / "holder.json").read_text())["pid"])

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [os.getpid()] * 4


def make_slowly(out: Path, tower: TowerIdentity, backend: str, is_making: Any, begins: Any, is_done: Any) -> None:
    """Make a store of ten rows in one commit, which takes until the other is done, or two seconds."""
    schema = StoreMetadata(tower, backend, False).schema({})
    rows = [
        Row(f"{n:04}", f"{n:04}", f"{n:032x}", [f"text {n}"], vector, {}) for n, vector in enumerate(vectors(range(10)))
    ]

    def batches() -> Iterator[pa.RecordBatch]:
        yield from to_table(rows[:5], schema).to_batches()
        is_making.set()
        assert begins.wait(60)
        is_done.wait(2)
        yield from to_table(rows[5:], schema).to_batches()

    Store.write(out, schema, batches())


def write_meanwhile(out: Path, source: Path | None, begins: Any, is_done: Any) -> None:
    """Write rows 10 to 19 to the store."""
    begins.set()
    if source is None:
        write_all(out, 10, 20, 1)
    else:
        report = import_vectors(source, out, image_tower="acme:v3")
        assert (report.imported, report.known) == (10, 0)
    is_done.set()


@pytest.mark.parametrize("command", ["embed", "import"])
def test_another_process_makes_the_store_at_the_same_time(command: str, out: Path) -> None:
    """What it commits is not written over, and it does not write over what was committed meanwhile."""
    tower, source = (TOWER, None) if command == "embed" else (TowerIdentity.of_imported("acme:v3", 4), out.parent / "a")
    if source is not None:
        texts = [[f"text {n}"] for n in range(10, 20)]
        table = pa.table({"vector": vectors(range(10, 20)).tolist(), "texts": texts})
        parquet.write_table(table, source := source.with_suffix(".parquet"))
    context = multiprocessing.get_context("spawn")
    is_making, begins, is_done = (context.Event() for _ in range(3))
    backend = "torch" if command == "embed" else "imported"
    first = context.Process(target=make_slowly, args=(out, tower, backend, is_making, begins, is_done))
    second = context.Process(target=write_meanwhile, args=(out, source, begins, is_done))
    first.start()
    assert is_making.wait(60)
    second.start()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    store = Store(out)
    assert sorted(text for [text] in store.texts()) == sorted(f"text {number}" for number in range(20))
    assert len(set(store.column("id"))) == 20


@pytest.mark.slow
def test_four_processes(out: Path) -> None:
    """Two of them write the same rows at once, two others overlap; whichever is first makes the store."""
    context = multiprocessing.get_context("spawn")
    for numbers in ([(0, 60, 1), (0, 60, 1), (0, 80, 2), (20, 80, 3)], [(60, 120, 1), (50, 120, 1)]):
        processes = [context.Process(target=write_all, args=(out, *each)) for each in numbers]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode == 0
    require_whole(out, range(120))
    assert Store(out).column("n")[3:7] == ["3", None, None, "odd"]


def test_rows_that_were_doubled_are_there_once_again(tmp_path: Path) -> None:
    """Two writers of an earlier lamplit left them; the later row of an id is the newer one."""
    out = tmp_path / "a.lance"
    write_all(out, 0, 20, 1)
    table = lance.dataset(str(out))
    late = table.to_table(filter="id >= '0003' AND id < '0008'")
    texts = pa.array([[f"newer {number}"] for number in range(3, 8)], late.schema.field("texts").type)
    late = late.set_column(late.schema.get_field_index("texts"), late.schema.field("texts"), texts)
    for _ in range(2):
        lance.write_dataset(late, out, mode="append")
    assert len(Store(out)) == 30
    writer = StoreWriter(out, TOWER, centered=False)
    assert writer.notes == [f"10 rows of {out} were there twice, left by two writers at once; one of each is kept"]
    [row] = writer.before.read(["0003"])
    assert row is not None
    assert row.texts == ["newer 3"]
    add(writer, [20])
    writer.finish(None, prune=False)
    store = Store(out)
    assert store.column("id") == [f"{number:04}" for number in range(21)]
    assert store.texts() == [[f"{'newer' if 3 <= number < 8 else 'text'} {number}"] for number in range(21)]
    assert StoreWriter(out, TOWER, centered=False).notes == []
