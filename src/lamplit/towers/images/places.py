"""The vector of each place of an image: what the tower's own pooling gives if it has this place alone.

A tower that takes the mean of its patches (or of its last map), or attends over them, has such vectors. One that reads
its class token has none: that token has read all places. Which of both a tower is, is tried out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamplit.errors import TowerError
from lamplit.towers.images.pooling import (
    count_prefix_tokens,
    find_pools,
    norm_after_pooling,
    tokens_of,
    vision_of,
)
from lamplit.towers.open_clip_models import OpenClipVision

_TOLERANCE = 1e-3  # of two vectors that should be the same, relative to the largest component
_ROUNDINGS = 8  # in half precision one is more than that
_READS_PREFIX = "its vector is made of a class or register token, which has read all places at once"
Pooled = Callable[[Tensor], Tensor]


class Places(NamedTuple):
    """What a tower makes of images, place by place; not normalised.

    Attributes:
        vectors: of the places, (B, h, w, D); the first is at the top left.
        whole: of the images, (B, D): what the tower gives for them.
    """

    vectors: Tensor
    whole: Tensor


def find_places(backbone: nn.Module, pixels: Tensor, pool: str | None) -> Places:
    """Run `backbone` on (B, 3, height, width) normalised images, and pool all places and each alone.

    Raises:
        TowerError: it has no vectors of places; the text says why, without the tower's name.
    """
    inner, after = backbone, nn.Identity()
    if isinstance(backbone, OpenClipVision) and hasattr(backbone.visual, "trunk"):  # a tower of timm inside
        inner, after = backbone.visual.trunk, backbone.visual.head  # type: ignore[assignment]
    tokens, pooled = _pooling_of(inner, pixels, pool)
    prefix: Tensor | None = None
    if tokens.ndim == 4:
        places, grid = _places_of_map(inner, tokens)
    else:
        num_prefix = count_prefix_tokens(inner, tokens, pixels)
        prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
        places, grid = patches.flatten(0, 1)[:, None], _grid(patches.shape[1], *pixels.shape[-2:])
    if grid == (1, 1):
        raise TowerError("what it pools has one place, the whole image")
    _require_alone(pooled, tokens, places[:1], prefix)
    if prefix is not None:  # which the pooling passes over
        places = torch.cat([prefix[:1].expand(len(places), -1, -1), places], dim=1)
    vectors = after(pooled(places))
    return Places(vectors.unflatten(0, (len(pixels), *grid)), after(pooled(tokens)))


def _pooling_of(backbone: Any, pixels: Tensor, pool: str | None) -> tuple[Tensor, Pooled]:
    """Return what a backbone pools, and how: tokens or a map of any number of places in, (B, D) out."""
    if isinstance(backbone, PreTrainedModel):
        return _pooling_of_transformers(backbone, pixels, pool)
    if not (hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")):
        raise TowerError("it does not say what it pools; towers of timm do, and those of transformers that take a mean")
    tokens = tokens_of(backbone, pixels)
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        raise TowerError("what it pools is neither a map nor a row of tokens")
    if pool in (None, "map"):
        return tokens, backbone.forward_head
    return tokens, _mean_of_patches(backbone, tokens, pixels, str(pool))


def _pooling_of_transformers(backbone: Any, pixels: Tensor, pool: str | None) -> tuple[Tensor, Pooled]:
    output = backbone(pixels)
    tokens: Tensor = output.last_hidden_state
    if tokens.ndim == 4:
        own = output.pooler_output.flatten(1)
        norms = (nn.Identity(), getattr(backbone, "layernorm", nn.Identity()))  # ConvNeXt's mean goes through one
        fitting = [norm for norm in norms if _is_same(norm(tokens.mean((2, 3))), own)]
        if not fitting:
            raise TowerError("it pools its last map in another way than by the mean")
        return tokens, lambda given: fitting[0](given.mean((2, 3)))
    name = pool or find_pools(backbone, pixels)[1]
    if name == "map":
        return tokens, vision_of(backbone).head
    return tokens, _mean_of_patches(backbone, tokens, pixels, str(name))


def _mean_of_patches(backbone: nn.Module, tokens: Tensor, pixels: Tensor, pool: str) -> Pooled:
    if pool != "mean":
        raise TowerError(_READS_PREFIX)
    norm, num_prefix = norm_after_pooling(backbone), count_prefix_tokens(backbone, tokens, pixels)
    return lambda given: norm(given[:, num_prefix:].mean(1))


def _places_of_map(backbone: Any, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Cut a map, with its channels first or last, into maps of one place each, and return its height and width."""
    last = features.shape[1] != getattr(backbone, "num_features", features.shape[1])
    by_place = features if last else features.permute(0, 2, 3, 1)
    places = by_place.flatten(0, 2)
    return places[:, None, None] if last else places[:, :, None, None], (by_place.shape[1], by_place.shape[2])


def _grid(num_places: int, height: int, width: int) -> tuple[int, int]:
    """Return how many rows and columns of patches an image of `height` x `width` has."""
    rows = max(1, round((num_places * height / width) ** 0.5))
    columns = num_places // rows
    if rows * columns != num_places or abs(height / rows - width / columns) > min(height / rows, width / columns) / 2:
        raise TowerError(f"its {num_places} tokens are no grid of patches")
    return rows, columns


def _require_alone(pooled: Pooled, tokens: Tensor, place: Tensor, prefix: Tensor | None) -> None:
    """Raise unless one place alone gives what an image gives that is the same everywhere, whatever the prefix holds."""
    one = tokens[:1]
    if prefix is not None:
        patches = place.expand(-1, one.shape[1] - prefix.shape[1], -1)
        same = torch.cat([prefix[:1], patches], dim=1)
        place = torch.cat([prefix[:1], place], dim=1)
        if prefix.shape[1] and not _is_same(pooled(torch.cat([-prefix[:1], patches], dim=1)), pooled(same)):
            raise TowerError(_READS_PREFIX)
    else:
        same = place.expand_as(one)
    try:
        alone = pooled(place)
    except (RuntimeError, AssertionError, ValueError) as error:  # its head takes maps of one size
        raise TowerError("its pooling takes no place alone") from error
    if alone.ndim != 2 or not _is_same(alone, pooled(same)):
        raise TowerError("its pooling makes something else of a place alone than of an image that is the same all over")


def _is_same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(found.dtype).eps)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
