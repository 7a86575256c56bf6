"""Words read without torch: the same tokens, vectors and hits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_store

from lamplit.errors import TowerError, UsageError
from lamplit.exports.sample import SENTENCES
from lamplit.exports.text_graph import SCRIPTS, write_words
from lamplit.model import LiT, load
from lamplit.retrieval.searcher import Searcher
from lamplit.store.arrays import derived
from lamplit.store.lance_store import Store
from lamplit.towers.texts import word_reader as words
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.towers.texts.word_reader import FastTokenizer, WordReader, open_words

pytest.importorskip("onnxscript")
TEXTS = ["A small red circle.", "", "ring", "Etwas anderes, groß", "ring " * 100]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A centred store."""
    vectors = torch.randn(90, 8, generator=torch.Generator().manual_seed(0)) + 1
    metadata = [{"year": 2000 + number} for number in range(90)]
    path = tmp_path_factory.mktemp("store") / "a.lance"
    return write_store(path, vectors, [[str(i)] for i in range(90)], metadata, centered=True)


@pytest.fixture(scope="module")
def folder(text_folder: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all that a text's and an image's way can have: a centre, and an image head."""
    torch.manual_seed(0)
    tower = open_text_tower(f"hf:{text_folder}", width=5)
    folder = tmp_path_factory.mktemp("model") / "model"
    LiT(tower, store.tower, center=store.center, image_head=torch.nn.Linear(8, 5)).save(folder)
    assert write_words(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LiT:
    return load(folder)


@pytest.fixture
def reader(folder: Path) -> WordReader:
    return WordReader(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def test_it_is_the_same_model(reader: WordReader, model: LiT) -> None:
    assert (reader.identity, reader.width, reader.space) == (model.identity, 5, model.space)


def test_same_tokens_and_vectors(reader: WordReader, model: LiT) -> None:
    assert model.text_tower is not None
    texts = [*TEXTS, *SENTENCES, *SCRIPTS]
    assert reader.tokenize(texts) == model.text_tower.tokenize(texts)
    ztxt = reader.encode_texts(texts)
    assert ztxt.dtype == np.float32
    assert np.abs(ztxt - model.encode_texts(texts).numpy()).max() < 1e-5
    assert np.abs(np.concatenate([reader.encode_texts([text]) for text in TEXTS]) - ztxt[:5]).max() < 1e-5
    assert reader.encode_texts([]).shape == (0, 5)


def test_many_texts_of_one_length(reader: WordReader, model: LiT) -> None:
    texts = [f"{a}{b}" for a in "abcdefghij" for b in "0123456789,."]
    assert np.abs(reader.encode_texts(texts) - model.encode_texts(texts).numpy()).max() < 1e-5


def test_same_projection_of_images(reader: WordReader, model: LiT, store: Store) -> None:
    zimg = store.vectors().numpy()
    expected = model.read_store(store).numpy()
    assert np.abs(reader.project_rows(zimg) - expected).max() < 1e-6
    assert np.abs(model.project_rows(zimg) - expected).max() < 1e-6


@pytest.mark.parametrize("query", ["ring", '"red" - 0.5 * "ring" + "kreuz" * 2', "ring " * 100])
@pytest.mark.parametrize("where", [None, "year > 2050"])
@pytest.mark.parametrize("small", [0, 1000])
def test_same_hits(
    folder: Path, model: LiT, store: Store, query: str, where: str | None, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "SMALL", small)
    found, expected = (Searcher(each, store).search(query, k=40, where=where) for each in (WordReader(folder), model))
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)


def test_truncation_is_told_once(reader: WordReader, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lamplit"):
        reader.encode_texts(["ring " * 100, "a"])
        reader.encode_texts(["ring " * 100, "a"])
    assert caplog.messages == ["texts of more than 32 tokens lose their end: 1 of 2"]


def test_images_are_refused(reader: WordReader, store: Store, tmp_path: Path) -> None:
    with pytest.raises(TowerError, match=r"for words alone; open it with lamplit\.load"):
        Searcher(reader, store).search("ring", image=tmp_path / "a.png")


def test_folder_without_the_file(copied: Path) -> None:
    assert open_words("lit:B16B_2") is None
    assert open_words(copied) is not None
    (copied / "text_tower.onnx").unlink()
    assert open_words(copied) is None
    with pytest.raises(TowerError, match="is not there, is damaged"):
        WordReader(copied)
    with pytest.raises(UsageError, match="no model at"):
        WordReader(copied / "tokenizer")


@pytest.mark.parametrize(
    "name", ["text_tower.onnx", "text_tower.safetensors", "image_head.safetensors", "config.json", "tokenizer"]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_damage_is_left_to_load(copied: Path, name: str, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = copied / ("tokenizer/tokenizer.json" if name == "tokenizer" else name)
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert open_words(copied) is None
    assert capfd.readouterr().err == ""


def test_file_of_another_tower_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["text_tower"]["pooling"] = "mean" if config["text_tower"]["pooling"] == "cls" else "cls"
    (copied / "config.json").write_text(json.dumps(config))
    assert open_words(copied) is None


def test_other_weights_in_the_old_place_are_refused(copied: Path) -> None:
    """As where one folder is copied over another; whoever saves a model removes the file."""
    graph = (copied / "text_tower.onnx").read_bytes()
    other = load(copied)
    assert other.text_tower is not None
    with torch.no_grad():
        other.text_tower.head.bias += 1e-3
    other.save(copied)
    assert not (copied / "text_tower.onnx").exists()
    (copied / "text_tower.onnx").write_bytes(graph)
    assert open_words(copied) is None


@pytest.mark.parametrize(("asked", "threads"), [("", 1), ("3", 3), ("0", 1), ("4,2", 1), ("many", 1)])
def test_threads(monkeypatch: pytest.MonkeyPatch, asked: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert vars(words)["_threads"]() == threads


def test_fast_tokenizer(folder: Path) -> None:
    tokenizer = FastTokenizer(folder / "tokenizer" / "tokenizer.json", 3)
    [whole] = tokenizer.encode(["a red ring"], None)
    [cut] = tokenizer.encode(["a red ring"], 4)
    assert (len(cut), cut[0], cut[-1]) == (4, whole[0], whole[-1])
    assert tokenizer.encode(["a red ring"], None) == [whole]
    assert tokenizer.pad_id == 3
    assert len(tokenizer) > 50
