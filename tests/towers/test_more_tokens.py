"""Pieces for words that a tokenizer cannot write: added once, alike in every run, and in the way of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_families import TEXTS, distance, make, prove_round_trip, vectors

from lamplit.errors import UsageError
from lamplit.towers.texts.more_tokens import add_pieces, unknown_share
from lamplit.towers.texts.text_tower import TextTower, open_text_tower

GEORGIAN = ["თავი", "თავი და კაცი", "კაცი", "დიდი კაცი", "დიდი თავი", "red თავი"] * 3
Open = Callable[[], TextTower]


@pytest.fixture(scope="module", params=["BERT", "XLM-R", "mT5"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Open:
    folder = tmp_path_factory.mktemp("tower") / "folder"
    make(request.param, folder)
    return lambda: open_text_tower(f"hf:{folder}", width=16).eval()


def test_every_word_can_be_written(opened: Open) -> None:
    tower = opened()
    before, size = unknown_share(tower.tokenizer, GEORGIAN), len(tower.tokenizer)
    assert before > 0.4
    assert len({tuple(ids) for ids in tower.tokenize(GEORGIAN)}) < len(set(GEORGIAN))
    added = add_pieces(tower, GEORGIAN)
    assert added > 0
    assert len(tower.tokenizer) == size + added
    assert unknown_share(tower.tokenizer, GEORGIAN) == 0
    assert len({tuple(ids) for ids in tower.tokenize(GEORGIAN)}) == len(set(GEORGIAN))
    assert add_pieces(tower, GEORGIAN) == 0, "none is lacking now"


def test_what_could_be_written_is_read_as_before(opened: Open) -> None:
    plain, tower = opened(), opened()
    tower.head.load_state_dict(plain.head.state_dict())
    add_pieces(tower, GEORGIAN)
    written = [text for text in TEXTS if unknown_share(plain.tokenizer, [text]) == 0]
    assert len(written) > 3
    assert tower.tokenize(written) == plain.tokenize(written)
    assert distance(vectors(tower, written), vectors(plain, written)) < 1e-6
    georgian = vectors(tower, ["თავი", "კაცი"])
    assert distance(georgian[0], georgian[1]) > 1e-4


def test_two_runs_add_the_same(opened: Open) -> None:
    one, other = opened(), opened()
    state = torch.random.get_rng_state()
    for tower in (one, other):
        add_pieces(tower, GEORGIAN, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"
    assert one.tokenizer.tokenizer.get_vocab() == other.tokenizer.tokenizer.get_vocab()  # type: ignore[attr-defined]
    for (name, tensor), (_, again) in zip(
        one.encoder.state_dict().items(), other.encoder.state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, again), name


@pytest.mark.parametrize("name", ["BERT", "XLM-R"])
def test_a_saved_model_has_its_pieces(name: str, tmp_path: Path) -> None:
    member = make(name, tmp_path / "folder")
    add_pieces(member.tower, GEORGIAN)
    prove_round_trip(member)
    assert unknown_share(member.tower.tokenizer, GEORGIAN) == 0


def test_a_rare_word_is_written_by_its_letters(tmp_path: Path) -> None:
    tower = make("BERT", tmp_path / "folder").tower
    add_pieces(tower, [*GEORGIAN, "დათვი"])
    tokens: Any = tower.tokenizer.tokenizer.convert_ids_to_tokens(tower.tokenize(["დათვი"])[0])  # type: ignore[attr-defined]
    assert len(tokens) > 3
    assert unknown_share(tower.tokenizer, ["დათვი", "ვი"]) == 0


def test_bytes_write_all(tmp_path: Path) -> None:
    tower = make("Qwen3", tmp_path / "folder").tower
    assert unknown_share(tower.tokenizer, GEORGIAN) == 0
    assert add_pieces(tower, GEORGIAN) == 0


def test_no_texts_lack_nothing(tmp_path: Path) -> None:
    tower = make("BERT", tmp_path / "folder").tower
    assert unknown_share(tower.tokenizer, []) == 0
    assert unknown_share(tower.tokenizer, ["", " "]) == 0
    assert add_pieces(tower, []) == 0


def test_a_tower_from_scratch_has_a_vocabulary_of_its_own() -> None:
    tower = open_text_tower("scratch:tiny", width=16, texts=GEORGIAN)
    with pytest.raises(UsageError, match="has no vocabulary that pieces could be added to"):
        add_pieces(tower, GEORGIAN)
