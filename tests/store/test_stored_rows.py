"""Rows that a store has, found by ids and contents, against dictionaries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from conftest import write_store
from torch.nn import functional as F

from lamplit.data.decoding.images import content_key
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.embed.stored_rows import StoredRows
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row

SIZE = 200


def make_store(path: Path) -> Store:
    """Rows in another order than that of their ids, three of each content."""
    vectors = F.normalize(torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    order = np.random.default_rng(0).permutation(SIZE)
    rows = [
        Row(f"{n:04}", f"{n}.png", f"{n // 3:032x}", [f"text {n}"], vectors[n // 3], {"n": n}) for n in map(int, order)
    ]
    store = write_store(path, vectors[:1], [["a"]], [{"n": -1}])
    store.delete([store.column("id")[0]])
    store.append(rows[:50])
    store.append(rows[50:])
    store.delete([f"{number:04}" for number in range(0, SIZE, 10)])
    return store


def test_found_by_id_and_content(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.lance")
    stored, by_id = StoredRows(store), {row["id"]: row for row in store.rows()}
    asked = [f"{number:04}" for number in (3, 0, 7, 3, 198, 999)]
    for name, row, key in zip(asked, stored.read(asked), stored.content_keys(asked), strict=True):
        expected = by_id.get(name)
        assert (row is None) == (expected is None)
        assert key == (content_key(expected["hash"]) if expected else -1)
        if row is not None and expected is not None:
            assert (row.path, row.hash, row.texts) == (expected["path"], expected["hash"], expected["texts"])
            assert row.metadata == {"n": expected["n"]}
    hashes = [by_id[name]["hash"] for name in ("0003", "0007", "0003", "0198")]
    rows = [sorted(by_id).index(name) for name in ("0003", "0007", "0003", "0198")]
    assert torch.equal(stored.vectors(hashes), store.vectors_at(rows))


def test_rows_of_some_files_are_left_out(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.lance")
    by_id, fragments = {row["id"]: row for row in store.rows()}, store.fragments()
    assert len(fragments) >= 2
    for left_out in ([0], [1], [len(fragments) - 1], list(range(len(fragments)))):
        files = {file.path for at in left_out for file in fragments[at].data_files()}
        others = [name for at in left_out for name in fragments[at].to_table(columns=["id"])["id"].to_pylist()]
        assert others
        stored = StoredRows(store, files)
        assert len(stored.is_seen) == len(store) - len(others)
        for name, row in zip(by_id, stored.read(list(by_id)), strict=True):
            assert (row is None) == (name in others)
            assert row is None or (row.hash, row.metadata) == (by_id[name]["hash"], {"n": by_id[name]["n"]})
        hashes = [by_id[name]["hash"] for name in by_id if name not in others]
        if hashes:
            found = stored.vectors(hashes)
            assert torch.equal(
                found, store.vectors_at([sorted(by_id).index(name) for name in by_id if name not in others])
            )


def test_what_the_source_does_not_name_is_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.lance")
    paths = {row["id"]: str(tmp_path / row["id"]) for row in store.rows()}
    store.replace([Row(row["id"], paths[row["id"]], row["hash"], row["texts"], None) for row in store.rows()])
    writer = StoreWriter(tmp_path / "a.lance", store.tower, centered=False)
    names = store.column("id")
    assert all(writer.note(names[:50]))
    assert writer.note([*names[49:52], "new", names[51], "new"]) == [False, True, True, True, False, False]
    (tmp_path / names[60]).touch()
    assert sorted(writer.before.missing(tmp_path)) == [*names[52:60], *names[61:]]


def test_a_store_that_is_not_there() -> None:
    stored = StoredRows(None)
    assert stored.read(["a", "b"]) == [None, None]
    assert stored.content_keys(["a"]) == [-1]
    assert stored.missing(Path("/")) == []
