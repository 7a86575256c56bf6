from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupted_at
from safetensors import safe_open
from safetensors.torch import load_file
from test_run import checkpoint_of, comparable, log_of, weights_of
from text_families import TEXTS, distance, make, vectors
from typer.testing import CliRunner

import lamplit
from lamplit.cli.main import app
from lamplit.errors import MissingExtraError, UsageError
from lamplit.towers.texts.text_tower import TextTower, build_text_tower, open_text_tower
from lamplit.tuning.optimizers import parameter_groups
from lamplit.tuning.run import TuneReport, tune
from lamplit.tuning.settings import TuneSettings

Settings = Callable[..., TuneSettings]


def disturb(tower: TextTower) -> None:
    """Give LoRA's second matrices, which begin at zero, something to say."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


@pytest.fixture(scope="module", params=["BERT", "T5", "GPT-2", "Llama", "Qwen3", "Gemma 3"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("family") / "folder"
    make(request.param, folder)
    return f"hf:{folder}"


@pytest.fixture
def tower(kind: str) -> TextTower:
    return open_text_tower(kind, width=16).eval()


def test_vectors_begin_as_they_were(tower: TextTower) -> None:
    expected = vectors(tower)
    tower.add_lora(4)
    assert distance(vectors(tower), expected) < 1e-6
    disturb(tower)
    assert distance(vectors(tower), expected) > 1e-3


def test_every_linear_layer_has_matrices_and_only_they_train(tower: TextTower) -> None:
    kernels = [
        (name, module.weight.shape)
        for name, module in tower.encoder.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    before = {id(parameter) for parameter in tower.encoder.parameters()}
    tower.add_lora(3)
    trained = [(name, p) for name, p in tower.encoder.named_parameters() if p.requires_grad]
    assert kernels
    assert len(trained) == 2 * len(kernels)
    assert sum(p.numel() for _, p in trained) == sum(3 * (rows + columns) for _, (rows, columns) in kernels)
    assert not before & {id(parameter) for _, parameter in trained}
    assert tower.head.weight.requires_grad
    own, low_rank = tower.split_lora()
    assert [id(parameter) for parameter in low_rank] == [id(parameter) for _, parameter in trained]
    assert {id(parameter) for parameter in own} == before


def test_lora_matrices_get_gradients_and_decay(tower: TextTower) -> None:
    tower.add_lora(2)
    disturb(tower)
    tower(tower.tokenize(TEXTS)).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    decaying, others = parameter_groups(tower, weight_decay=0.1)
    low_rank = {id(parameter) for parameter in tower.split_lora()[1]}
    assert {id(p) for p in decaying["params"]} == low_rank | {id(tower.head.weight)}
    assert [id(p) for p in others["params"]] == [id(tower.head.bias)]


def test_merged_tower_is_an_ordinary_one(tower: TextTower, tmp_path: Path) -> None:
    plain = {name: parameter.shape for name, parameter in tower.named_parameters()}
    described = tower.describe()
    tower.add_lora(4)
    assert tower.describe() == described | {"lora": 4}
    disturb(tower)
    expected = vectors(tower)
    tower.merge_lora()
    assert distance(vectors(tower), expected) < 1e-5
    assert {name: p.shape for name, p in tower.named_parameters() if p.requires_grad} == plain
    assert tower.describe() == described
    tower.save_tokenizer(tmp_path)
    built = build_text_tower(json.loads(json.dumps(described)), tmp_path).eval()
    built.load_state_dict(tower.state_dict())
    assert torch.equal(vectors(built), vectors(tower))


def test_saved_and_built_again(tower: TextTower, tmp_path: Path) -> None:
    tower.add_lora(4)
    disturb(tower)
    tower.save_tokenizer(tmp_path)
    built = build_text_tower(json.loads(json.dumps(tower.describe())), tmp_path).eval()
    built.load_state_dict(tower.state_dict())
    assert torch.equal(vectors(built), vectors(tower))
    assert built.describe() == tower.describe()


def test_lora_needs_a_pretrained_tower(text_folder: Path) -> None:
    scratch = open_text_tower("scratch:tiny", width=16, texts=TEXTS)
    with pytest.raises(UsageError, match="scratch:tiny has no pre-trained weights to keep"):
        scratch.add_lora(4)
    tower = open_text_tower(f"hf:{text_folder}", width=16)
    with pytest.raises(UsageError, match="no LoRA to merge"):
        tower.merge_lora()
    tower.add_lora(4)
    with pytest.raises(UsageError, match="has LoRA already"):
        tower.add_lora(4)
    for changes in ({"text_tower": "scratch:tiny"}, {"mode": "Lu"}, {"mode": "LL"}):
        with pytest.raises(UsageError, match="lora"):
            TuneSettings(**{"text_tower": f"hf:{text_folder}", "lora": 4} | changes)


def test_missing_extra_says_what_to_type(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    tower = open_text_tower(f"hf:{text_folder}", width=16)
    with pytest.raises(MissingExtraError, match=r"pip install 'lamplit\[lora\]'"):
        tower.add_lora(4)


# runs


@pytest.fixture(scope="module")
def made(text_folder: Path) -> Settings:
    def settings(**changes: Any) -> TuneSettings:
        values = {
            "text_tower": f"hf:{text_folder}",
            "lr": 2e-2,
            "seed": 1,
            "batch_size": 48,
            "epochs": 9.0,
            "num_evals": 4,
            "lora": 4,
        }
        return TuneSettings(**values | {"closed_form": False, "val_fraction": 0.2} | changes)

    return settings


@pytest.fixture(scope="module")
def run(words_path: Path, made: Settings, tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    return tune(words_path, tmp_path_factory.mktemp("lora") / "run", made(), device="cpu")


def test_run_learns_and_the_encoders_own_weights_stay(run: TuneReport, text_folder: Path) -> None:
    assert run.best["image_to_text/recall@1"] > 6 / 72
    losses = [line["loss"] for line in log_of(run.out) if "loss" in line]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    tower = open_text_tower(f"hf:{text_folder}", width=32)
    saved = load_file(Path(run.out) / "text_tower.safetensors")
    for name, tensor in tower.encoder.state_dict().items():
        module, _, part = name.rpartition(".")
        place = f"text_tower.encoder.base_model.model.{module}"
        [key] = [key for key in (f"{place}.{part}", f"{place}.base_layer.{part}") if key in saved]
        assert torch.equal(saved[key], tensor), key


def test_report_lists_what_trains(run: TuneReport, text_folder: Path) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=32)
    whole = sum(parameter.numel() for parameter in tower.encoder.parameters())
    tower.add_lora(4)
    low_rank = sum(parameter.numel() for parameter in tower.split_lora()[1])
    assert {name: (part["state"], part["parameters"]) for name, part in run.trains.items()} == {
        "image tower": ("locked", 0),
        "text tower": ("locked", whole),
        "text tower's LoRA": ("trains", low_rank),
        "text head": ("trains", 33 * 32),
        "logit scale": ("trains", 1),
    }


def test_checkpoint_holds_only_what_trains(run: TuneReport) -> None:
    with safe_open(Path(run.out) / "checkpoints" / "last.safetensors", "pt") as opened:
        names = [name for name in opened.keys() if name.startswith("model.")]  # noqa: SIM118 (not a mapping)
    assert names
    assert all("lora_" in name or "head" in name or "log_scale" in name for name in names)


@pytest.mark.slow
def test_interrupted_run_ends_in_the_same_bytes(
    run: TuneReport, words_path: Path, made: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with interrupted_at(out / "log.jsonl", 6):
        tune(words_path, out, made(), device="cpu")
    assert 0 < log_of(out)[-1]["step"] < run.steps
    tune(words_path, out, made(), device="cpu")
    assert weights_of(out) == weights_of(run.out)
    assert checkpoint_of(out) == checkpoint_of(run.out)
    assert comparable(log_of(out)) == comparable(log_of(run.out))


@pytest.mark.slow
def test_merged_model_has_the_same_vectors(run: TuneReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lamplit.load(run.out).encode_texts(TEXTS)
    result = CliRunner().invoke(app, ["merge", run.out, "--out", str(tmp_path / "merged")])
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "merged"))
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = lamplit.load(tmp_path / "merged")
    assert distance(merged.encode_texts(TEXTS), expected) < 1e-5
    assert "lora" not in (tmp_path / "merged" / "config.json").read_text()
    with pytest.raises(MissingExtraError, match="peft is not installed"):
        lamplit.load(run.out)
    with pytest.raises(UsageError, match="no LoRA to merge"):
        lamplit.merge_lora(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(UsageError, match="holds a model; give another --out"):
        lamplit.merge_lora(run.out, tmp_path / "merged")
