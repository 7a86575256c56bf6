from __future__ import annotations

import json
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
from lamplit.retrieval.collection import open_collection, prepare
from lamplit.retrieval.nearest import rank_many
from lamplit.retrieval.recall import recall_of, sample_queries
from lamplit.store.derived import FOLDER, SMALL, measured_recall
from lamplit.store.lance_store import Store
from lamplit.store.rows import Row
from lamplit.towers.identity import TowerIdentity
from lamplit.unit_vectors import normalize

SIZE, WIDTH = 600, 24


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
    assert opened.planes is None
    assert np.abs(opened.vectors - store.vectors().numpy()).max() < 2e-7
    assert not (Path(store.path) / FOLDER).exists()


def test_large_store_gets_files_that_are_read_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lamplit")
    first = open_collection(store, plain, "plain", small=0)
    assert "preparing 600 images" in caplog.text
    assert isinstance(first.vectors, np.memmap)
    assert first.vectors.dtype == np.float16
    assert np.abs(first.vectors - store.vectors().numpy()).max() < 1e-3
    assert first.planes is not None
    queries = sample_queries(store.vectors().numpy(), 100, seed=7)  # not those that it was measured with
    true = rank_many(store.vectors().numpy(), queries, 10)
    assert recall_of(first.planes.find_all(first.vectors, queries, 10, first.kept), true) > 0.95
    assert first.kept[1] < SIZE, "some rows need no exact product"
    caplog.clear()
    again = open_collection(Store(store.path), plain, "plain", small=0)
    assert "preparing" not in caplog.text
    assert again.kept == first.kept
    assert (again.vectors == first.vectors).all()
    assert again.planes is not None
    assert (again.planes.signs == first.planes.signs).all()
    assert (again.planes.seconds == first.planes.seconds).all()
    assert (again.planes.scale == first.planes.scale).all()


def test_every_space_has_files_of_its_own(store: Store) -> None:
    open_collection(store, plain, "plain", small=0)
    other = open_collection(store, turned, "turned", small=0)
    assert len(made(store)) == 2
    assert np.abs(other.vectors - turned(store.vectors().numpy())).max() < 1e-3


def test_files_of_a_store_that_has_changed_are_made_anew(store: Store) -> None:
    open_collection(store, plain, "plain", small=0)
    [old] = made(store)
    one = torch.zeros(1, WIDTH)
    one[0, 3] = 1
    store.append([Row("0000", "p", "h", ["new"], one[0])])
    assert len(open_collection(store, plain, "plain", small=0).vectors) == SIZE + 1
    [new] = made(store)
    assert new != old
    store.replace([Row("0000", "p", "h2", ["new"], one[0].roll(1))])
    changed = open_collection(store, plain, "plain", small=0)
    row = store.column("id").index("0000")
    assert changed.vectors[row].argmax() == 4
    assert np.abs(changed.vectors - store.vectors().numpy()).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("vectors.npy", "cut"),
        ("bits.npy", "gone"),
        ("order.npy", "empty"),
        ("bits.npy", "other"),
        ("scale.npy", "cut"),
        ("search.json", "cut"),
        ("search.json", "other"),
    ],
)
def test_damaged_files_are_made_anew(store: Store, name: str, damage: str) -> None:
    whole = open_collection(store, plain, "plain", small=0)
    file = made(store)[0] / name
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b"[1, 2]" * 100}[damage])
    again = open_collection(store, plain, "plain", small=0)
    assert (again.vectors == whole.vectors).all()
    assert file.read_bytes() == data


def test_where_the_store_cannot_be_written_to_the_cache_serves(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    (Path(store.path) / FOLDER).write_text("in the way")
    first = open_collection(store, plain, "plain", small=0)
    assert "no files for search" in caplog.text
    assert isinstance(first.vectors, np.memmap)
    caplog.clear()
    assert open_collection(store, plain, "plain", small=0).kept == first.kept
    assert not caplog.text


def test_lance_leaves_the_files_alone(store: Store) -> None:
    open_collection(store, plain, "plain", small=0)
    [folder] = made(store)
    store.finish()
    assert (folder / "search.json").is_file()
    assert len(Store(store.path)) == SIZE


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
    assert files.count("vectors.npy") == files.count("search.json") == 1
    assert len(made(store)) == (1 if centered else 2), "the vectors of the store are those that tune reads"
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
        shutil.rmtree(next(folder for folder in made(store) if folder.name.endswith("-rows")))
        again = lamplit.Searcher(model, Store(store.path)).collection
        assert (again.vectors == searcher.collection.vectors).all(), "they are made again by themselves"
    [file] = (Path(store.path) / FOLDER).glob("*/search.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"recall": 1.0}))
    assert describe(store.path)["search"] == "recall@10 1.000"  # on a sample: that is not exact
    store.delete(store.column("id")[:2])  # now it has SMALL - 1
    assert describe(store.path)["search"] == "exact"
