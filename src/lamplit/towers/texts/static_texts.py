"""Static embeddings as text towers: one vector for each token, and their mean; by far the fastest there are.

Folders of model2vec, and of sentence-transformers' `StaticEmbedding`. Both are a table of vectors (safetensors) and a
tokenizer (`tokenizer.json`), so neither library is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.errors import TowerError
from lamplit.towers.loading import opening, read_checkpoint, read_model_json
from lamplit.towers.tokens.static_tokenizer import StaticTokenizer

MOST_TOKENS = 1_000_000  # of a text; nothing in such a tower ends before


class StaticEncoder(nn.Module):
    """A table of vectors: (B, T) ids in, (B, T, width) out, each token's own."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> StaticHidden:
        """Look up tokens. No token reads another, so there is nothing to mask."""
        return StaticHidden(self.embedding(input_ids))

    def mean(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return the (B, width) means of B lists of token ids, without padding."""
        weight = self.embedding.weight
        flat = torch.tensor([token for row in tokens for token in row], device=weight.device)
        starts = torch.tensor([0, *(len(row) for row in tokens[:-1])], device=weight.device).cumsum(0)
        return F.embedding_bag(flat, weight, starts, mode="mean")


class StaticHidden(NamedTuple):
    """What an encoder returns, as far as a text tower reads it."""

    last_hidden_state: Tensor  # (B, T, width)


class OpenedStatic(NamedTuple):
    """A static encoder with its tokenizer and what builds it again."""

    encoder: StaticEncoder
    tokenizer: StaticTokenizer
    config: dict[str, Any]


def find_static(spec: str, name: str) -> str | None:
    """Return the subfolder that holds the static embeddings of a folder or hub id; None if there are none.

    Raises:
        TowerError: its description is damaged.
    """
    with opening(spec):
        modules = read_model_json(name, "modules.json") or []
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        if kinds[:1] == ["StaticEmbedding"]:
            return str(modules[0]["path"]).strip("./")
        config = read_model_json(name, "config.json") or {}
        return "" if config.get("model_type") == "model2vec" else None


def open_static(spec: str, name: str, subfolder: str, *, pretrained: bool) -> OpenedStatic:
    """Open static embeddings.

    Args:
        spec: what to call them in errors.
        name: folder or hub id.
        subfolder: where in it they are, as `find_static` says.
        pretrained: read the table; otherwise it is random.

    Raises:
        TowerError: they cannot be had, or are not whole.
    """
    table, file = (_fetch(spec, name, subfolder, part) for part in ("model.safetensors", "tokenizer.json"))
    state = read_checkpoint(table)
    key = next((key for key in ("embeddings", "embedding.weight") if key in state), None)
    if key is None or state[key].ndim != 2:
        raise TowerError(f"{table} holds no static embeddings; expected a matrix named embeddings or embedding.weight")
    vectors = _vectors(spec, state, key)
    tokenizer = StaticTokenizer.read(file, keeps_unknown=key == "embedding.weight")
    if len(tokenizer) > len(vectors):
        raise TowerError(f"{spec} has vectors of {len(vectors)} tokens, but its tokenizer knows {len(tokenizer)}")
    vocab_size, width = vectors.shape
    encoder = StaticEncoder(vocab_size, width)
    if pretrained:
        encoder.embedding.weight.data.copy_(vectors)
    return OpenedStatic(encoder, tokenizer, {"library": "static", "vocab_size": vocab_size, "width": width})


def _vectors(spec: str, state: dict[str, Tensor], key: str) -> Tensor:
    """Return the vector of each token: of shared ones through `mapping`, times its weight, as model2vec keeps them."""
    vectors = state[key].float()
    if not state[key].is_floating_point():  # quantised to whole numbers up to 127
        vectors /= 127
    if (places := state.get("mapping")) is not None:
        if places.ndim != 1 or int(places.min()) < 0 or int(places.max()) >= len(vectors):
            raise TowerError(f"{spec} names vectors of tokens that it does not hold: its mapping is damaged")
        vectors = vectors[places.long()]
    if (weights := state.get("weights")) is not None:
        if weights.shape != (len(vectors),):
            raise TowerError(f"{spec} has {len(weights)} weights of {len(vectors)} tokens")
        vectors = vectors * weights.float()[:, None]
    return vectors


def _fetch(spec: str, name: str, subfolder: str, file: str) -> Path:
    if Path(name).is_dir():
        return Path(name) / subfolder / file
    with opening(spec):
        return Path(hf_hub_download(name, file, subfolder=subfolder or None))
