"""Checkpoints of one timm model as trainers write them: each opens, with the vectors of timm's own load."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from lamplit.errors import TowerError
from lamplit.towers.images.checkpoints import find_backbone
from lamplit.towers.images.image_tower import ImageTower, open_image_tower

State = dict[str, Tensor]


def timm_model(seed: int = 0, name: str = "test_vit", **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, **options).eval()


@torch.no_grad()
def difference(tower: ImageTower, model: Any) -> float:
    """Largest difference of the tower's features from timm's, on noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *tower.preprocessing.image_size), dtype=torch.uint8, generator=generator)
    pixels = tower.preprocessing.normalize(images)
    expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return float((tower(images) - expected).abs().max())


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def bare(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def tens(state: State) -> State:
    return bare(state) | {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}


OTHER = {key: value + 1 for key, value in timm_model().state_dict().items()}
# What is written of a model's weights, by the trainer that writes so.
WRITTEN: dict[str, Callable[[State], Any]] = {
    "timm": lambda s: {
        "epoch": 3, "arch": "test_vit", "state_dict": OTHER, "state_dict_ema": s, "version": 2, "metric": 71.2,
        "args": argparse.Namespace(model="test_vit", lr=0.1, opt_betas=[0.9, 0.95]),
        "optimizer": {"state": {0: {"step": 1}}},
    },
    "timm without averages": lambda s: {"state_dict": s, "state_dict_ema": None, "args": argparse.Namespace()},
    "deit": lambda s: {"model": OTHER, "model_ema": s, "optimizer": {}, "args": argparse.Namespace(ema=True)},
    "mae": lambda s: {"model": bare(s)},
    "dino": lambda s: {
        "student": under("module.backbone.", {k: v + 1 for k, v in bare(s).items()})
        | {"module.head.mlp.0.bias": torch.ones(3)},
        "teacher": under("backbone.", bare(s)) | {"head.mlp.0.bias": torch.ones(3)}, "args": argparse.Namespace(),
    },
    "dinov2": lambda s: {"teacher": under("backbone.", bare(s)) | {"dino_head.mlp.0.bias": torch.ones(3)}},
    "lightning": lambda s: {
        "state_dict": under("model.", s) | {"loss.weight": torch.ones(2)}, "hyper_parameters": {"lr": 1},
    },
    "lightly": lambda s: {"state_dict": under("encoder.", bare(s)) | {"projection.0.weight": torch.ones(2)}},
    "open_clip": lambda s: {
        "state_dict": under("module.visual.trunk.", bare(s))
        | {"module.visual.head.proj.weight": torch.ones(4, 64), "module.logit_scale": torch.ones(())},
    },
    "fastai": lambda s: {"model": under("timm_model.", tens(s)), "opt": None},
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled and distributed": lambda s: {"model": under("module._orig_mod.", s)},
    "compiled by blocks": lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    "averaged by torch": lambda s: under("module.", s) | {"n_averaged": torch.ones((), dtype=torch.long)},
    "fine-tuned": lambda s: {"state_dict": tens(s)},
    "mean teacher": lambda s: under("student.", {k: v + 1 for k, v in s.items()}) | under("teacher.", s),
}  # fmt: skip


@pytest.mark.parametrize("trainer", WRITTEN)
def test_every_trainers_checkpoint_opens(tmp_path: Path, trainer: str) -> None:
    model = timm_model(7)
    torch.save(WRITTEN[trainer](model.state_dict()), tmp_path / "last.pth.tar")
    tower = open_image_tower("timm:test_vit", weights=tmp_path / "last.pth.tar")
    assert difference(tower, model) < 1e-6
    assert tower.class_head is None  # its classes are whose they may be


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit3"])
def test_other_families(tmp_path: Path, name: str) -> None:
    model = timm_model(1, name)
    save_file(under("visual.trunk.", model.state_dict()), tmp_path / "a.safetensors")
    assert difference(open_image_tower(f"timm:{name}", weights=tmp_path / "a.safetensors"), model) < 1e-6
    tuned = timm_model(1, name, num_classes=7)
    torch.save({"state_dict": tuned.state_dict(), "args": argparse.Namespace()}, tmp_path / "b.pth")
    assert difference(open_image_tower(f"timm:{name}", weights=tmp_path / "b.pth"), tuned) < 1e-6


def test_what_is_taken_is_what_timm_takes(tmp_path: Path) -> None:
    states = [timm_model(seed).state_dict() for seed in range(3)]
    torch.save(dict(zip(("state_dict", "model", "state_dict_ema"), states, strict=True)), tmp_path / "a.pth")
    torch.save(dict(zip(("state_dict", "model"), states[:2], strict=True)), tmp_path / "b.pth")
    for file in (tmp_path / "a.pth", tmp_path / "b.pth"):
        own = timm_model(9)
        load_checkpoint(own, str(file))
        assert difference(open_image_tower("timm:test_vit", weights=file), own) < 1e-6


def test_what_was_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(WRITTEN["timm"](timm_model(7).state_dict()), tmp_path / "last.pth")
    with caplog.at_level(logging.INFO, "lamplit"):
        open_image_tower("timm:test_vit", weights=tmp_path / "last.pth")
    assert "last.pth: took state_dict_ema.* and passed over state_dict.*" in caplog.messages
    torch.save(WRITTEN["fine-tuned"](timm_model(7).state_dict()), tmp_path / "tuned.pth")
    with caplog.at_level(logging.INFO, "lamplit"):
        open_image_tower("timm:test_vit", weights=tmp_path / "tuned.pth")
    assert any("tuned.pth: its classifier is not that of" in message for message in caplog.messages)


@pytest.mark.parametrize("size", [96, 224])
def test_positions_of_another_size(tmp_path: Path, size: int) -> None:
    torch.save({"state_dict": under("module.", timm_model(2, img_size=size).state_dict())}, tmp_path / "a.pth")
    own = timm_model(9)
    load_checkpoint(own, str(tmp_path / "a.pth"), filter_fn=checkpoint_filter_fn)
    tower = open_image_tower("timm:test_vit", weights=tmp_path / "a.pth")
    assert difference(tower, own) < 1e-6


def test_names_of_the_authors_own_code(tmp_path: Path) -> None:
    """DINOv2's: a mask token and one bias for queries, keys and values; timm's filter knows them."""
    model = timm_model(4, init_values=1.0, num_classes=0)
    state = dict(model.state_dict()) | {"mask_token": torch.zeros(1, 64)}
    torch.save(state, tmp_path / "dinov2.pth")
    with pytest.raises(TowerError, match=r"unexpected: .*blocks\.0\.ls1\.gamma"):  # test_vit has no such scales
        open_image_tower("timm:test_vit", weights=tmp_path / "dinov2.pth")
    (tmp_path / "config.json").write_text(
        '{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 160, 160], "fixed_input_size": true, '
        '"num_classes": 0}, "model_args": {"init_values": 1.0, "num_classes": 0}}'
    )
    assert difference(open_image_tower("timm:test_vit", weights=tmp_path / "dinov2.pth"), model) < 1e-6


def test_what_is_missing_or_left_over_under_the_prefix_is_named(tmp_path: Path) -> None:
    state = under("backbone.", timm_model().state_dict()) | {"backbone.extra.weight": torch.ones(1)}
    del state["backbone.norm.bias"]
    torch.save({"teacher": state}, tmp_path / "a.pth")
    with pytest.raises(TowerError, match=r"do not fit timm:test_vit; 1 missing: norm\.bias; 1 unexpected: extra\.w"):
        open_image_tower("timm:test_vit", weights=tmp_path / "a.pth")


def test_two_towers_of_which_neither_is_the_better_one(tmp_path: Path) -> None:
    state = timm_model().state_dict()
    torch.save({"left": state, "right": state}, tmp_path / "a.pth")
    with pytest.raises(TowerError, match=r"holds the tower 2 times, under left\., right\."):
        open_image_tower("timm:test_vit", weights=tmp_path / "a.pth")


class Settings:
    """What a trainer of one's own keeps beside the weights."""


def test_a_class_that_is_refused_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": timm_model().state_dict(), "args": Settings()}, tmp_path / "a.pth")
    with pytest.raises(TowerError, match=r"holds objects of \S*test_checkpoints\.Settings, which could only be read"):
        open_image_tower("timm:test_vit", weights=tmp_path / "a.pth")


OWN = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))).state_dict()
NAMES = st.sampled_from(["module", "model", "backbone", "encoder", "0", "1", "visual.trunk", "weight", "ema"])


@given(
    st.lists(NAMES, max_size=4), st.lists(NAMES, max_size=2), st.dictionaries(NAMES, st.just(torch.ones(1)), max_size=3)
)
def test_a_backbone_is_found_under_any_prefix(wrappers: list[str], modules: list[str], beside: State) -> None:
    content: dict[str, Any] = under("".join(f"{name}." for name in modules), OWN)
    content |= {f"other.{key}": value for key, value in beside.items()} if modules else {}
    for name in wrappers:
        content = {name: content, "epoch": 3, "note": "text", "nothing": None}
    found = find_backbone("file", content, OWN)
    assert found.prefix == "".join(f"{name}." for name in [*reversed(wrappers), *modules])
    assert found.state.keys() == OWN.keys()
    assert all(found.state[key] is OWN[key] for key in OWN)
    assert found.num_others == (len(beside) if modules else 0)
