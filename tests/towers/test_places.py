"""Vectors of places against what each tower's pooling does to one token, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from test_pooling import HALF, SIZES, pixels, shaken, timm_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import lamplit
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.images.places import find_places
from lamplit.towers.images.pooling import pool_features


def of_tokens(tokens: Tensor, num_prefix: int, last: Callable[[Tensor], Tensor], rows: int, columns: int) -> Tensor:
    return last(tokens[:, num_prefix:]).unflatten(1, (rows, columns))


def siglip_value(pool: Any) -> Callable[[Tensor], Tensor]:
    """The value path of timm's attention pooling: with one token, all attention is on it."""

    def value(tokens: Tensor) -> Tensor:
        values = pool.proj(pool.kv(tokens)[..., tokens.shape[-1] :])
        made: Tensor = values + pool.mlp(pool.norm(values))
        return made

    return value


def hf_siglip_value(head: Any) -> Callable[[Tensor], Tensor]:
    def value(tokens: Tensor) -> Tensor:
        weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
        width = tokens.shape[-1]
        values = head.attention.out_proj(F.linear(tokens, weight[2 * width :], bias[2 * width :]))
        made: Tensor = values + head.mlp(head.layernorm(values))
        return made

    return value


def as_it_is(tokens: Tensor) -> Tensor:
    return tokens


# name -> model, side, pool, its places by hand, and whether their mean is the vector of the image
Case = tuple[Callable[[], Any], int, str | None, Callable[[Any, Tensor], Tensor], bool]
CASES: dict[str, Case] = {
    "ViT of means": (
        timm_model("test_vit", global_pool="avg", fc_norm=False), 160, None,
        lambda m, x: of_tokens(m.forward_features(x), 1, as_it_is, 10, 10), True,
    ),
    "ViT of means with a norm after": (
        timm_model("test_vit", global_pool="avg", fc_norm=True), 160, None,
        lambda m, x: of_tokens(m.forward_features(x), 1, m.fc_norm, 10, 10), False,
    ),
    "ViT of a class token, asked for means": (
        timm_model("test_vit", reg_tokens=4), 160, "mean",
        lambda m, x: of_tokens(m.forward_features(x), 5, as_it_is, 10, 10), True,
    ),
    "ViT of means with registers": (
        timm_model("test_vit", reg_tokens=4, class_token=False, global_pool="avg", fc_norm=False), 160, None,
        lambda m, x: of_tokens(m.forward_features(x), 4, as_it_is, 10, 10), True,
    ),
    "ViT of images that are not square": (
        timm_model("test_vit", global_pool="avg", fc_norm=False, img_size=(96, 160)), 0, None,
        lambda m, x: of_tokens(m.forward_features(x), 1, as_it_is, 6, 10), True,
    ),
    "SigLIP": (
        timm_model("vit_base_patch16_siglip_224", embed_dim=48, num_heads=4, depth=2), 224, None,
        lambda m, x: of_tokens(m.forward_features(x), 0, siglip_value(m.attn_pool), 14, 14), False,
    ),
    "SigLIP with registers": (
        timm_model("test_vit3", pool_include_prefix=False), 160, None,
        lambda m, x: of_tokens(m.forward_features(x), m.num_prefix_tokens, siglip_value(m.attn_pool), 10, 10), False,
    ),
    "EfficientNet": (
        timm_model("test_efficientnet"), 160, None,
        lambda m, x: m.forward_features(x).permute(0, 2, 3, 1), True,
    ),
    "the demo's": (
        timm_model("tf_efficientnet_lite0"), 96, None,
        lambda m, x: m.forward_features(x).permute(0, 2, 3, 1), True,
    ),
    "ResNet": (timm_model("test_resnet"), 160, None, lambda m, x: m.forward_features(x).permute(0, 2, 3, 1), True),
    "ConvNeXt": (
        timm_model("test_convnext"), 160, None,
        lambda m, x: F.layer_norm(
            m.forward_features(x).permute(0, 2, 3, 1), (64,), m.head.norm.weight, m.head.norm.bias, m.head.norm.eps
        ),
        False,
    ),
    "Swin, channels last": (
        timm_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)), 224,
        None, lambda m, x: m.forward_features(x), True,
    ),
    "hf SigLIP": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)), 32, None,
        lambda m, x: of_tokens(m(x).last_hidden_state, 0, hf_siglip_value(m.head), 4, 4), False,
    ),
    "hf SigLIP without its head": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False)), 32, None,
        lambda m, x: of_tokens(m(x).last_hidden_state, 0, as_it_is, 4, 4), True,
    ),
    "hf I-JEPA": (
        lambda: IJepaModel(IJepaConfig(**SIZES), add_pooling_layer=False), 32, None,
        lambda m, x: of_tokens(m(x).last_hidden_state, 0, as_it_is, 4, 4), True,
    ),
    "hf BEiT": (
        lambda: BeitModel(BeitConfig(**SIZES)), 32, None,
        lambda m, x: of_tokens(m(x).last_hidden_state, 1, m.pooler.layernorm, 4, 4), False,
    ),
    "hf ViT, asked for means": (
        lambda: ViTModel(ViTConfig(**SIZES)), 32, "mean",
        lambda m, x: of_tokens(m(x).last_hidden_state, 1, as_it_is, 4, 4), True,
    ),
    "hf ConvNeXt": (
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])), 64, None,
        lambda m, x: m.layernorm(m(x).last_hidden_state.permute(0, 2, 3, 1)), False,
    ),
    "hf ResNet": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), 64, None,
        lambda m, x: m(x).last_hidden_state.permute(0, 2, 3, 1), True,
    ),
}  # fmt: skip


def inputs_of(side: int) -> Tensor:
    return pixels(side) if side else torch.randn(3, 3, 96, 160, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_places_by_hand(name: str) -> None:
    make, side, pool, by_hand, is_mean = CASES[name]
    model, inputs = shaken(make()), inputs_of(side)
    places, whole = find_places(model, inputs, pool)
    expected = by_hand(model, inputs)
    assert places.shape == expected.shape
    assert (places - expected).abs().max() <= 1e-5 * expected.abs().max()
    own = pool_features(model, inputs, pool)
    assert torch.allclose(whole, own, rtol=1e-5, atol=1e-5)
    difference = (places.mean((1, 2)) - own).abs().max() / own.abs().max()
    assert (difference <= 1e-5) == is_mean
    assert (places[:, 0, 0] - places[:, -1, -1]).abs().max() > 1e-3


REFUSED: dict[str, tuple[Callable[[], Any], int, str | None, str]] = {
    "ViT": (timm_model("test_vit"), 160, None, "class or register token"),
    "asked for both": (timm_model("test_vit"), 160, "cls+mean", "class or register token"),
    "DeiT": (timm_model("deit_tiny_distilled_patch16_224", depth=1), 224, None, "class or register token"),
    "attention over registers too": (timm_model("test_vit3"), 160, None, "class or register token"),
    "ViT of transformers": (lambda: ViTModel(ViTConfig(**SIZES)), 32, None, "class or register token"),
    "CLIP of transformers": (
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=24)), 32, None, "class or",
    ),
    "CLIP's ResNet": (
        timm_model("test_byobnet", head_type="attn_abs", img_size=160), 160, None, "of a place alone|no place alone",
    ),
    "one place": (timm_model("pit_ti_224", depth=(1, 1, 1)), 224, None, "one place"),
    "several maps": (timm_model("crossvit_tiny_240", depth=((1, 1, 0),)), 240, None, "neither a map nor"),
    "a module": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), 8, None, "does not say what it pools"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_tower_without_places_is_refused(name: str) -> None:
    make, side, pool, reason = REFUSED[name]
    model = make().eval()
    with pytest.raises(TowerError, match=reason):
        find_places(model, pixels(side), pool)


@torch.no_grad()
def test_places_lie_where_they_are_in_the_image() -> None:
    """What changes in a corner of the image changes the place there most."""
    for name in ("test_vit", "test_resnet", "test_convnext", "test_efficientnet"):
        options = {"global_pool": "avg"} if name == "test_vit" else {}
        model, images = shaken(timm.create_model(name, num_classes=0, **options)), pixels(160)[:1]
        before = find_places(model, images, None).vectors
        for rows, columns in ((slice(0, 40), slice(120, 160)), (slice(120, 160), slice(0, 40))):
            changed = images.clone()
            changed[:, :, rows, columns] *= -1
            moved = (find_places(model, changed, None).vectors - before)[0].norm(dim=-1)
            row, column = divmod(int(moved.argmax()), moved.shape[1])
            assert ((row + 0.5) / moved.shape[0] < 0.5) == (rows.start < 80), name
            assert ((column + 0.5) / moved.shape[1] < 0.5) == (columns.start < 80), name


# In a tower


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8, generator=generator)


def test_tower_finds_places_of_images(images: Tensor) -> None:
    tower = open_image_tower("timm:test_resnet", weights="random")
    places, whole = tower.find_places(images)
    assert places.shape == (2, 5, 5, tower.width)
    with torch.no_grad():
        assert torch.allclose(whole, tower(images), atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "attention pooling"])
def test_half_precision(images: Tensor, name: str) -> None:
    if name == "attention pooling":
        attending = timm.create_model("test_vit3", num_classes=0, pool_include_prefix=False)
        tower = open_image_tower(attending, preprocessing=Preprocessing((160, 160), HALF, HALF))
    else:
        tower = open_image_tower(f"timm:{name}", weights="random")
    expected = tower.find_places(images).vectors
    found = tower.to(torch.bfloat16).find_places(images).vectors
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.05 * float(expected.abs().max()))


def test_error_names_the_tower_and_says_what_to_type(images: Tensor) -> None:
    tower = open_image_tower("timm:test_vit", weights="random")
    with pytest.raises(TowerError, match=r"timm:test_vit cannot show where .* embed with --pool mean, and tune on"):
        tower.find_places(images)
    attending = open_image_tower("timm:test_vit3", weights="random")
    with pytest.raises(TowerError, match="embed with --pool mean"):
        attending.find_places(images)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    preprocessing = Preprocessing((160, 160), HALF, HALF)
    with pytest.raises(TowerError, match=r"module:.*Sequential cannot show .* such as demo:efficientnet-lite0"):
        open_image_tower(module, preprocessing=preprocessing).find_places(images)


def test_module_of_timm_has_places(images: Tensor) -> None:
    tower = open_image_tower(
        timm.create_model("test_resnet", num_classes=0), preprocessing=Preprocessing((160, 160), HALF, HALF)
    )
    assert tower.find_places(images).vectors.shape == (2, 5, 5, tower.width)


@torch.no_grad()
def test_timm_inside_open_clip(images: Tensor) -> None:
    pytest.importorskip("open_clip")
    from lamplit.towers.open_clip_models import build_vision

    vision = {"timm_model_name": "test_vit2", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
    built = build_vision({"embed_dim": 16, "vision_cfg": vision | {"image_size": 160}, "quick_gelu": False})
    inputs = pixels(160)
    places, whole = find_places(built, inputs, None)
    trunk, head = built.visual.trunk, built.visual.head
    tokens = trunk.forward_features(inputs)[:, trunk.num_prefix_tokens :]
    expected = head(trunk.fc_norm(tokens)).unflatten(1, (10, 10))
    assert torch.allclose(places, expected, atol=1e-5)
    assert torch.allclose(whole, built(inputs), atol=1e-5)


def test_saved_tower_has_the_places_of_the_open_one(places_path: Any, images: Tensor) -> None:
    tower = lamplit.load(places_path / "model", towers="image").unlocked_image_tower
    assert isinstance(tower, ImageTower)
    assert tower.pool == "mean"
    assert tower.find_places(images).vectors.shape == (2, 10, 10, 64)
    assert replace(tower.identity()).pool == "mean"
