from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_store
from torch.nn import functional as F

import lamplit
from lamplit.inspection import describe
from lamplit.model import LiT
from lamplit.retrieval.bit_planes import BitPlanes
from lamplit.retrieval.collection import Collection, open_collection, prepare
from lamplit.retrieval.nearest import rank, rank_many
from lamplit.retrieval.recall import recall_of, sample_queries
from lamplit.store import store_parts
from lamplit.store.arrays import derived
from lamplit.store.arrays.derived import FOLDER, SMALL, measured_recall
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.identity import TowerIdentity
from lamplit.unit_vectors import normalize

SIZE, WIDTH = 600, 24


@pytest.fixture
def no_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every store be a large one."""
    monkeypatch.setattr(derived, "SMALL", 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(SIZE, WIDTH, generator=random) + 1
    return write_store(tmp_path / "some.lance", vectors, [[f"text {i}"] for i in range(SIZE)])


def plain(zimg: np.ndarray) -> np.ndarray:
    return zimg


def turned(zimg: np.ndarray) -> np.ndarray:
    return normalize(zimg[:, ::-1][:, :10])


def made(store: Store) -> list[Path]:
    return sorted((Path(store.path) / FOLDER).iterdir())


def test_small_store_is_read_into_memory(store: Store) -> None:
    opened = open_collection(store, plain, "plain")
    assert opened.is_exact
    assert np.abs(opened.vectors - store.vectors().numpy()).max() < 2e-7
    assert not (Path(store.path) / FOLDER).exists()


def sieves(collection: Collection) -> BitPlanes:
    [part] = collection.parts
    assert part.planes is not None
    return part.planes


@pytest.mark.usefixtures("no_small")
def test_large_store_gets_files_that_are_read_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lamplit")
    first = open_collection(store, plain, "plain")
    assert "preparing 600 images" in caplog.text
    assert isinstance(first.vectors, np.memmap)
    assert first.vectors.dtype == np.float16
    assert np.abs(first.vectors - store.vectors().numpy()).max() < 1e-3
    queries = sample_queries(store.vectors().numpy(), 100, seed=7)  # not those that it was measured with
    true = rank_many(store.vectors().numpy(), queries, 10)
    assert recall_of([first.find(query, 10) for query in queries], true) > 0.95
    assert first.parts[0].kept[1] < SIZE, "some rows need no exact product"
    caplog.clear()
    again = open_collection(Store(store.path), plain, "plain")
    assert "preparing" not in caplog.text
    assert again.parts[0].kept == first.parts[0].kept
    assert again.recall == first.recall
    assert (again.vectors == first.vectors).all()
    assert (sieves(again).signs == sieves(first).signs).all()
    assert (sieves(again).seconds == sieves(first).seconds).all()
    assert (sieves(again).scale == sieves(first).scale).all()


@pytest.mark.usefixtures("no_small")
def test_every_space_has_files_of_its_own(store: Store) -> None:
    open_collection(store, plain, "plain")
    few = len(made(store))
    other = open_collection(store, turned, "turned")
    assert len(made(store)) == few + 2, "its vectors and its bits"
    assert np.abs(other.vectors - turned(store.vectors().numpy())).max() < 1e-3


@pytest.mark.usefixtures("no_small")
def test_files_of_a_store_that_has_changed_are_made_anew(store: Store) -> None:
    open_collection(store, plain, "plain")
    old = made(store)
    one = torch.zeros(1, WIDTH)
    one[0, 3] = 1
    store.append([Row("0000", "p", "h", ["new"], one[0])])
    assert len(open_collection(store, plain, "plain").vectors) == SIZE + 1
    assert len(made(store)) == len(old)
    assert not set(made(store)) & set(old)
    store.replace([Row("0000", "p", "h2", ["new"], one[0].roll(1))])
    changed = open_collection(store, plain, "plain")
    row = store.column("id").index("0000")
    assert changed.vectors[[row]].argmax() == 4
    assert np.abs(changed.vectors - store.vectors().numpy()).max() < 1e-3


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("vectors.npy", "cut"),
        ("signs.npy", "gone"),
        ("order.npy", "empty"),
        ("copies.npy", "cut"),
        ("signs.npy", "other"),
        ("scale.npy", "cut"),
        ("kept.npy", "cut"),
        ("recall.npy", "other"),
    ],
)
def test_damaged_files_are_made_anew(store: Store, name: str, damage: str) -> None:
    whole = open_collection(store, plain, "plain")
    [file] = (Path(store.path) / FOLDER).glob(f"*/{name}")
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b"[1, 2]" * 100}[damage])
    again = open_collection(Store(store.path), plain, "plain")
    assert (again.vectors == whole.vectors).all()
    assert file.read_bytes() == data


@pytest.mark.usefixtures("no_small")
def test_where_the_store_cannot_be_written_to_the_cache_serves(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    (Path(store.path) / FOLDER).write_text("in the way")
    first = open_collection(store, plain, "plain")
    assert "no files of vectors" in caplog.text
    assert isinstance(first.vectors, np.memmap)
    caplog.clear()
    assert open_collection(store, plain, "plain").parts[0].kept == first.parts[0].kept
    assert not caplog.text


@pytest.mark.usefixtures("no_small")
def test_lance_leaves_the_files_alone(store: Store) -> None:
    open_collection(store, plain, "plain")
    there = made(store)
    store.finish()
    assert made(store) == there
    assert len(Store(store.path)) == SIZE


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize("space", ["turned", "own"])
def test_a_store_in_parts_is_searched_as_one(space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven fragments, of which six are full and the fourth is not, and ids that lie anywhere among those before."""
    monkeypatch.setattr(store_parts, "FULL", 90)
    random = np.random.default_rng(0)
    ids = random.permutation(700)
    vectors = normalize(random.standard_normal((700, WIDTH)).astype(np.float32) + 1)
    vectors[600:610] = vectors[:10]  # equal ones of different parts

    def rows(chosen: range) -> list[Row]:
        return [Row(f"{ids[i]:04}", "p", f"{i}", [], torch.from_numpy(vectors[i])) for i in chosen]

    sizes = [100, 90, 200, 10, 90, 100, 110]
    ends = np.cumsum(sizes).tolist()
    ranges = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    store = Store.create(
        tmp_path / "a.lance", TowerIdentity.of_imported("acme", WIDTH), rows(ranges[0]), backend="imported"
    )
    for some in ranges[1:-1]:
        store.append(rows(some))

    def opened() -> Collection:
        name = store.tower.fingerprint if space == "own" else "turned"
        return open_collection(Store(store.path), plain if space == "own" else turned, name)

    first = opened()
    assert [len(part.vectors) for part in first.parts] == [480, 100, 10]
    there = {folder.name: folder.stat().st_mtime_ns for folder in made(store)}
    store.append(rows(ranges[-1]))
    second = opened()
    assert [len(part.vectors) for part in second.parts] == [480, 210, 10]
    kept = [folder.name for folder in made(store) if there.get(folder.name) == folder.stat().st_mtime_ns]
    assert len(kept) == 4, "vectors and bits of two parts stay as they are"

    expected = np.empty_like(vectors)
    expected[ids] = vectors
    expected = expected if space == "own" else turned(expected)
    assert np.abs(second.vectors[:] - expected).max() < 1e-3
    some = np.array([3, 699, 3, 250])
    assert (second.vectors[some] == second.vectors[:][some]).all()
    allowed = random.random(700) < 0.3
    exact = normalize(second.vectors[:].astype(np.float32))
    for query in expected[::70]:
        assert second.rank(query, 30).rows.tolist() == rank(exact, query, 30).rows.tolist()
        among = rank(exact, query, 30, np.flatnonzero(allowed)).rows
        assert second.rank(query, 30, allowed).rows.tolist() == among.tolist()
        assert allowed[second.find(query, 30, allowed).rows].all()
    together = second.find_all(expected[::70], 30)
    assert [found.rows.tolist() for found in together] == [second.find(q, 30).rows.tolist() for q in expected[::70]]
    queries = sample_queries(second.vectors, 100, seed=7)
    assert recall_of([second.find(query, 10) for query in queries], rank_many(second.vectors, queries, 10)) > 0.95

    store.delete(store.column("id")[:1])
    third = opened()
    assert len(third.vectors) == 699
    assert np.abs(third.vectors[:] - expected[1:]).max() < 1e-3


@pytest.mark.parametrize("centered", [False, True])
def test_a_model_finds_the_files_of_a_prepared_store(
    centered: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lamplit")
    vectors = np.random.default_rng(0).standard_normal((SMALL + 1, 16), np.float32) + 0.5
    rows = [Row(f"{i:06}", "", f"{i}", (), vector) for i, vector in enumerate(F.normalize(torch.from_numpy(vectors)))]
    tower = TowerIdentity.of_imported("acme", vectors.shape[1])
    store = Store.create(tmp_path / "large.lance", tower, rows, backend="imported", centered=centered)
    store.finish()
    assert measured_recall(store) is None
    prepare(store)
    files = [file.name for folder in made(store) for file in folder.iterdir()]
    assert files.count("vectors.npy") == files.count("signs.npy") == 1
    assert any(folder.name.endswith("-vectors") for folder in made(store)) is not centered, "those that tune reads"
    caplog.clear()
    recall = measured_recall(store)
    model = LiT(None, store.tower, center=store.center)
    searcher = lamplit.Searcher(model, store)
    assert "preparing" not in caplog.text
    assert recall is not None
    assert searcher.collection.recall == recall
    assert describe(store.path)["search"] == f"recall@10 {recall:.3f}"
    expected = model.read_store(store)[:100]
    assert np.abs(searcher.collection.vectors[:100] - expected.numpy()).max() < 1e-3
    if not centered:
        shutil.rmtree(next(folder for folder in made(store) if folder.name.endswith("-vectors")))
        again = lamplit.Searcher(model, Store(store.path)).collection
        assert (again.vectors == searcher.collection.vectors).all(), "they are made again by themselves"
    [file] = (Path(store.path) / FOLDER).glob("*/recall.npy")
    np.save(file, np.ones(1))
    assert describe(store.path)["search"] == "recall@10 1.000"  # on a sample: that is not exact
    store.delete(store.column("id")[:2])  # now it has SMALL - 1
    assert describe(store.path)["search"] == "exact"
