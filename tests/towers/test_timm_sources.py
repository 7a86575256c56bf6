"""timm models by their folder, as timm's own `save_for_hf` writes it, and by their hub id."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models import save_for_hf
from torch import Tensor, nn

from lamplit.errors import TowerError, UsageError
from lamplit.towers.images.image_tower import ImageTower, build_image_tower, load_image_tower, open_image_tower

# What the configurations of UNI, GigaPath and H-optimus have in model_args.
ARGS: dict[str, dict[str, Any]] = {
    "uni": {"img_size": 160, "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": True},
    "gigapath": {"img_size": 96, "dynamic_img_size": False, "init_values": 1e-5, "num_classes": 0},
    "h-optimus": {"init_values": 1e-5, "num_classes": 0, "reg_tokens": 4, "no_embed_class": True},
}
CFG = {"mean": (0.7, 0.6, 0.5), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0, "interpolation": "bilinear"}


def folder_of(out: Path, kind: str) -> Any:
    torch.manual_seed(3)
    model = timm.create_model("test_vit", pretrained_cfg_overlay=CFG, **ARGS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_for_hf(model, out, model_args=ARGS[kind], safe_serialization=True)
    return model


@torch.no_grad()
def both(tower: ImageTower, model: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *tower.preprocessing.image_size), dtype=torch.uint8, generator=generator)
    pixels = tower.preprocessing.normalize(images)
    return tower(images), model.forward_head(model.forward_features(pixels), pre_logits=True)


@pytest.mark.parametrize("kind", ARGS)
def test_a_folder_opens_as_timm_opens_it(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path, kind)
    tower = open_image_tower(f"timm:local-dir:{tmp_path}")
    own = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    found, expected = both(tower, own)
    assert (found - expected).abs().max() < 1e-6
    assert tower.preprocessing.mean == CFG["mean"]
    assert tower.preprocessing.std == CFG["std"]
    assert tower.preprocessing.interpolation == "bilinear"
    side = ARGS[kind].get("img_size", 160)
    assert tower.preprocessing.image_size == (side, side)


@pytest.mark.parametrize("kind", ARGS)
def test_every_way_to_name_a_folder_is_the_same_tower(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path, kind)
    by_folder = open_image_tower(f"timm:local-dir:{tmp_path}")
    by_file = open_image_tower("timm:test_vit", weights=tmp_path / "model.safetensors")
    by_hf = open_image_tower(f"hf:{tmp_path}")
    prints = {tower.identity().fingerprint for tower in (by_folder, by_file, by_hf)}
    assert len(prints) == 1


@pytest.mark.parametrize("kind", ARGS)
def test_a_saved_folder_is_built_again(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path, kind)
    tower = open_image_tower(f"timm:local-dir:{tmp_path}")
    save_file(tower.state_dict(), tmp_path / "saved.safetensors")
    identity = type(tower.identity()).from_dict(json.loads(json.dumps(tower.identity().to_dict())))
    built = load_image_tower(identity, tmp_path / "saved.safetensors")
    found, expected = both(tower, built.backbone)
    assert torch.equal(found, expected)


def test_pickled_weights_and_a_file_of_ones_own(tmp_path: Path) -> None:
    model = folder_of(tmp_path, "uni")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(*both(open_image_tower(f"timm:local-dir:{tmp_path}"), model))
    torch.save({"state_dict": {key: value + 1 for key, value in model.state_dict().items()}}, tmp_path / "tuned.pth")
    tuned = open_image_tower(f"timm:local-dir:{tmp_path}", weights=tmp_path / "tuned.pth")
    assert torch.equal(tuned.state_dict()["backbone.cls_token"], model.cls_token + 1)
    (tmp_path / "tuned.pth").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(TowerError, match=r"holds no weights; expected model\.safetensors"):
        open_image_tower(f"timm:local-dir:{tmp_path}")
    assert open_image_tower(f"timm:local-dir:{tmp_path}", weights="random").width == model.embed_dim


def test_weights_of_a_folder_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = dict(folder_of(tmp_path, "uni").state_dict())
    state["lost.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(TowerError, match=r"1 missing: norm\.weight; 1 unexpected: lost\.weight"):
        open_image_tower(f"timm:local-dir:{tmp_path}")


def test_gated_layers_that_a_configuration_cannot_name(tmp_path: Path) -> None:
    """Virchow and UNI2: their cards give `mlp_layer` in Python, and no pooling."""
    args = {"init_values": 1e-5, "num_classes": 0, "global_pool": "", "mlp_ratio": 5.34375}
    torch.manual_seed(3)
    gated = timm.create_model("test_vit", mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, **args).eval()
    save_for_hf(timm.create_model("test_vit", **args), tmp_path, model_args=args, safe_serialization=True)
    save_file(gated.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(TowerError, match="choose how with --pool"):
        open_image_tower(f"timm:local-dir:{tmp_path}")

    tower = open_image_tower(f"timm:local-dir:{tmp_path}", pool="cls+mean")

    found, tokens = both(tower, gated)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    assert (found - expected).abs().max() < 1e-6
    assert build_image_tower(tower.identity()).state_dict().keys() == tower.state_dict().keys()


def test_hub_out_of_reach_says_what_to_type() -> None:
    with pytest.raises(TowerError, match=r"hf download nobody/none --local-dir FOLDER.*give timm:local-dir:FOLDER"):
        open_image_tower("timm:hf-hub:nobody/none")


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="timm:hf-hub:ORG/NAME for the hub"):
        open_image_tower("timm:MahmoodLab/UNI")
    with pytest.raises(TowerError, match=r"no .*config\.json; expected a folder that timm's save_for_hf wrote"):
        open_image_tower(f"timm:local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(TowerError, match=f"opens as hf:{tmp_path}"):
        open_image_tower(f"timm:local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet19", "pretrained_cfg": {}}')
    with pytest.raises(UsageError, match=r"resnet19.*near it: .*resnet18"):
        open_image_tower(f"timm:local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "changed",
    [{"model_args": {"depth": "three"}}, {"model_args": 3}, {"model_args": {"no_such": 1}}, {"pretrained_cfg": 3}],
    ids=str,
)
def test_a_damaged_configuration(tmp_path: Path, changed: dict[str, Any]) -> None:
    folder_of(tmp_path, "uni")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(TowerError):
        open_image_tower(f"timm:local-dir:{tmp_path}")


def test_images_of_other_channels(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_vit", in_chans=5), tmp_path, safe_serialization=True)
    with pytest.raises(TowerError, match="images of 5 channels; lamplit's have 3"):
        open_image_tower(f"timm:local-dir:{tmp_path}")


def test_classes_are_imagenets_only_if_timm_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("test_vit")
    save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    named = open_image_tower(f"timm:local-dir:{tmp_path / 'folder'}").class_head
    assert named is not None
    assert named.texts[0][:2] == ["tench", "A tench."]
    assert torch.equal(named.vectors, model.get_classifier().weight)
    beside = open_image_tower("timm:test_vit", weights=tmp_path / "folder" / "model.safetensors").class_head
    assert beside is not None

    alone = tmp_path / "own.safetensors"
    shutil.copy(tmp_path / "folder" / "model.safetensors", alone)
    with caplog.at_level("INFO"):
        for name in ("test_vit", f"local-dir:{tmp_path / 'folder'}"):  # that config.json is not of this file
            assert open_image_tower(f"timm:{name}", weights=alone).class_head is None
    assert "nobody says what the 1000 classes of own.safetensors are, so its classifier is left out" in caplog.text


def test_a_file_that_timm_published_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "renamed.pth"
    torch.save(timm.create_model("test_vit").state_dict(), file)
    published = timm.models._registry._model_pretrained_cfgs["test_vit.r160_in1k"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for start, is_timms in ((digest[:8], True), ("0" * 8, False)):
        monkeypatch.setattr(published, "url", f"https://example.com/test_vit-{start}.pth")
        assert (open_image_tower("timm:test_vit", weights=file).class_head is not None) == is_timms


BIRDS = {
    "label_names": [f"k{n}" for n in range(12)],
    "label_descriptions": {f"k{n}": f"bird {n}, avis" for n in range(12)},
}


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        ({"label_names": [f"flower {n}" for n in range(1000)]}, "flower 0"),
        (BIRDS, "bird 0"),
        ({"label_names": [f"n{n:08}" for n in range(1000)]}, None),
        ({"label_names": ["too", "few"]}, None),
        ({"label_names": {"first": "no number"}}, None),
    ],
)
def test_classes_that_a_config_names(tmp_path: Path, labels: dict[str, Any], first: str | None) -> None:
    model = timm.create_model("test_vit", num_classes=12 if "label_descriptions" in labels else 1000)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | labels))
    head = open_image_tower(f"timm:local-dir:{tmp_path}").class_head
    assert (None if head is None else head.texts[0][0]) == first
