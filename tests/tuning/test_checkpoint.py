from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Attention
from torch import nn

from lamplit.errors import TuneError
from lamplit.towers.lock import Locked
from lamplit.tuning.checkpoint import cut_log, load_checkpoint, open_log, save_checkpoint
from lamplit.tuning.optimizers import Adafactor, build_optimizer

Name = Literal["adamw", "adafactor"]


class Small(nn.Module):
    """Every kind of parameter: factored moments and others, heads, another layout, a scalar, dropout, a locked part."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.body = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Dropout(0.5), nn.Linear(48, 3))
        self.attention = Attention(64, num_heads=2)
        self.convolution = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.image_tower = Locked(nn.Linear(3, 3))


class Run:
    def __init__(self, name: Name, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Small().train()
        self.optimizer = build_optimizer(name, self.model, lr=1e-2, weight_decay=0.1)
        self.losses: list[float] = []

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            ids = torch.randint(50, (16,))  # drawn, as dropout is, from the random state
            loss = (self.model.body(self.model.embedding(ids)) * self.model.log_scale).square().mean()
            loss = loss + self.model.convolution(torch.randn(2, 8, 5, 5)).square().mean()
            loss = loss + self.model.attention(torch.randn(2, 3, 64)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(float(loss.detach()))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_restored_run_goes_on_bit_by_bit(name: Name, tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "last.safetensors"
    progress = {"step": 4, "best": 0.25, "best_metrics": {"recall@1": 0.1}, "names": ["ü"]}
    run = Run(name, seed=1)
    run.steps(0, 4)
    save_checkpoint(file, run.model, run.optimizer, progress)
    run.steps(4, 9)

    again = Run(name, seed=2)
    again.steps(0, 1)  # its own moments are to be replaced
    assert load_checkpoint(file, again.model, again.optimizer) == progress
    again.steps(4, 9)
    assert again.losses[1:] == run.losses[4:]
    for (key, tensor), other in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        if not key.startswith("image_tower"):
            assert torch.equal(tensor, other), key
    assert list(file.parent.iterdir()) == [file], "the partial file is left"

    for saved, kept in ((tmp_path / "a", run), (tmp_path / "b", again)):
        save_checkpoint(saved, kept.model, kept.optimizer, progress)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rounded_momentum_comes_back(tmp_path: Path) -> None:
    runs = [Run("adafactor", seed=seed) for seed in (1, 2)]
    for run in runs:
        run.optimizer = Adafactor(run.model.parameters(), lr=1e-2, momentum_dtype=torch.bfloat16)
        run.model.image_tower.requires_grad_(False)
    runs[0].steps(0, 3)
    save_checkpoint(tmp_path / "last.safetensors", runs[0].model, runs[0].optimizer, {})
    load_checkpoint(tmp_path / "last.safetensors", runs[1].model, runs[1].optimizer)
    for run in runs:
        torch.manual_seed(3)
        run.steps(3, 6)
    assert runs[0].losses[3:] == runs[1].losses


def test_locked_tower_is_not_saved(tmp_path: Path) -> None:
    run = Run("adamw", seed=1)
    save_checkpoint(tmp_path / "last.safetensors", run.model, run.optimizer, {})
    assert b"image_tower" not in (tmp_path / "last.safetensors").read_bytes()


def test_replacing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.safetensors"
    run = Run("adamw", seed=1)
    save_checkpoint(file, run.model, run.optimizer, {"step": 1})
    before = file.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(file, run.model, run.optimizer, {"step": 2})
    assert file.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_truncated_file_is_explained(kept: float, tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    run = Run("adamw", seed=1)
    save_checkpoint(file, run.model, run.optimizer, {"step": 1})
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(TuneError, match=r"last.safetensors cannot be read .*; delete it to start over"):
        load_checkpoint(file, run.model, run.optimizer)


@pytest.mark.parametrize("other", [Small(24), nn.Linear(3, 3)])
def test_checkpoint_of_another_model_is_refused(other: nn.Module, tmp_path: Path) -> None:
    run = Run("adamw", seed=1)
    save_checkpoint(tmp_path / "last.safetensors", run.model, run.optimizer, {})
    optimizer = torch.optim.SGD(other.parameters())
    with pytest.raises(TuneError, match="belongs to another model; delete it or give another --out"):
        load_checkpoint(tmp_path / "last.safetensors", other, optimizer)


def test_file_of_weights_is_refused(tmp_path: Path) -> None:
    run = Run("adamw", seed=1)
    named = run.model.named_parameters()
    weights = {f"model.{name}": tensor.contiguous() for name, tensor in named if tensor.requires_grad}
    save_file(weights, tmp_path / "last.safetensors")
    with pytest.raises(TuneError, match="belongs to another model"):
        load_checkpoint(tmp_path / "last.safetensors", run.model, run.optimizer)


def log_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_log_is_written_at_once_and_added_to(tmp_path: Path) -> None:
    for step in (1, 2):
        with open_log(tmp_path / "log.jsonl") as log:
            log({"step": step})
            assert log_of(tmp_path / "log.jsonl")[-1] == {"step": step}
    assert log_of(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_log_is_cut_behind_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    lines = [{"step": 0, "held_out": {}}, {"step": 1, "seconds": 0.5}, {"step": 2, "seconds": 0.75}]
    after = [{"step": 2, "held_out": {"recall": 0.5}}, {"step": 3, "seconds": 9.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines + after) + '{"step": 4, "lo')
    assert cut_log(file, 2) == 0.75
    assert log_of(file) == lines + after[:1]
    assert cut_log(file, 0) == 0.0
    assert log_of(file) == lines[:1]
    assert cut_log(tmp_path / "none.jsonl", 3) == 0.0
