"""The log says so where captions cannot be written or are cut, and what to type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_store
from text_families import make

import lamplit
from lamplit.errors import UsageError
from lamplit.tuning.caption_tokens import advise_pieces
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

GEORGIAN = ["თავი", "დიდი კაცი", "პატარა თავი", "კაცი და თავი", "დიდი სახლი", "პატარა კაცი", "სახლი", "დათვი"]


@pytest.fixture
def tower_name(tmp_path: Path) -> str:
    make("BERT", tmp_path / "bert")
    return f"hf:{tmp_path / 'bert'}"


def store_of(captions: list[str], path: Path) -> lamplit.Store:
    vectors = torch.nn.functional.normalize(torch.randn(len(captions), 8), dim=-1)
    return write_store(path, vectors, [[text] for text in captions])


def test_what_cannot_be_written_is_said(tower_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captions = [f"{text} {number % 7}" for number in range(8) for text in GEORGIAN]
    store = store_of(captions, tmp_path / "georgian.lance")
    settings = TuneSettings(tower_name, epochs=1, batch_size=8, val_fraction=0.2)
    tune(store, tmp_path / "without", settings, device="cpu")
    [said] = [message for message in caplog.messages if "cannot write" in message]
    assert said.startswith(f"{tower_name} cannot write ")
    assert "--train-tokenizer" in said
    assert "--text-tower hf:" in said
    caplog.clear()
    with caplog.at_level("INFO"):
        tune(
            store,
            tmp_path / "with",
            TuneSettings(tower_name, epochs=1, batch_size=8, train_tokenizer=True),
            device="cpu",
        )
    assert not [message for message in caplog.messages if "cannot write " in message and "%" in message]
    assert [message for message in caplog.messages if "pieces of words that it could not write" in message]
    model = lamplit.load(tmp_path / "with", device="cpu", towers="text")
    zero, one = model.encode_texts(["დიდი კაცი", "პატარა თავი"])
    assert (zero - one).abs().max() > 1e-3
    before = lamplit.load(tmp_path / "without", device="cpu", towers="text").encode_texts(["კაცი", "თავი"])
    assert torch.equal(before[0], before[1]), "both are one unknown token there"


def test_nothing_is_said_of_what_can_be_written(tower_name: str) -> None:
    tower = lamplit.open_text_tower(tower_name, width=8)
    assert advise_pieces(["a small red circle", "ein roter kreis"], tower) is None
    assert advise_pieces([], tower) is None


def test_cut_captions_are_counted_and_told_what_helps(
    tower_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "red green " * 30
    store = store_of(
        [f"{long if number % 4 == 0 else 'red'} {number}" for number in range(40)], tmp_path / "long.lance"
    )
    settings = {"text_tower": tower_name, "epochs": 1, "batch_size": 8, "val_fraction": 0}
    tune(store, tmp_path / "whole", TuneSettings(**settings), device="cpu")
    [said] = [message for message in caplog.messages if "lose their end" in message]
    assert said.startswith(
        "texts of more than 48 tokens lose their end: 10 of 40 (25%); of a sample, 99 in 100 have up to "
    )
    assert "reads no more" in said
    assert "--text-column texts,SHORT" in said
    caplog.clear()
    tune(store, tmp_path / "short", TuneSettings(**settings, context_length=8), device="cpu")
    [said] = [message for message in caplog.messages if "lose their end" in message]
    assert said.startswith("texts of more than 8 tokens lose their end: 10 of 40 (25%)")
    assert ": --context-length 6" in said


def test_short_and_long_captions_of_a_picture_are_read_together(tower_name: str, tmp_path: Path) -> None:
    lines = ["image,short,long"]
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        lines.append(f"{number}.png,red {number},a large red circle beside a small green ring {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    lamplit.embed(
        tmp_path / "pairs.csv", tmp_path / "two.lance", image_tower="demo:efficientnet-lite0", text_column="short"
    )
    settings = TuneSettings(tower_name, text_column="texts,long", epochs=1, batch_size=8, val_fraction=0)
    report = tune(tmp_path / "two.lance", tmp_path / "run", settings, device="cpu")
    assert report.training_pairs == 24


def png(number: int) -> bytes:
    import io

    from lamplit.exports.sample import _pattern

    stream = io.BytesIO()
    _pattern(number).save(stream, "PNG")
    return stream.getvalue()


def test_train_tokenizer_needs_a_pretrained_tower() -> None:
    with pytest.raises(UsageError, match="train_tokenizer is for a pre-trained text tower"):
        TuneSettings("scratch:tiny", train_tokenizer=True)
