"""The paper's own text tower, from scratch: pre-norm, tanh GELU, learned positions, no masks, the last token read.

Its vocabulary is trained on the captions it will read, or read from a file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lamplit.errors import UsageError, first_line, require
from lamplit.towers.tokens.tokenizers import SentencePiece, read_vocabulary
from lamplit.towers.tokens.wordpiece import WordPiece

# name: (width, num_layers, num_heads, mlp_width), the ViT sizes Ti, S, B, L, H and g of the paper
SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
}
CONTEXT_LENGTH = 16  # "16 tokens everywhere" (appendix E)
VOCABULARY_SIZE = 8192
MAX_CAPTIONS = 1_000_000  # more would not change a vocabulary of this size


@dataclass(frozen=True)
class Encoded:
    """What transformers' encoders return, as far as a text tower reads it."""

    last_hidden_state: Tensor  # (B, T, width)


class ScratchEncoder(nn.Module):
    """A transformer over token ids, (B, T) in, (B, T, width) out."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        context_length: int,
        mlp_width: int | None = None,
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        # timm takes the ratio and rounds down; the half more is for 6144 / 1408.
        ratio = 4.0 if mlp_width is None else (mlp_width + 0.5) / width
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, ratio, qkv_bias=True, act_layer=GELUTanh, norm_layer=norm)
            for _ in range(num_layers)
        )
        self.norm = norm(width)
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)
        nn.init.normal_(self.position_embedding, std=width**-0.5)
        for block in self.blocks:
            _initialize(block)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Encode (B, T) ids; a (B, T) mask is true at real tokens and keeps padding out of the attention."""
        # Rows of these vocabularies are all of one length and bring no mask; models saved by the first lamplit do.
        hidden = self.token_embedding(input_ids) + self.position_embedding[: input_ids.shape[1]]
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            hidden = block(hidden, attn_mask=mask)
        return Encoded(self.norm(hidden))


def _initialize(block: Any) -> None:
    """Start as the authors' code does: Xavier's uniform kernels, and hardly any bias."""
    for query_key_or_value in block.attn.qkv.weight.chunk(3):  # three matrices, though timm keeps them in one
        nn.init.xavier_uniform_(query_key_or_value)
    for linear in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        nn.init.xavier_uniform_(linear.weight)
    for linear in (block.attn.qkv, block.attn.proj):
        nn.init.zeros_(linear.bias)
    for linear in (block.mlp.fc1, block.mlp.fc2):
        nn.init.normal_(linear.bias, std=1e-6)


def open_vocabulary(name: str, texts: Iterable[str]) -> SentencePiece | WordPiece:
    """Train the vocabulary `sentencepiece` on `texts`, or read it from the file `name`.

    Raises:
        MissingExtraError: `sentencepiece` is not installed.
        UsageError: the texts hold nothing to train on.
        TowerError: the file cannot be read.
    """
    if name == "sentencepiece":
        return train_sentencepiece(texts)
    return read_vocabulary(Path(name), fill=True)


def train_sentencepiece(texts: Iterable[str], vocab_size: int = VOCABULARY_SIZE) -> SentencePiece:
    """Train a SentencePiece model on lower-cased texts, up to `vocab_size`; bytes stand in for what it has not seen.

    Raises:
        UsageError: the texts hold nothing to train on.
    """
    return SentencePiece(_train((text.lower() for text in texts), vocab_size))


def _train(texts: Iterable[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece = require("sentencepiece", "sentencepiece")
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Half of a surrogate pair has no UTF-8.
            sentence_iterator=(text.encode("utf-8", "replace").decode() for text in texts),
            model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
            character_coverage=1.0, unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, max_sentence_length=100_000,
            input_sentence_size=MAX_CAPTIONS, shuffle_input_sentence=False, minloglevel=2, byte_fallback=True,
        )  # fmt: skip
    except RuntimeError as error:
        raise UsageError(
            f"no vocabulary can be trained on these captions ({first_line(error)}); "
            "give a file of one: scratch:small@FILE.model or scratch:small@FILE.txt"
        ) from error
    return model.getvalue()
