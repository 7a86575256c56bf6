from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5EncoderModel,
)

from lamplit.exports.bias import fold_bias, last_norm

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 1}
IDS = torch.tensor([[5, 6, 7, 8]])


def make_norm(width: int, kind: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    with torch.no_grad():
        if kind == "with a zero":
            norm.weight[width // 2] = 0
        elif kind == "with zeros":
            norm.weight[::2] = 0
        elif kind == "with a tiny one":
            norm.weight[0] = 1e-6
        elif kind == "negative":
            norm.weight[0] *= -1
        elif kind == "without a constant":
            norm.bias.zero_()
    return norm


@torch.no_grad()
def features_of(norm: nn.LayerNorm) -> Tensor:
    """What a text tower would pool: outputs of the norm, and their means over seven tokens."""
    tokens = norm(torch.randn(20, 7, norm.normalized_shape[0]) * 3)
    return torch.cat([tokens[:, 0], tokens.mean(1)])


@given(
    st.integers(2, 48),
    st.integers(1, 96),
    st.sampled_from(["plain", "with a zero", "with zeros", "with a tiny one", "negative", "without a constant"]),
    st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_folded_head_gives_the_same(width: int, joint_width: int, kind: str, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm, head = make_norm(width, kind), nn.Linear(width, joint_width)
        nn.init.normal_(head.bias)
        features = features_of(norm)
        weight, shift = fold_bias(head, norm)
        expected = head(features).detach()
    found = (features + shift) @ weight.T
    assert (found - expected).abs().max() <= 2e-5 * (1 + expected.abs().max())


def test_bias_is_not_lost_elsewhere() -> None:
    """Only what leaves the norm lies in the plane: for other vectors a bias cannot be folded."""
    torch.manual_seed(0)
    norm, head = make_norm(16, "plain"), nn.Linear(16, 24)
    weight, shift = fold_bias(head, norm)
    other = torch.randn(5, 16)
    assert ((other + shift) @ weight.T - head(other)).abs().max() > 0.1
    assert (features_of(norm) @ weight.T - head(features_of(norm))).abs().max() > 0.1  # nor is the shift idle


@pytest.mark.parametrize(
    ("encoder", "name", "shared"),
    [
        (BertModel(BertConfig(**SMALL), add_pooling_layer=False), "encoder.layer.1.output.LayerNorm", False),
        (
            AlbertModel(AlbertConfig(embedding_size=16, **SMALL), add_pooling_layer=False),
            "encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm",
            True,
        ),
        (GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, **ENDS)), "ln_f", False),
    ],
    ids=["bert", "albert", "gpt2"],
)  # fmt: skip
def test_last_norm(encoder: nn.Module, name: str, shared: bool) -> None:
    assert last_norm(encoder.eval(), input_ids=IDS) == (encoder.get_submodule(name), shared)


def test_no_last_norm() -> None:
    t5 = T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2))
    assert last_norm(t5.eval(), input_ids=IDS) is None  # a norm without a mean or a bias
    bert = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()
    bert.encoder.layer[1].output.LayerNorm.bias = None
    assert last_norm(bert, input_ids=IDS) is None
