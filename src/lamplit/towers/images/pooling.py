"""From a backbone's tokens to one vector per image: the library's own way, or another by name.

The names mean the same for every backbone. They speak of the tokens after the last norm, before any layer that the
library's own head puts behind its pooling (the dense layer of transformers' ViT, the projection of CLIP).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamplit.errors import TowerError, UsageError

POOLS = {
    "cls": "the class token",
    "mean": "the mean of the patch tokens, without class and register tokens",
    "map": "the attention pooling that was trained with the tower",
    "cls+mean": "class token and mean side by side, twice as wide (as dino.txt reads DINOv2)",
}


def pool_features(backbone: nn.Module, pixels: Tensor, pool: str | None = None) -> Tensor:
    """Run `backbone` on (B, 3, height, width) normalised images and pool: (B, D), or (B, 2D) for `cls+mean`.

    Without `pool`, as the library itself pools; if transformers has no pooled output, the class token, or the mean of
    the patches if there is no class token.
    """
    if pool is None or pool == "map":
        output = backbone(pixels)
        return output if isinstance(output, Tensor) else _own_output(backbone, output, pixels)
    return _pool_tokens(backbone, tokens_of(backbone, pixels), pixels, pool)


def find_pools(backbone: nn.Module, pixels: Tensor) -> tuple[list[str], str | None]:
    """Find which poolings `backbone` offers, and which of them the library's own head uses.

    The second is None if that head does something else, like the dense layer of transformers' ViT. It is found by
    running all of them on `pixels`, (B, 3, height, width), and comparing the outputs.
    """
    has_map, has_class_token = _has_attention_pool(backbone), _has_class_token(backbone)
    if not has_map and not has_class_token and not _has_plain_tokens(backbone, pixels):
        # Any mean but the library's own would only lack the norm that its head brings.
        return (["mean"], "mean") if _averages(backbone) else ([], None)
    offered = {"cls": has_class_token, "mean": True, "map": has_map, "cls+mean": has_class_token}
    names = [name for name in POOLS if offered[name]]
    if has_map:
        return names, "map"
    own = pool_features(backbone, pixels)
    for name in names:
        found = pool_features(backbone, pixels, name)
        if found.shape == own.shape and torch.allclose(found, own, rtol=1e-5, atol=1e-6):
            return names, name
    return names, None


def require_pool(spec: str, pool: str, offered: list[str]) -> None:
    """Raise if the backbone does not support `pool`.

    Raises:
        UsageError: there is no such pooling.
        TowerError: this backbone does not support it; the message lists the supported ones.
    """
    if pool not in POOLS:
        raise UsageError(f"there is no pooling {pool!r}; expected {', '.join(POOLS)}")
    if pool not in offered:
        has = f"it offers {', '.join(offered)}" if offered else "it offers only its library's own"
        raise TowerError(f"{spec} cannot pool by {pool} ({POOLS[pool]}); {has}. Leave --pool out for the library's own")


def tokens_of(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return what is pooled: tokens (B, T, C), or a map (B, C, h, w) or (B, h, w, C)."""
    if isinstance(backbone, PreTrainedModel):
        hidden: Tensor = backbone(pixels).last_hidden_state
        return hidden
    features: Any = backbone.forward_features(pixels)  # type: ignore[operator]
    tokens: Tensor = features["patches"] if isinstance(features, dict) else features  # NaFlexViT's come in a dict
    return tokens


def _pool_tokens(backbone: nn.Module, tokens: Tensor, pixels: Tensor, pool: str) -> Tensor:
    norm = norm_after_pooling(backbone)
    num_prefix = count_prefix_tokens(backbone, tokens, pixels)
    parts = [tokens[:, 0] if part == "cls" else tokens[:, num_prefix:].mean(1) for part in pool.split("+")]
    return torch.cat([norm(part) for part in parts], dim=-1)


def _own_output(backbone: nn.Module, output: Any, pixels: Tensor) -> Tensor:
    """Return what transformers calls the features of an image."""
    pooled: Tensor | None = output.get("image_embeds")  # CLIP with its projection
    if pooled is None:
        pooled = output.get("pooler_output")
    if pooled is not None:
        return pooled.flatten(1)
    tokens: Tensor = output.last_hidden_state
    if tokens.ndim == 4:
        return tokens.mean((2, 3))
    return _pool_tokens(backbone, tokens, pixels, "cls" if _has_class_token(backbone) else "mean")


def norm_after_pooling(backbone: nn.Module) -> nn.Module:
    """Return the last norm, if the library applies it to the pooled vector instead of to all tokens."""
    norm: nn.Module | None
    if not isinstance(backbone, PreTrainedModel):
        norm = getattr(backbone, "fc_norm", None)
    elif backbone.config.model_type == "clip_vision_model":
        norm = vision_of(backbone).post_layernorm
    else:
        norm = getattr(getattr(backbone, "pooler", None), "layernorm", None)  # BEiT's
    return nn.Identity() if norm is None else norm


def count_prefix_tokens(backbone: nn.Module, tokens: Tensor, pixels: Tensor) -> int:
    """Count the tokens before the patches: class, distillation and register tokens."""
    if not isinstance(backbone, PreTrainedModel):
        return int(getattr(backbone, "num_prefix_tokens", 0))
    least = int(_has_class_token(backbone))
    patch = getattr(backbone.config, "patch_size", None)
    if patch is None:
        return least
    height, width = (patch, patch) if isinstance(patch, int) else patch
    num_patches = (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
    return max(tokens.shape[1] - num_patches, least)


def _has_class_token(backbone: nn.Module) -> bool:
    if not isinstance(backbone, PreTrainedModel):
        return getattr(backbone, "cls_token", None) is not None and getattr(backbone, "num_prefix_tokens", 0) > 0
    names = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_parameters()}
    return not names.isdisjoint({"cls_token", "class_embedding"})


def _has_attention_pool(backbone: nn.Module) -> bool:
    if not isinstance(backbone, PreTrainedModel):
        return getattr(backbone, "attn_pool", None) is not None and getattr(backbone, "global_pool", "") == "map"
    return hasattr(getattr(vision_of(backbone), "head", None), "probe")


def _has_plain_tokens(backbone: nn.Module, pixels: Tensor) -> bool:
    """Tell whether a backbone without other tokens gives its patches after the last norm (transformers' do)."""
    return isinstance(backbone, PreTrainedModel) and tokens_of(backbone, pixels).ndim == 3


def _averages(backbone: nn.Module) -> bool:
    """Tell whether a backbone without a class token takes the mean of its tokens or features."""
    if isinstance(backbone, PreTrainedModel):
        return True
    holders = (backbone, getattr(backbone, "head", None))
    kinds = [getattr(holder, "global_pool", None) for holder in holders]
    return any(getattr(kind, "pool_type", kind) == "avg" for kind in kinds)


def vision_of(backbone: Any) -> Any:
    """Return the vision model of transformers inside its wrapper, if it has one."""
    return getattr(backbone, "vision_model", backbone)
