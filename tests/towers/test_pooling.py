from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitModel,
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import lamplit
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError, UsageError
from lamplit.inspection import describe
from lamplit.store.embed.backends import choose_backend
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, build_image_tower, open_image_tower
from lamplit.towers.images.pooling import POOLS, find_pools, pool_features
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

HALF = (0.5, 0.5, 0.5)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def shaken(model: Any) -> Any:
    """No weight is zero or one, so that no norm or token is without effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pixels(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def timm_model(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: timm.create_model(name, num_classes=0, **options)


# What stands where, written out for each kind: name -> model, side, and (its class token, its patches) by hand.
def timm_tokens(model: Any, inputs: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(inputs)
    return model.fc_norm(tokens[:, 0]), model.fc_norm(tokens[:, num_prefix:].mean(1))


def hf_tokens(model: Any, inputs: Tensor, num_prefix: int, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    tokens = model(inputs).last_hidden_state
    norm = norm or nn.Identity()
    return norm(tokens[:, 0]), norm(tokens[:, num_prefix:].mean(1))


CASES: dict[str, tuple[Callable[[], Any], int, Callable[[Any, Tensor], tuple[Tensor, Tensor]], str | None]] = {
    "timm ViT": (timm_model("test_vit"), 160, lambda m, x: timm_tokens(m, x, 1), "cls"),
    "timm ViT of means": (timm_model("test_vit", global_pool="avg"), 160, lambda m, x: timm_tokens(m, x, 1), "mean"),
    "timm ViT with registers": (
        timm_model("test_vit", reg_tokens=4), 160, lambda m, x: timm_tokens(m, x, 5), "cls",
    ),
    "timm DeiT with a teacher": (
        timm_model("deit_tiny_distilled_patch16_224", depth=1), 224, lambda m, x: hf_like(m, x), None,
    ),
    "hf ViT": (lambda: ViTModel(ViTConfig(**SIZES)), 32, lambda m, x: hf_tokens(m, x, 1), None),
    "hf DINOv2 with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
        32, lambda m, x: hf_tokens(m, x, 4), "cls",
    ),
    "hf CLIP": (
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=24)),
        32, lambda m, x: hf_tokens(m, x, 1, m.vision_model.post_layernorm), None,
    ),
    "hf BEiT": (
        lambda: BeitModel(BeitConfig(**SIZES)), 32, lambda m, x: hf_tokens(m, x, 1, m.pooler.layernorm), "mean",
    ),
}  # fmt: skip


def hf_like(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(inputs)  # class token, teacher's token, patches
    return tokens[:, 0], tokens[:, 2:].mean(1)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_pools_against_tokens_by_hand(name: str) -> None:
    make, side, by_hand, own = CASES[name]
    model, inputs = shaken(make()), pixels(side)
    class_token, mean = by_hand(model, inputs)

    assert torch.equal(pool_features(model, inputs, "cls"), class_token)
    assert torch.equal(pool_features(model, inputs, "mean"), mean)
    both = pool_features(model, inputs, "cls+mean")
    assert torch.equal(both, torch.cat([class_token, mean], dim=-1))
    assert both.shape[1] == 2 * class_token.shape[1]

    assert find_pools(model, inputs) == (["cls", "mean", "cls+mean"], own)
    if own is not None:
        assert torch.allclose(pool_features(model, inputs), pool_features(model, inputs, own), atol=1e-6)
    others = [n for n in ("cls", "mean") if n != own]
    for other in others:  # the names are not the same thing under two names
        found, default = pool_features(model, inputs, other), pool_features(model, inputs)
        assert found.shape != default.shape or (found - default).abs().max() > 1e-3


@torch.no_grad()
def test_registers_are_not_patches() -> None:
    model, inputs = shaken(timm_model("test_vit", reg_tokens=4)()), pixels(160)
    tokens = model.forward_features(inputs)
    assert tokens.shape[1] == 1 + 4 + 100
    assert (pool_features(model, inputs, "mean") - tokens[:, 1:].mean(1)).abs().max() > 1e-3


@torch.no_grad()
def test_attention_pooling() -> None:
    for model, side in (
        (shaken(SiglipVisionModel(SiglipVisionConfig(**SIZES))), 32),
        (shaken(timm_model("test_vit3")()), 160),
    ):
        inputs = pixels(side)
        assert find_pools(model, inputs) == (["mean", "map"], "map")
        assert torch.equal(pool_features(model, inputs, "map"), pool_features(model, inputs))
        assert (pool_features(model, inputs, "mean") - pool_features(model, inputs)).abs().max() > 1e-3


@torch.no_grad()
def test_backbone_without_class_token_or_pooled_output_takes_the_mean() -> None:
    inputs = pixels(32)
    for model in (
        shaken(SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False))),
        shaken(IJepaModel(IJepaConfig(**SIZES), add_pooling_layer=False)),
    ):
        expected = model(inputs).last_hidden_state.mean(1)
        assert torch.equal(pool_features(model, inputs), expected)
        assert find_pools(model, inputs) == (["mean"], "mean")


@torch.no_grad()
def test_dense_layer_on_a_first_patch_is_not_called_a_mean() -> None:
    model, inputs = shaken(IJepaModel(IJepaConfig(**SIZES), add_pooling_layer=True)), pixels(32)
    assert find_pools(model, inputs) == (["mean"], None)
    assert torch.equal(pool_features(model, inputs, "mean"), model(inputs).last_hidden_state.mean(1))


# In a tower


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")  # with a config.json, which says what the classes are
    timm.models.save_for_hf(shaken(timm.create_model("test_vit")), folder, safe_serialization=True)
    return folder / "model.safetensors"


def blank(tower: ImageTower) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, *tower.preprocessing.image_size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_pool_is_part_of_what_a_tower_is(weights: Path) -> None:
    default = open_image_tower("timm:test_vit", weights=weights)
    both = open_image_tower("timm:test_vit", weights=weights, pool="cls+mean")
    mean = open_image_tower("timm:test_vit", weights=weights, pool="mean")

    assert (default.width, mean.width, both.width) == (64, 64, 128)
    identities = [tower.identity() for tower in (default, mean, both)]
    assert len({identity.fingerprint for identity in identities}) == 3
    assert [identity.pool for identity in identities] == [None, "mean", "cls+mean"]
    assert torch.equal(both(blank(both)), torch.cat([default(blank(default)), mean(blank(mean))], dim=-1))

    rebuilt = build_image_tower(TowerIdentity.from_dict(json.loads(json.dumps(both.identity().to_dict()))))
    rebuilt.load_state_dict(both.state_dict())
    assert rebuilt.identity().fingerprint == both.identity().fingerprint
    assert torch.equal(rebuilt(blank(both)), both(blank(both)))


def test_pool_by_the_name_of_the_default_is_the_same_tower(weights: Path) -> None:
    default = open_image_tower("timm:test_vit", weights=weights)
    named = open_image_tower("timm:test_vit", weights=weights, pool="cls")
    assert named.identity() == default.identity()
    assert "pool" not in default.config
    assert named.class_head is not None


def test_classifier_goes_with_the_default_pooling_only(weights: Path) -> None:
    assert open_image_tower("timm:test_vit", weights=weights).class_head is not None
    for pool in ("mean", "cls+mean"):  # the first is as wide as the classifier
        assert open_image_tower("timm:test_vit", weights=weights, pool=pool).class_head is None


@pytest.mark.parametrize(
    ("name", "pool", "has"),
    [
        ("test_resnet", "cls", "it offers mean"),
        ("test_convnext", "cls+mean", "it offers mean"),
        ("test_vit", "map", r"it offers cls, mean, cls\+mean"),
        ("test_vit3", "cls", "it offers mean, map"),
        ("test_mambaout", "mean", "it offers only its library's own"),
    ],
)
def test_pooling_that_a_tower_has_not(name: str, pool: str, has: str) -> None:
    with pytest.raises(TowerError, match=has) as caught:
        open_image_tower(f"timm:{name}", weights="random", pool=pool)
    assert POOLS[pool] in str(caught.value)


def test_pooling_that_nobody_has() -> None:
    with pytest.raises(UsageError, match=r"no pooling 'max'; expected cls, mean, map, cls\+mean"):
        open_image_tower("timm:test_vit", weights="random", pool="max")


def test_module_pools_as_it_was_written() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="a module pools as it was written"):
        open_image_tower(module, preprocessing=Preprocessing((8, 8), HALF, HALF), pool="mean")


@pytest.mark.parametrize("pool", ["cls", "median"])
def test_identity_with_a_pooling_that_its_tower_has_not(pool: str) -> None:
    identity = open_image_tower("timm:test_resnet", weights="random").identity()
    with pytest.raises((TowerError, UsageError), match=pool):
        build_image_tower(replace(identity, config=identity.config | {"pool": pool}))


# Through a store


def test_store_and_model_of_a_pooling(weights: Path, image_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    report = embed(
        image_folder / "pairs.csv", tmp_path / "a.lance", image_tower="timm:test_vit", image_tower_weights=weights,
        pool="cls+mean", backend="torch",
    )  # fmt: skip
    store = Store(tmp_path / "a.lance")
    assert (report.embedded, store.tower.width, store.tower.pool) == (60, 128, "cls+mean")
    assert describe(store.path)["pooling"] == "cls+mean"

    settings = TuneSettings(text_tower=f"hf:{text_folder}", batch_size=16, epochs=0.5, num_evals=1)
    tuned = tune(store, tmp_path / "run", settings)
    assert tuned.fingerprint_before == tuned.fingerprint_after == store.tower.fingerprint

    model = lamplit.load(tmp_path / "run")
    assert describe(tmp_path / "run")["pooling"] == "cls+mean"
    files = sorted(image_folder.glob("*.png"))[:3]
    rows = [store.column("id").index(file.name) for file in files]
    assert torch.allclose(model.encode_images(files), store.vectors()[rows], atol=1e-3)  # stored in half precision

    again = {"image_tower": "timm:test_vit", "image_tower_weights": weights, "backend": "torch"}
    with pytest.raises(lamplit.errors.StoreError, match="cannot be compared"):
        embed(image_folder / "pairs.csv", tmp_path / "a.lance", **again)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, "mean", "cls+mean"])
@pytest.mark.parametrize("name", ["hf DINOv2 with registers", "hf CLIP", "timm ViT"])
def test_every_backend_pools_alike(name: str, pool: str | None, tmp_path: Path) -> None:
    make, side, *_ = CASES[name]
    preprocessing = Preprocessing((side, side), HALF, HALF)
    config = {"library": "module", "name": name} | ({} if pool is None else {"pool": pool})
    tower = ImageTower(name, shaken(make()), preprocessing, config)
    images = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8)
    chosen, backend, vectors = choose_backend(tower, "onnx", images, num_images=5, device=torch.device("cpu"))
    assert chosen == "onnx"
    assert vectors.shape == (5, tower.width)
    assert (backend(images[:3]) - vectors[:3]).abs().max() < 1e-4


def test_open_tower_is_not_pooled_otherwise(image_tower: ImageTower, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pools as it was opened"):
        embed(image_folder / "pairs.csv", tmp_path / "a.lance", image_tower=image_tower, pool="mean")


@pytest.mark.parametrize("make", [ViTModel, Dinov2WithRegistersModel])
@torch.no_grad()
def test_folder_of_transformers(make: Any, tmp_path: Path) -> None:
    config = ViTConfig(**SIZES) if make is ViTModel else Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
    model = shaken(make(config))
    model.save_pretrained(tmp_path / "folder")
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessor(size=size) if make is ViTModel else BitImageProcessor(size=size, crop_size=size)
    processor.save_pretrained(tmp_path / "folder")

    tower = open_image_tower(f"hf:{tmp_path / 'folder'}", pool="cls+mean")
    shutil.rmtree(tmp_path / "folder")
    built = build_image_tower(tower.identity())
    built.load_state_dict(tower.state_dict())

    inputs = tower.preprocessing.normalize(blank(tower))
    tokens = model(inputs).last_hidden_state
    patches = tokens[:, 1 if make is ViTModel else 4 :]
    expected = torch.cat([tokens[:, 0], patches.mean(1)], dim=-1)
    assert torch.equal(tower(blank(tower)), expected)
    assert torch.equal(built(blank(tower)), expected)
