"""`text_tower.onnx` beside a model's weights: written where it can be, and nowhere else."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from text_families import FAMILIES, WIDTH, make
from transformers import BertModel

from lamplit.errors import UsageError
from lamplit.exports.text_graph import write_words
from lamplit.model import LiT, load, merge_lora
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.towers.texts.word_reader import WordReader, open_words

pytest.importorskip("onnxscript")
TEXTS = ["A small red circle.", "", "ring", "Etwas anderes, groß", "ring " * 100]
TOWER = TowerIdentity.of_imported("a tower", WIDTH)
# The encoder of the one is in the list by itself, and texts as short as these make a Llama of the other.
ALIKE = {"T5", "Mistral"}


def agree(folder: Path, model: LiT) -> bool:
    ztxt = WordReader(folder).encode_texts(TEXTS)
    return bool(np.abs(ztxt - model.encode_texts(TEXTS).numpy()).max() < 1e-5)


@pytest.fixture
def saved(text_folder: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LiT(open_text_tower(f"hf:{text_folder}", width=WIDTH), TOWER).save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.slow
def test_weights_stay_where_they_are(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = sorted(saved.iterdir())
    with caplog.at_level(logging.INFO, "lamplit"):
        assert write_words(saved)
    file = saved / "text_tower.onnx"
    assert sorted(saved.iterdir()) == sorted([*before, file])
    assert caplog.messages == [f"preparing {saved} to be searched without torch, once"]
    inside = [tensor for tensor in onnx.load(file, load_external_data=False).graph.initializer if tensor.raw_data]
    assert sum(len(tensor.raw_data) for tensor in inside) < 1000
    assert file.stat().st_size < 60_000
    assert agree(saved, load(saved))

    made = file.stat().st_mtime_ns
    assert write_words(saved)
    assert file.stat().st_mtime_ns == made, "it was there"
    file.write_bytes(b"damaged")
    assert write_words(saved)
    assert agree(saved, load(saved))


@pytest.mark.slow
def test_graph_is_kept_for_towers_that_are_built_alike(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(name: str, anchors: int, width: int = WIDTH) -> Path:
        tower = open_text_tower(f"hf:{text_folder}", width=width)
        tower.head = KernelHead(tower.head.in_features, width, anchors)
        for parameter in tower.parameters():  # biases of nothing but 0 would all be one
            torch.nn.init.normal_(parameter, std=0.2)
        LiT(tower, TowerIdentity.of_imported("a tower", width)).save(tmp_path / name)
        return tmp_path / name

    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path / "cache"))
    folders = [saved("first", 5), saved("second", 5), saved("more texts", 9)]
    assert write_words(folders[0])
    [kept] = (tmp_path / "cache" / "graphs").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", None)
        assert all(map(write_words, folders[1:]))
    assert all(agree(folder, load(folder)) for folder in folders)

    kept.write_bytes(b"damaged")
    (folders[0] / "text_tower.onnx").unlink()
    assert write_words(folders[0])
    assert agree(folders[0], load(folders[0]))
    assert kept.stat().st_size > 10_000
    assert write_words(saved("wider", 5, WIDTH + 1))
    assert len(list(kept.parent.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ALIKE])
def test_families(name: str, tmp_path: Path) -> None:
    LiT(make(name, tmp_path / "text").tower, TOWER).save(tmp_path / "saved")
    assert write_words(tmp_path / "saved")
    assert agree(tmp_path / "saved", load(tmp_path / "saved"))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["sentencepiece", "wordpiece"])
def test_tower_from_scratch(vocabulary: str, tmp_path: Path) -> None:
    if vocabulary == "wordpiece":
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["[PAD]", "[UNK]", "[CLS]", *letters, *(f"##{letter}" for letter in letters)]
        (tmp_path / "words.txt").write_text("".join(f"{word}\n" for word in words))
        vocabulary = str(tmp_path / "words.txt")
    LiT(open_text_tower(f"scratch:tiny@{vocabulary}", width=WIDTH, texts=TEXTS), TOWER).save(tmp_path)
    assert write_words(tmp_path)
    assert agree(tmp_path, load(tmp_path))
    assert (tmp_path / "text_tower.onnx").stat().st_size < 200_000


@pytest.mark.slow
def test_published_model(tmp_path: Path) -> None:
    """The authors' model saved as a folder: no mask, rows of one length, a WordPiece of lamplit's own."""
    shutil.copy(Path(__file__).parents[1] / "fixtures" / "parity" / "tiny-bert.npz", tmp_path)
    tokens = ["[PAD]", "[CLS]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz.,", *(f"##{c}" for c in "abcdefghijklm")]
    tokens += [f"word{number}" for number in range(120 - len(tokens))]
    (tmp_path / "tiny-bert.txt").write_text("".join(f"{token}\n" for token in tokens))
    model = load(f"lit:{tmp_path / 'tiny-bert'}.npz")
    model.save(tmp_path / "saved")
    assert write_words(tmp_path / "saved")
    assert agree(tmp_path / "saved", model)


@pytest.mark.slow
def test_lora_is_left_to_torch_and_what_it_was_merged_to_is_not(text_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tower = open_text_tower(f"hf:{text_folder}", width=WIDTH)
    tower.add_lora(2)
    for parameter in tower.split_lora()[1]:
        torch.nn.init.normal_(parameter, std=0.3)
    LiT(tower, TOWER).save(tmp_path / "lora")
    assert not write_words(tmp_path / "lora")
    assert not (tmp_path / "lora" / "text_tower.onnx").exists()
    merge_lora(tmp_path / "lora", tmp_path / "merged")
    assert write_words(tmp_path / "merged")
    assert agree(tmp_path / "merged", load(tmp_path / "lora"))


def test_nothing_where_it_cannot_be(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not write_words("lit:B16B_2")
    assert not write_words(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert not write_words(saved)
    (saved / "config.json").unlink()
    with pytest.raises(UsageError, match="no model at"):
        write_words(saved)
    assert not list(saved.glob("*.onnx"))


def other_tokens(saved: Path, _: pytest.MonkeyPatch) -> None:
    """transformers cuts texts at the side that its own file says, which the tokenizer's does not."""
    file = saved / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation_side": "left"}))


def other_vectors(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that notices when it is exported."""
    forward = BertModel.forward

    def moody(self: BertModel, *given: Any, **options: Any) -> Any:
        output = forward(self, *given, **options)
        if torch.compiler.is_exporting():
            output.last_hidden_state = output.last_hidden_state.sin()
        return output

    monkeypatch.setattr(BertModel, "forward", moody)


def no_export(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no way")

    monkeypatch.setattr(torch.onnx, "export", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (other_tokens, "in another way without transformers"),
        (other_vectors, "differ from torch's by"),
        (no_export, "cannot be exported to ONNX: no way"),
    ],
)
def test_what_differs_is_left_to_torch(
    saved: Path, spoil: Any, told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "lamplit")
    monkeypatch.setenv("LAMPLIT_CACHE", str(saved.parent / "cache"))  # no graph is kept there
    spoil(saved, monkeypatch)
    assert not write_words(saved)
    assert told in caplog.text
    assert "goes on to be searched with torch" in caplog.text
    assert [file.name for file in saved.glob(".*onnx*")] == []
    assert (saved / "text_tower.onnx").read_bytes() == b""
    assert open_words(saved) is None
    caplog.clear()
    assert not write_words(saved), "it is not tried twice"
    assert caplog.text == ""
