"""Every family of image towers through every proof of `docs/towers.py`, and the page that the script wrote."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.towers.images.pooling import pool_features
from lamplit.towers.images.timm_models import DEMO_TOWERS, open_timm
from lamplit.towers.timm_sources import build_timm

DOCS = Path(__file__).parents[1] / "docs"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("docs_towers", DOCS / "towers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


page = load_script()
SEEN = json.loads((DOCS / "towers.json").read_text())
RECORDS = [page.Record(**values) for values in SEEN["image_towers"]]
built, processor, timm_member, transformers_member = (
    page.built, page.processor, page.timm_member, page.transformers_member,
)  # fmt: skip

VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DECODER = {f"decoder_{name}": TEXT[name] for name in list(TEXT)[1:]}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
SQUARE = {"size": {"height": 32, "width": 32}}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}

# The smallest member of each family that its library has or builds.
TINY = {
    "ViT": timm_member("ViT", "test_vit"),
    "ResNet": timm_member("ResNet", "test_resnet"),
    "MLP-Mixer": timm_member("MLP-Mixer", "mixer_s32_224"),
    "MoCo-v3": timm_member("MoCo-v3", "test_vit", page.save_moco, prepare=page.moco_prepare),
    "MAE": timm_member("MAE", "test_vit", page.save_mae),
    "attention pooling": timm_member("SigLIP", "test_vit3"),
    "ConvNeXt": timm_member("ConvNeXt", "test_convnext"),
    "EfficientNet": timm_member("EfficientNet", "test_efficientnet"),
    "hf ViT": transformers_member(
        "ViT", built("ViTModel", "ViTConfig", **VIT), processor("ViT", **SQUARE), page.pooler_output
    ),
    "hf MAE": transformers_member(
        "MAE",
        built("ViTMAEForPreTraining", "ViTMAEConfig", **VIT, **DECODER),
        processor("ViT", **SQUARE),
        page.mae_features,
    ),
    "hf DINOv2": transformers_member(
        "DINOv2", built("Dinov2Model", "Dinov2Config", **VIT), processor("Bit", **CROPPED), page.pooler_output
    ),
    "hf DINOv2 with registers": transformers_member(
        "DINOv2 with registers",
        built("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **VIT, num_register_tokens=3),
        processor("Bit", **CROPPED),
        page.pooler_output,
    ),
    "hf SigLIP": transformers_member(
        "SigLIP",
        built("SiglipModel", "SiglipConfig", vision_config=VIT, text_config=TEXT),
        processor("Siglip", **SQUARE),
        page.image_features,
    ),
    "hf SigLIP vision": transformers_member(
        "SigLIP",
        built("SiglipVisionModel", "SiglipVisionConfig", **VIT),
        processor("Siglip", **SQUARE),
        page.pooler_output,
    ),
    "hf CLIP": transformers_member(
        "CLIP",
        built("CLIPModel", "CLIPConfig", vision_config=VIT, text_config=TEXT,
              projection_dim=24),
        processor("CLIP", **CROPPED),
        page.image_features,
    ),
    "hf CLIP vision": transformers_member(
        "CLIP", built("CLIPVisionModel", "CLIPVisionConfig", **VIT), processor("CLIP", **CROPPED), page.pooler_output
    ),
    "hf CLIP vision with projection": transformers_member(
        "CLIP",
        built("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VIT, projection_dim=24),
        processor("CLIP", **CROPPED),
        page.image_embeds,
    ),
    "hf BEiT": transformers_member(
        "BEiT",
        built("BeitModel", "BeitConfig", **VIT),
        processor("Beit", **SQUARE, do_center_crop=False),
        page.pooler_output,
    ),
    "hf ResNet": transformers_member(
        "ResNet",
        built("ResNetModel", "ResNetConfig", embedding_size=8, layer_type="basic", **STAGES),
        processor("ConvNext", size={"shortest_edge": 40}, crop_pct=0.8),
        page.pooler_output,
    ),
    "hf Swin": transformers_member(
        "Swin", built("SwinModel", "SwinConfig", **SWIN), processor("ViT", **SQUARE, resample=3), page.pooler_output
    ),
    "hf ConvNeXt": transformers_member(
        "ConvNeXt",
        built("ConvNextModel", "ConvNextConfig", num_stages=2, **STAGES),
        processor("ConvNext", size={"shortest_edge": 40}, crop_pct=0.8),
        page.pooler_output,
    ),
}  # fmt: skip

# What each offers by name, and which of these is its own.
WITH_CLASS_TOKEN = ["cls", "mean", "cls+mean"]
POOLS = {
    "ViT": (64, WITH_CLASS_TOKEN, "cls"),
    "ResNet": (96, ["mean"], "mean"),
    "MLP-Mixer": (512, ["mean"], "mean"),
    "MoCo-v3": (64, WITH_CLASS_TOKEN, "cls"),
    "MAE": (64, WITH_CLASS_TOKEN, "cls"),
    "attention pooling": (96, ["mean", "map"], "map"),
    "ConvNeXt": (64, ["mean"], "mean"),
    "EfficientNet": (256, ["mean"], "mean"),
    "hf ViT": (32, WITH_CLASS_TOKEN, None),  # a dense layer behind the class token
    "hf MAE": (32, WITH_CLASS_TOKEN, "cls"),
    "hf DINOv2": (32, WITH_CLASS_TOKEN, "cls"),
    "hf DINOv2 with registers": (32, WITH_CLASS_TOKEN, "cls"),
    "hf SigLIP": (32, ["mean", "map"], "map"),
    "hf SigLIP vision": (32, ["mean", "map"], "map"),
    "hf CLIP": (24, WITH_CLASS_TOKEN, None),  # a projection behind the class token
    "hf CLIP vision": (32, WITH_CLASS_TOKEN, "cls"),
    "hf CLIP vision with projection": (24, WITH_CLASS_TOKEN, None),
    "hf BEiT": (32, WITH_CLASS_TOKEN, "mean"),
    "hf ResNet": (16, ["mean"], "mean"),
    "hf Swin": (32, ["mean"], "mean"),
    "hf ConvNeXt": (16, ["mean"], "mean"),
}


# What the others show too, a little cheaper.
SLOW = {
    "MLP-Mixer", "MAE", "ConvNeXt", "EfficientNet", "hf MAE", "hf DINOv2", "hf SigLIP vision", "hf CLIP vision",
    "hf CLIP vision with projection", "hf ResNet", "hf ConvNeXt",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in TINY])
def test_family(name: str, tmp_path: Path, text_folder: Path) -> None:
    record = page.prove(TINY[name], tmp_path, f"hf:{text_folder}")
    assert record.failures() == []
    assert (record.width, record.pools, record.own_pool) == POOLS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnetv2_50x1_bit.goog_in21k", "vit_xsmall_patch16_clip_224", "swin_tiny_patch4_window7_224", "resnet50"],
)
def test_family_at_real_size(name: str, tmp_path: Path, text_folder: Path) -> None:
    record = page.prove(timm_member("", name), tmp_path, f"hf:{text_folder}")
    assert record.failures() == []


@pytest.mark.slow
def test_demo_tower_with_its_real_weights(tmp_path: Path, text_folder: Path) -> None:
    [member] = [member for member in page.MEMBERS if member.name == "demo:efficientnet-lite0"]
    record = page.prove(member, tmp_path, f"hf:{text_folder}")
    assert record.failures() == []
    assert record.weights == "real"


# That a proof can fail


@pytest.mark.slow
def test_wrong_features_and_preprocessing_are_seen(tmp_path: Path, text_folder: Path) -> None:
    def first_patch(model: Any, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model.forward_features(pixels)[:, 1]
        return found

    member = timm_member("ViT", "test_vit", features=first_patch, prepare=page.moco_prepare)
    record = page.prove(member, tmp_path, f"hf:{text_folder}")
    assert record.failures() == ["own features", "preprocessing"]
    assert page.line(record).count("FAILED") == 2


@pytest.mark.parametrize("name", list(page.ALLOWED))
def test_a_difference_is_a_failure(name: str) -> None:
    [record, *_] = RECORDS
    worse = replace(record, differences=record.differences | {name: 2e-5})
    assert worse.failures() == [name]
    assert page.line(worse).count("FAILED") == 1
    assert replace(worse, differences=record.differences | {name: float("nan")}).failures() == [name]
    assert replace(record, locked=False).failures() == replace(record, steps=9).failures() == ["lock"]


# The page


def test_page_is_what_the_script_renders() -> None:
    assert (DOCS / "towers.md").read_text() == page.render(SEEN)


def test_every_member_was_proved() -> None:
    assert [record.row for record in RECORDS] == [member.row for member in page.MEMBERS]
    for record in RECORDS:
        assert record.failures() == [], record.row


QUICK = {"vit_giant_patch14_224", "resnet50", "SiglipModel"}


@pytest.mark.parametrize(
    "record",
    [pytest.param(r, id=r.row, marks=[] if r.name in QUICK else [pytest.mark.slow]) for r in RECORDS],
)
def test_facts_still_hold(record: Any) -> None:
    """Build each model without its weights; what does not need them must be what the page says."""
    [member] = [member for member in page.MEMBERS if member.row == record.row]
    preprocessing = Preprocessing.from_dict(record.preprocessing)
    with torch.device("meta"):
        pixels = torch.zeros(1, 3, *preprocessing.image_size)
        if record.name.startswith("demo:"):
            features = pool_features(build_timm(DEMO_TOWERS[record.name.removeprefix("demo:")]), pixels)
        elif record.library == "timm":
            opened = open_timm(record.name, "random")
            assert opened.preprocessing == preprocessing or record.family == "MoCo-v3"  # whose file brings its own
            features = pool_features(opened.module, pixels)
        else:
            features = member.features(member.make(), pixels)
    assert features.shape == (1, record.width)
