from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPVisionConfig,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    LevitImageProcessor,
    LlavaConfig,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    Siglip2VisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError, UsageError
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, build_image_tower, open_image_tower

HALF = (0.5, 0.5, 0.5)
PLAIN = Preprocessing((32, 32), HALF, HALF)


def blank(tower: ImageTower) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, *tower.preprocessing.image_size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def features(tower: ImageTower) -> Tensor:
    output: Tensor = tower(blank(tower))
    return output


def timm_model(name: str = "test_resnet", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, pretrained=False).eval()


class Tiny(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.norm(self.convolution(images))).mean((2, 3))


# timm


@pytest.mark.parametrize("name", ["test_resnet", "test_vit.r160_in1k", "test_efficientnet"])
def test_timm_random(name: str) -> None:
    tower = open_image_tower(f"timm:{name}", weights="random")
    config = timm.get_pretrained_cfg(name)
    assert features(tower).shape == (2, tower.width)
    assert tower.preprocessing.image_size == config.input_size[1:] == (160, 160)
    assert tower.preprocessing.mean == config.mean
    assert tower.preprocessing.std == config.std
    assert tower.preprocessing.interpolation == config.interpolation
    assert tower.preprocessing.crop_fraction == config.crop_pct
    assert tower.class_head is None  # an untrained classifier knows nothing
    assert not tower.training
    assert tower.identity().weights == "random"


@pytest.mark.parametrize("name", ["test_vit", "tf_efficientnetv2_b3.in21k_ft_in1k"])  # the second squashes
def test_timm_preprocessing_is_timms_own(name: str) -> None:
    tower = open_image_tower(f"timm:{name}", weights="random")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower.backbone))
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image_file = Image.fromarray(small).resize((500, 250))
    expected, found = transform(image_file), tower.preprocessing.reference(image_file)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("changed", [{"crop_mode": "border"}, {"interpolation": "hamming"}], ids=str)
def test_timm_preprocessing_that_is_unknown_is_refused(tmp_path: Path, changed: dict[str, str]) -> None:
    model = timm.create_model("test_vit", pretrained_cfg_overlay=changed)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(TowerError, match=r"in a way that lamplit does not know \("):
        open_image_tower(f"timm:local-dir:{tmp_path}")
    assert open_image_tower(f"timm:local-dir:{tmp_path}", preprocessing=PLAIN).preprocessing == PLAIN


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_timm_weights_from_a_file(tmp_path: Path, suffix: str, prefix: str) -> None:
    model = timm_model()
    model(torch.rand(2, 3, 64, 64))
    state = {prefix + key: value for key, value in model.state_dict().items()}
    file = tmp_path / f"tower.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 7}, file)

    tower = open_image_tower("timm:test_resnet", weights=file)

    pixels = tower.preprocessing.normalize(blank(tower))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert torch.equal(features(tower), expected)
    assert tower.weights == str(file.resolve())


def test_both_file_formats_are_the_same_tower(tmp_path: Path) -> None:
    state = timm_model().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    first = open_image_tower("timm:test_resnet", weights=tmp_path / "a.safetensors")
    second = open_image_tower("timm:test_resnet", weights=tmp_path / "b.pth")
    assert torch.equal(features(first), features(second))
    assert first.identity().fingerprint == second.identity().fingerprint
    assert first.class_head is None  # a file does not say what its 1,000 classes are


def test_file_of_the_bare_backbone(tmp_path: Path) -> None:
    model = timm_model()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    classifier = model.pretrained_cfg["classifier"]
    bare = {key: value for key, value in model.state_dict().items() if not key.startswith(classifier)}
    assert len(bare) < len(model.state_dict())
    save_file(bare, tmp_path / "bare.safetensors")

    tower = open_image_tower("timm:test_resnet", weights=tmp_path / "bare.safetensors")
    whole = open_image_tower("timm:test_resnet", weights=tmp_path / "whole.pth")

    assert torch.equal(features(tower), features(whole))
    assert tower.class_head is None
    assert tower.identity().fingerprint == whole.identity().fingerprint


class Bomb:
    """What a hostile pickle looks like: reading it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.file,)


def test_weights_that_would_run_code(tmp_path: Path) -> None:
    state = dict(timm_model().state_dict()) | {"bomb": Bomb(tmp_path / "executed")}
    for content in (state, {"state_dict": state}, {"model": timm_model().state_dict(), "args": state["bomb"]}):
        torch.save(content, tmp_path / "hostile.pth")
        with pytest.raises(TowerError, match="never does"):
            open_image_tower("timm:test_resnet", weights=tmp_path / "hostile.pth")
        assert not (tmp_path / "executed").exists()


def moco_checkpoint(model: nn.Module, file: Path) -> None:
    encoder = {f"module.base_encoder.{key}": value for key, value in model.state_dict().items() if "head" not in key}
    projector = {"module.base_encoder.head.0.weight": torch.ones(2, 2), "module.predictor.0.weight": torch.ones(1)}
    torch.save({"epoch": 300, "state_dict": encoder | projector}, file)


def test_moco_checkpoint(tmp_path: Path) -> None:
    model = timm_model("test_vit")
    moco_checkpoint(model, tmp_path / "moco.pth.tar")
    tower = open_image_tower("timm:test_vit", weights=tmp_path / "moco.pth.tar")
    pixels = tower.preprocessing.normalize(blank(tower))
    with torch.no_grad():
        assert torch.equal(features(tower), model.forward_head(model.forward_features(pixels), pre_logits=True))
    assert tower.preprocessing.mean == timm.data.IMAGENET_DEFAULT_MEAN  # the authors', not that of test_vit
    assert tower.class_head is None


def test_moco_checkpoint_of_another_shape(tmp_path: Path) -> None:
    moco_checkpoint(timm_model("test_vit"), tmp_path / "moco.pth.tar")
    with pytest.raises(TowerError, match="do not fit timm:test_resnet"):
        open_image_tower("timm:test_resnet", weights=tmp_path / "moco.pth.tar")
    with pytest.raises(TowerError, match="12 heads and timm's has 6"):
        open_image_tower("timm:vit_small_patch16_224", weights=tmp_path / "moco.pth.tar")


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = timm_model().state_dict()
    lost, *_ = [key for key in state if key.endswith("conv1.weight")]
    bent, *_ = [key for key in state if key.endswith("bn2.bias")]
    wrong = {key: value for key, value in state.items() if key != lost} | {"extra.weight": torch.ones(1)}
    wrong[bent] = torch.ones(3)
    save_file(wrong, tmp_path / "wrong.safetensors")

    with pytest.raises(TowerError) as caught:
        open_image_tower("timm:test_resnet", weights=tmp_path / "wrong.safetensors")

    message = str(caught.value)
    assert f"1 missing: {lost}" in message
    assert "1 unexpected: extra.weight" in message
    assert f"1 of another shape: {bent} (3,) for" in message


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    save_file(timm_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(TowerError, match=r"missing: .*unexpected: "):
        open_image_tower("timm:test_resnet", weights=tmp_path / "vit.safetensors")


def test_weights_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TowerError, match="no weights at"):
        open_image_tower("timm:test_resnet", weights=tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "name",
    ["test_vit.r160_in1k", "resnet18", "test_vit.no_such_tag", "vit_small_patch16_36x1_224"],  # the last has no weights
)
def test_no_weights_is_an_error_that_says_how_to_give_them(name: str) -> None:
    with pytest.raises(TowerError, match=r"--image-tower-weights FILE.*--image-tower-weights random"):
        open_image_tower(f"timm:{name}")


def test_unknown_timm_name_lists_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"resnet51.*near it: .*resnet50,"):
        open_image_tower("timm:resnet51")


@pytest.mark.parametrize("spec", ["resnet18", "timm:", "hf:", "demo:", "demo:resnet", "onnx:tower", "", ":", "TIMM:x"])
def test_unknown_spec(spec: str) -> None:
    with pytest.raises(UsageError, match="timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME_OR_FOLDER, lit:NAME, "):
        open_image_tower(spec)


@pytest.mark.parametrize("spec", ["hf:/some/folder", "demo:efficientnet-lite0"])
def test_weights_are_never_ignored(spec: str) -> None:
    with pytest.raises(UsageError, match="brings its own weights"):
        open_image_tower(spec, weights="random")
    with pytest.raises(UsageError, match="a module has its weights"):
        open_image_tower(Tiny(), weights="random", preprocessing=PLAIN)


def test_given_preprocessing_replaces_the_librarys() -> None:
    given = Preprocessing((96, 128), HALF, HALF, "nearest")
    tower = open_image_tower("timm:test_resnet", weights="random", preprocessing=given)
    assert tower.preprocessing == tower.identity().preprocessing == given
    assert features(tower).shape == (2, tower.width)


# modules


def test_module() -> None:
    module = Tiny(7)
    tower = open_image_tower(module.train(), preprocessing=PLAIN)
    assert tower.width == 7
    assert not module.training
    assert tower.spec.startswith("module:")
    assert tower.spec.endswith("Tiny")
    assert torch.equal(features(tower), features(tower))
    with torch.no_grad():
        assert torch.equal(features(tower), module(PLAIN.normalize(blank(tower))))


def test_module_needs_preprocessing() -> None:
    with pytest.raises(UsageError, match=r"preprocessing=lamplit\.Preprocessing"):
        open_image_tower(Tiny())


def test_module_that_does_not_pool() -> None:
    with pytest.raises(TowerError, match=r"\(1, 4, 30, 30\).*\(B, width\)"):
        open_image_tower(nn.Conv2d(3, 4, 3), preprocessing=PLAIN)


# Hugging Face folders

# more than ten, so that the order of their numbers is not that of their digits
LABELS = {0: "red fox, Vulpes vulpes", 1: "cat"} | {c: f"thing {c}" for c in range(2, 12)}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DINO = VIT | {"image_size": 56, "patch_size": 14}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
NAMED = {"id2label": LABELS, "label2id": {name: c for c, name in LABELS.items()}}

vit_processor = ViTImageProcessor(size={"height": 32, "width": 32})
convnext_processor = ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.8)
bit_processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
BIT = tuple(bit_processor.image_mean), tuple(bit_processor.image_std)

# name: model, processor, width, class names are known, preprocessing
FOLDERS: dict[str, tuple[Callable[[], Any], Any, int, bool, Preprocessing]] = {
    "vit": (
        lambda: ViTModel(ViTConfig(**VIT)),
        vit_processor,
        32,
        False,
        Preprocessing((32, 32), HALF, HALF, "bilinear", 1.0, "squash"),
    ),
    "vit without pooler": (
        lambda: ViTModel(ViTConfig(**VIT), add_pooling_layer=False),
        vit_processor,
        32,
        False,
        Preprocessing((32, 32), HALF, HALF, "bilinear", 1.0, "squash"),
    ),
    "vit classifier": (
        lambda: ViTForImageClassification(ViTConfig(**VIT, **NAMED)),
        vit_processor,
        32,
        True,
        Preprocessing((32, 32), HALF, HALF, "bilinear", 1.0, "squash"),
    ),
    "resnet": (
        lambda: ResNetModel(ResNetConfig(**RESNET)),
        convnext_processor,
        16,
        False,
        Preprocessing((64, 64), HALF, HALF, "bicubic", 0.8, center="floor"),
    ),
    "resnet classifier": (
        lambda: ResNetForImageClassification(ResNetConfig(**RESNET, **NAMED)),
        convnext_processor,
        16,
        True,
        Preprocessing((64, 64), HALF, HALF, "bicubic", 0.8, center="floor"),
    ),
    "resnet classifier of nameless classes": (
        lambda: ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=4)),
        convnext_processor,
        16,
        False,
        Preprocessing((64, 64), HALF, HALF, "bicubic", 0.8, center="floor"),
    ),
    "dinov2": (
        lambda: Dinov2Model(Dinov2Config(**DINO)),
        bit_processor,
        32,
        False,
        Preprocessing((56, 56), *BIT, "bicubic", 0.875, center="floor"),
    ),
    "dinov2 classifier": (  # reads more than the pooled features, so it is no head start
        lambda: Dinov2ForImageClassification(Dinov2Config(**DINO, **NAMED)),
        bit_processor,
        32,
        False,
        Preprocessing((56, 56), *BIT, "bicubic", 0.875, center="floor"),
    ),
    "deit with teacher": (  # has two classifiers
        lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**VIT, **NAMED)),
        DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
        32,
        False,
        Preprocessing((32, 32), HALF, HALF, "bicubic", 0.8, "squash", center="floor"),
    ),
}


def save_folder(folder: Path, kind: str, **options: Any) -> Any:
    make, processor, *_ = FOLDERS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder(tmp_path: Path, kind: str) -> None:
    _, _, width, is_named, preprocessing = FOLDERS[kind]
    model = save_folder(tmp_path, kind)

    tower = open_image_tower(f"hf:{tmp_path}")

    assert tower.width == width
    assert tower.preprocessing == preprocessing
    with torch.no_grad():
        output = model.base_model(preprocessing.normalize(blank(tower)))
    pooled = output.get("pooler_output")
    expected = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
    assert torch.equal(features(tower), expected)
    assert (tower.class_head is not None) == is_named
    if tower.class_head is not None:
        assert tower.class_head.texts[0] == ["red fox", "A red fox.", "red fox, Vulpes vulpes"]
        assert tower.class_head.texts[1] == ["cat", "A cat."]
        assert tower.class_head.vectors.shape == (12, width)
        # the vectors are the classifier's own: with its bias they give its own logits
        with torch.no_grad():
            logits = model(preprocessing.normalize(blank(tower))).logits
        [bias] = [value for key, value in model.state_dict().items() if key.startswith("classifier") and "bias" in key]
        assert torch.allclose(features(tower) @ tower.class_head.vectors.T + bias, logits, atol=1e-5)


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_is_built_again_without_it(tmp_path: Path, kind: str) -> None:
    save_folder(tmp_path / "folder", kind)
    tower = open_image_tower(f"hf:{tmp_path / 'folder'}")
    shutil.rmtree(tmp_path / "folder")

    identity = TowerIdentity.from_dict(json.loads(json.dumps(tower.identity().to_dict())))
    built = build_image_tower(identity)
    built.load_state_dict(tower.state_dict())

    assert identity == tower.identity()
    assert built.identity().fingerprint == identity.fingerprint
    assert torch.equal(features(built), features(tower))


PROCESSORS = {
    "vit": vit_processor,
    "convnext": convnext_processor,
    "convnext of large images": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "poolformer": PoolFormerImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, crop_pct=0.9
    ),
    "bit": bit_processor,
    "deit": FOLDERS["deit with teacher"][1],
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_folders_preprocessing_is_its_processors_own(tmp_path: Path, kind: str) -> None:
    processor = PROCESSORS[kind]
    ResNetModel(ResNetConfig(**RESNET)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image_file = Image.fromarray(small).resize((203, 100))  # leaves an uneven margin where the processor crops

    tower = open_image_tower(f"hf:{tmp_path}")

    by_pil = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    [expected] = by_pil(images=image_file, return_tensors="pt")["pixel_values"]
    found = tower.preprocessing.reference(image_file)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


def test_folder_without_preprocessing(tmp_path: Path) -> None:
    save_folder(tmp_path, "vit")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"longest_edge": 32}}))
    with pytest.raises(TowerError, match="processor"):
        open_image_tower(f"hf:{tmp_path}")
    file.unlink()
    with pytest.raises(TowerError, match="could not be opened"):
        open_image_tower(f"hf:{tmp_path}")


def test_folder_whose_checkpoint_lacks_keys(tmp_path: Path) -> None:
    save_folder(tmp_path, "vit")
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in state if key.startswith(("encoder.layer.1", "layers.1")))
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerError, match=r"lacks weights for: \S*1\.attention\S*$"):
        open_image_tower(f"hf:{tmp_path}")


def test_folder_whose_checkpoint_has_other_shapes(tmp_path: Path) -> None:
    save_folder(tmp_path, "vit")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(TowerError, match=r"fc1\.weight \(\(64, 32\) for \(48, 32\)\)"):
        open_image_tower(f"hf:{tmp_path}")


def test_folder_in_half_precision_is_read_in_full(tmp_path: Path) -> None:
    make, processor, *_ = FOLDERS["vit"]
    make().half().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tower = open_image_tower(f"hf:{tmp_path}")
    built = build_image_tower(tower.identity())
    for opened in (tower, built):
        assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_damaged_folder(tmp_path: Path, name: str, content: bytes) -> None:
    save_folder(tmp_path, "vit")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TowerError, match=f"hf:{tmp_path}"):
        open_image_tower(f"hf:{tmp_path}")


def test_folder_with_a_pickle_that_runs_code(tmp_path: Path) -> None:
    save_folder(tmp_path, "vit")
    (tmp_path / "model.safetensors").unlink()
    trace = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return Path.touch, (trace,)

    torch.save({"layernorm.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TowerError, match="could not be opened"):
        open_image_tower(f"hf:{tmp_path}")
    assert not trace.exists()


@pytest.mark.parametrize(
    "settings",
    [{"size": {"height": 10**9, "width": 10**9}}, {"size": {"height": 0, "width": 0}}, {"size": {"shortest_edge": -8}}],
    ids=str,
)
def test_folder_that_asks_for_images_beyond_all_bounds(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_folder(tmp_path, "vit")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(TowerError, match=f"hf:{tmp_path}"):
        open_image_tower(f"hf:{tmp_path}")


def test_folder_whose_processor_does_more_than_it_says(tmp_path: Path) -> None:
    save_folder(tmp_path, "vit")
    LevitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(TowerError, match=r"in a way that lamplit does not know \(LevitImageProcessor"):
        open_image_tower(f"hf:{tmp_path}")
    assert open_image_tower(f"hf:{tmp_path}", preprocessing=PLAIN).preprocessing == PLAIN


def test_processor_that_flips_the_channels(tmp_path: Path) -> None:
    """MobileViT's gives an array of negative strides, which torch does not take as it is."""
    save_folder(tmp_path, "vit")
    sizes: dict[str, Any] = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    MobileViTImageProcessor(**sizes).save_pretrained(tmp_path)
    with pytest.raises(TowerError, match=r"in a way that lamplit does not know \(MobileViTImageProcessor"):
        open_image_tower(f"hf:{tmp_path}")


@pytest.mark.parametrize(("kind", "reason"), [("siglip2", "NaFlex"), ("llava", "a whole llava model")])
def test_whole_models_that_are_no_image_tower(tmp_path: Path, kind: str, reason: str) -> None:
    config = Siglip2VisionConfig(**VIT) if kind == "siglip2" else LlavaConfig(vision_config=CLIPVisionConfig(**VIT))
    config.save_pretrained(tmp_path)
    with pytest.raises(TowerError, match=reason):
        open_image_tower(f"hf:{tmp_path}")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder"])
def test_hub_out_of_reach(name: str) -> None:
    with pytest.raises(TowerError, match=f"hf:{name} could not be opened"):
        open_image_tower(f"hf:{name}")


# identity


def test_fingerprint_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    save_folder(tmp_path / "here", "vit")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here = open_image_tower(f"hf:{tmp_path / 'here'}").identity()
    there = open_image_tower(f"hf:{tmp_path / 'there'}").identity()
    assert here.spec != there.spec
    assert here.fingerprint == there.fingerprint


def test_fingerprint_does_not_depend_on_the_release_of_transformers(tmp_path: Path) -> None:
    save_folder(tmp_path, "vit")
    before = open_image_tower(f"hf:{tmp_path}").identity().fingerprint
    assert "transformers_version" not in json.dumps(open_image_tower(f"hf:{tmp_path}").config)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "4.0.0"}))
    assert open_image_tower(f"hf:{tmp_path}").identity().fingerprint == before


def test_fingerprint_changes_with_weights_preprocessing_and_architecture() -> None:
    module = Tiny()
    tower = open_image_tower(module, preprocessing=PLAIN)
    fingerprints = [tower.identity().fingerprint]
    assert open_image_tower(module, preprocessing=PLAIN).identity().fingerprint == fingerprints[0]

    for change in (
        {"image_size": (32, 40)},
        {"mean": (0.5, 0.5, 0.4)},
        {"std": (0.5, 0.5, 0.4)},
        {"interpolation": "bilinear"},
        {"crop_fraction": 0.9},
        {"fit": "squash"},
    ):
        other = replace(PLAIN, **change)  # type: ignore[arg-type]
        fingerprints.append(open_image_tower(module, preprocessing=other).identity().fingerprint)
    with torch.no_grad():
        module.norm.running_var[0] += 1e-6
    fingerprints.append(tower.identity().fingerprint)
    tower.config = tower.config | {"name": "another"}
    fingerprints.append(tower.identity().fingerprint)

    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(fingerprint) == 32 for fingerprint in fingerprints)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_byobnet"])
def test_timm_tower_is_built_again(name: str) -> None:
    tower = open_image_tower(f"timm:{name}", weights="random")
    identity = TowerIdentity.from_dict(json.loads(json.dumps(tower.identity().to_dict())))
    built = build_image_tower(identity)
    assert built.identity().fingerprint != identity.fingerprint  # its weights are others so far
    built.load_state_dict(tower.state_dict())
    assert built.identity() == replace(identity, weights=None)
    assert torch.equal(features(built), features(tower))


def test_module_is_not_built_again() -> None:
    identity = open_image_tower(Tiny(), preprocessing=PLAIN).identity()
    with pytest.raises(TowerError, match="image_tower="):
        build_image_tower(identity)


# the demo


def test_demo_tower() -> None:
    tower = open_image_tower("demo:efficientnet-lite0")
    assert tower.width == 1280
    assert tower.preprocessing.image_size == (224, 224)
    assert tower.class_head is not None
    assert tower.class_head.vectors.shape == (1000, 1280)
    assert len(tower.class_head.texts) == 1000
    assert tower.class_head.texts[0][:3] == ["tench", "A tench.", "tench, Tinca tinca"]
    assert tower.identity().fingerprint == open_image_tower("demo:efficientnet-lite0").identity().fingerprint


def test_demo_tower_was_trained(tmp_path: Path) -> None:
    """The renamed weights are in their places: the classifier knows an image of what anyone can draw."""
    tower = open_image_tower("demo:efficientnet-lite0")
    assert tower.class_head is not None
    rows = np.arange(224)[:, None].repeat(224, 1)
    squares = ((rows // 28 + rows.T // 28) % 2 * 255).astype(np.uint8)
    pixels = torch.from_numpy(squares).expand(1, 3, -1, -1)
    with torch.no_grad():
        logits = tower(pixels) @ tower.class_head.vectors.T
    best = [tower.class_head.texts[c][0] for c in logits[0].topk(5).indices]
    assert "crossword puzzle" in best


@pytest.mark.parametrize("part", ["config.json", "preprocessor_config.json"])
def test_code_that_comes_with_a_model_never_runs(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers would ask on stdin whether to run the code
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    trap = tmp_path / "trap"
    (tmp_path / "own.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\nclass Own:\n    pass\n")
    code = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoImageProcessor": "own.Own"}
    changed = {"model_type": "own"} if part == "config.json" else {"image_processor_type": "Own"}
    values = json.loads((tmp_path / part).read_text()) | changed | {"auto_map": code}
    (tmp_path / part).write_text(json.dumps(values))
    with pytest.raises(TowerError, match="could not be opened"):
        open_image_tower(f"hf:{tmp_path}")
    assert not trap.exists()
