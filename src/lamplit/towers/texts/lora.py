"""LoRA: low-rank changes to a text encoder whose own weights stay as they are (Hu et al. 2021), by `peft`."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lamplit.errors import require

# The change is multiplied by ALPHA / rank = 2 whatever the rank, so that a learning rate serves every rank.
ALPHA_PER_RANK = 2


def add_lora(encoder: nn.Module, rank: int) -> nn.Module:
    """Freeze an encoder and put a pair of low-rank matrices beside each of its linear layers; only they train.

    All linear layers take part, not the attention's alone: at the same number of parameters that comes nearer to
    full tuning. There is no dropout but the encoder's own, and the biases stay. The second matrix of each pair
    begins at zero, so the encoder's first outputs are those it had.

    Args:
        encoder: a model of transformers.
        rank: of the matrices, at least 1.

    Raises:
        MissingExtraError: `peft` is not installed.
    """
    peft = require("peft", "lora")
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, lora_dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings():
        # Of GPT-2's kernels, which peft turns round itself, and of names that it reads of transformers.
        warnings.simplefilter("ignore")
        adapted: nn.Module = peft.get_peft_model(encoder, config)
    return adapted


def merge_lora(encoder: Any) -> nn.Module:
    """Add the low-rank changes to the weights they stand beside: an ordinary encoder with the same outputs."""
    merged: nn.Module = encoder.merge_and_unload()
    return merged.requires_grad_(True)
