"""Text towers of open_clip: those that it took from transformers, and its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lamplit.errors import TowerError
from lamplit.towers.loading import load_strictly, plain_config
from lamplit.towers.open_clip_models import OpenClipModel, build_text, text_config
from lamplit.towers.texts.encoders import Pooling, build_encoder, unread_part
from lamplit.towers.texts.layered_head import LayeredHead, copy_linear, layer_up
from lamplit.towers.texts.text_tower import TextTower
from lamplit.towers.tokens.open_clip_tokenizers import OpenClipPairs, OpenClipTokenizer
from lamplit.towers.tokens.tokenizers import Side, Tokenizer
from lamplit.towers.whole_models import is_near

_PROBES = ["a b c", "an owl in the snow,  1985 &amp; later"]
_HF_POOLINGS: dict[str, Pooling] = {
    "MeanPooler": "mean", "ClsPooler": "cls", "ClsLastHiddenStatePooler": "cls",
}  # fmt: skip
_POOLINGS: dict[str, Pooling] = {"argmax": "last", "eos": "last", "last": "last", "first": "cls"}


@torch.no_grad()
def take_text(spec: str, opened: OpenClipModel) -> TextTower:
    """Take the text tower out of an open model of open_clip, with its trained head.

    Raises:
        TowerError: its features are not what lamplit would make of it.
    """
    text = getattr(opened.model, "text", None)
    if hasattr(text, "pooler"):
        tower = _take_transformers_text(spec, opened, text)
    else:
        tower = _take_own_text(spec, opened, opened.model if text is None else text)
    tower.eval()
    expected = opened.model.encode_text(opened.tokenizer(_PROBES), normalize=False)
    if not is_near(tower(tower.tokenize(_PROBES)), expected):
        raise TowerError(f"{spec} makes text features in a way that lamplit does not know; it opens CLIP and SigLIP")
    tower.trained_scale = opened.logit_multiplier
    return tower


def _take_transformers_text(spec: str, opened: OpenClipModel, text: Any) -> TextTower:
    kind = type(text.pooler).__name__
    if kind not in _HF_POOLINGS:
        raise TowerError(f"{spec} pools texts by {kind}; lamplit does by {', '.join(_HF_POOLINGS)}")
    encoder = build_encoder(copy.deepcopy(text.config))
    state = {key: value for key, value in text.transformer.state_dict().items() if not unread_part(key)}
    reads = encoder if isinstance(encoder, type(text.transformer)) else encoder.get_encoder()  # T5's has a wrapper
    load_strictly(reads, state, f"the text encoder of {spec}")
    pooler = getattr(text.transformer, "pooler", None) if kind == "ClsPooler" else None
    head = _head(spec, text.proj, getattr(pooler, "dense", None), text.config.hidden_size)
    return _tower(
        spec, opened, encoder, head, _HF_POOLINGS[kind],
        {"library": "transformers", "config": plain_config(text.config)}, fill=None,
    )  # fmt: skip


def _take_own_text(spec: str, opened: OpenClipModel, text: Any) -> TextTower:
    reads_own_token = getattr(text, "cls_emb", None) is not None  # CoCa's, behind the filled row
    pool = "last" if reads_own_token else getattr(text, "pool_type", None) or text.text_pool_type
    if pool not in _POOLINGS:
        raise TowerError(f"{spec} reads the token {pool!r} of a text; expected one of {', '.join(_POOLINGS)}")
    config = text_config(opened)
    encoder = build_text(config)
    own = {f"text.{key}" for key in encoder.text.state_dict()}
    state = {f"text.{key}": value for key, value in text.state_dict().items() if f"text.{key}" in own}
    load_strictly(encoder, state, f"the text tower of {spec}")
    projection = text.text_projection
    if isinstance(projection, Tensor):
        width, out = projection.shape
        linear = nn.Linear(width, out, bias=False)
        linear.weight.data.copy_(projection.T)
        projection = linear
    head = _head(spec, nn.Identity() if projection is None else projection, None, encoder.text.width)
    is_causal = encoder.text.attn_mask is not None
    # Padding is read where no token is hidden from another, and where the last of all is read.
    fill: Side | None = None if is_causal and pool != "last" else "right"
    return _tower(spec, opened, encoder, head, _POOLINGS[pool], config, fill=fill)


def _head(spec: str, projection: Any, dense: nn.Linear | None, width: int) -> nn.Linear | LayeredHead:
    """Return the trained head: a matrix, or two layers (BERT's pooler and a matrix, or open_clip's `mlp`)."""
    if isinstance(projection, nn.Identity):
        projection = nn.Linear(width, width, bias=False)
        projection.weight.data.copy_(torch.eye(width))
    if isinstance(projection, nn.Sequential) and dense is None:
        layers: list[Any] = list(projection)
        return layer_up(layers[0], "gelu", layers[-1])
    if not isinstance(projection, nn.Linear):
        raise TowerError(f"{spec} has a pooler and a projection of several layers, which lamplit does not know")
    return copy_linear(projection) if dense is None else layer_up(dense, "tanh", projection)


def _tower(
    spec: str,
    opened: OpenClipModel,
    encoder: nn.Module,
    head: nn.Linear | LayeredHead,
    pooling: Pooling,
    config: dict[str, Any],
    *,
    fill: Side | None,
) -> TextTower:
    settings: dict[str, Any] = opened.config["text_cfg"].get("tokenizer_kwargs") or {}
    tokenizer: Tokenizer
    if hasattr(opened.tokenizer, "tokenizer"):
        if getattr(opened.tokenizer, "tokenizer_mode", ""):
            raise TowerError(f"{spec} has a tokenizer of the mode {opened.tokenizer.tokenizer_mode!r}")
        side = None if fill is None else opened.tokenizer.tokenizer.padding_side
        strip = bool(opened.tokenizer.strip_sep_token)
        tokenizer = OpenClipTokenizer(
            opened.tokenizer.tokenizer, clean=settings.get("clean", "whitespace"), strip_separator=strip, fill=side
        )
    else:
        tokenizer = OpenClipPairs(clean=settings.get("clean", "lower"), fill=fill)
    tower = TextTower(
        spec,
        encoder,
        tokenizer,
        pooling=pooling,
        context_length=int(opened.tokenizer.context_length),
        feature_width=head.in_features,
        width=head.out_features,
        config=config,
    )
    tower.head = head
    return tower
