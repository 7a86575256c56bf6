"""The text side of a two-tower model of transformers: its encoder, its tokenizer and its trained head.

Which token is read, and through which layers, is tried out: the first combination whose features are those of the whole
model is taken, and a model that none of them explains is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamplit.errors import TowerError
from lamplit.towers.loading import load_strictly, opening, plain_config
from lamplit.towers.texts.encoders import Pooling, build_encoder, longest_text, open_tokenizer, try_out, unread_part
from lamplit.towers.texts.layered_head import LayeredHead, copy_linear, layer_up
from lamplit.towers.texts.text_tower import TextTower
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer
from lamplit.towers.whole_models import features_of, is_near, open_whole

_PROBES = ("a b c", "an owl in the snow, 1985")
_POOLINGS: tuple[Pooling, ...] = ("last", "cls", "mean")


class TextSide(NamedTuple):
    """A text tower with its trained head, and the scalars of its model."""

    tower: TextTower
    logit_multiplier: float
    logit_bias: float | None


@torch.no_grad()
def open_text_side(spec: str, name: str) -> TextSide:
    """Open the text side of a two-tower model by its folder or hub id.

    Texts are padded up to the length that the model was made for if, as in SigLIP, the last token is read and every
    token sees all others: then padding is part of what it was trained on.

    Raises:
        TowerError: it cannot be opened, lacks weights, or reads texts in a way that lamplit does not know.
    """
    whole = open_whole(spec, name)
    tokenizer = open_tokenizer(spec, name)
    config = whole.config.text_config
    with opening(spec):
        encoder = build_encoder(config)
    state = {key: value for key, value in whole.text_model.state_dict().items() if not unread_part(key)}
    load_strictly(encoder, state, f"the text model of {spec}")
    encoder.eval()
    causal, feature_width = try_out(spec, encoder, len(tokenizer))
    context_length = longest_text(tokenizer, encoder, config)
    probes = PretrainedTokenizer(tokenizer).encode(_PROBES, context_length)
    pooling, head = _find_head(spec, whole, encoder, probes)
    is_filled = pooling == "last" and not causal
    tower = TextTower(
        spec,
        encoder,
        PretrainedTokenizer(tokenizer, fill=tokenizer.padding_side if is_filled else None),
        pooling=pooling,
        context_length=context_length,
        feature_width=feature_width,
        width=head.out_features,
        config={"library": "transformers", "config": plain_config(config)},
    )
    tower.head = head
    tower.trained_scale = _multiplier(spec, whole)
    bias = getattr(whole, "logit_bias", None)
    return TextSide(tower, tower.trained_scale, None if bias is None else float(bias))


def _find_head(
    spec: str, whole: Any, encoder: nn.Module, probes: list[list[int]]
) -> tuple[Pooling, nn.Linear | LayeredHead]:
    """Find which token is read, and through which layers."""
    rows = [torch.tensor([ids]) for ids in probes]
    with opening(spec):
        expected = torch.cat([features_of(whole.get_text_features(input_ids=row)) for row in rows])
        hidden = [encoder(input_ids=row).last_hidden_state for row in rows]
    heads = list(_heads(whole))
    for pooling in _POOLINGS:
        features = torch.cat([_pool(tokens, pooling) for tokens in hidden])
        for head in heads:
            if head.in_features == features.shape[1] and is_near(head(features), expected):
                return pooling, head
    raise TowerError(
        f"{spec} ({whole.config.model_type}) reads texts in a way that lamplit does not know: neither its first nor "
        "its last token nor the mean of all, through its projection, gives the features that transformers gives"
    )


def _heads(whole: Any) -> Iterator[nn.Linear | LayeredHead]:
    """Yield what may follow the pooled tokens: a projection, or the encoder's pooler and then the projection."""
    projection = getattr(whole, "text_projection", None) or getattr(whole.text_model, "head", None)
    if not isinstance(projection, nn.Linear):
        return
    yield copy_linear(projection)
    pooler = getattr(whole.text_model, "pooler", None)
    dense = getattr(pooler, "dense", None)
    if isinstance(dense, nn.Linear):
        yield layer_up(dense, "tanh", projection)


def _pool(tokens: Tensor, pooling: Pooling) -> Tensor:
    return tokens.mean(1) if pooling == "mean" else tokens[:, 0 if pooling == "cls" else -1]


def _multiplier(spec: str, whole: Any) -> float:
    """Return what cosines are multiplied by: ALIGN divides by a temperature, all others keep a logarithm."""
    if (temperature := getattr(whole, "temperature", None)) is not None:
        return 1 / float(temperature)
    if (log_scale := getattr(whole, "logit_scale", None)) is None:
        raise TowerError(f"{spec} has no logit scale, so it was not trained to compare images and texts by cosines")
    return math.exp(float(log_scale))
