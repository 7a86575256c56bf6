"""The paper's own text tower, from scratch: pre-norm, tanh GELU, learned positions, the last token read.

Its tokenizer is trained on the captions it will read (byte-pair encoding over bytes, so that no script is
unknown).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import Block
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

# name: (width, num_layers, num_heads), the ViT sizes of the paper (section 4)
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
END, PAD = "</s>", "<pad>"


@dataclass(frozen=True)
class Encoded:
    """What transformers' encoders return, as far as a text tower reads it."""

    last_hidden_state: Tensor  # (B, T, width)


class ScratchEncoder(nn.Module):
    """A transformer over token ids, (B, T) in, (B, T, width) out."""

    def __init__(self, vocab_size: int, width: int, num_layers: int, num_heads: int, context_length: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, qkv_bias=True, act_layer=GELUTanh, norm_layer=norm) for _ in range(num_layers)
        )
        self.norm = norm(width)
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)
        nn.init.normal_(self.position_embedding, std=width**-0.5)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Encode (B, T) ids; a (B, T) mask is true at real tokens and keeps padding out of the attention."""
        hidden = self.token_embedding(input_ids) + self.position_embedding[: input_ids.shape[1]]
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            hidden = block(hidden, attn_mask=mask)
        return Encoded(self.norm(hidden))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`, lower-cased (as the published towers' text is) and NFKC-normalised.

    Every text ends in one end token, which is what the tower reads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
