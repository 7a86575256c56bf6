"""The parts of a model in the form that other libraries take, or the reason why they cannot take them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lamplit.errors import TowerError, first_line
from lamplit.exports.bias import fold_bias, last_norm
from lamplit.model import LiT
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.loading import READ_ERRORS
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.text_tower import TextTower
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer


def find_image_tower(model: LiT) -> ImageTower:
    """Return the model's image tower, out of its lock.

    Raises:
        TowerError: the model is open without it.
    """
    tower = model.unlocked_image_tower
    if not isinstance(tower, ImageTower):
        raise TowerError(
            f"the model has no image tower: it was saved, or is open, without {model.identity.spec}; "
            "--to sentence-transformers and --to onnx do without"
        )
    return tower


def find_text_tower(model: LiT) -> TextTower:
    """Return the model's text tower.

    Raises:
        TowerError: the model is open without it.
    """
    if model.text_tower is None:
        raise TowerError("the model has no text tower: it is open, or was saved, without it")
    return model.text_tower


def find_transformers_config(tower: TextTower, target: str) -> dict[str, Any]:
    """Return the configuration of a text encoder that transformers built.

    Raises:
        TowerError: the encoder or the tokenizer is not of transformers.
    """
    if tower.config["library"] != "transformers" or not isinstance(tower.tokenizer, PretrainedTokenizer):
        raise TowerError(
            f"{tower.spec} has an encoder or a tokenizer of lamplit's own, and {target} opens those of transformers "
            "alone; --to onnx takes every tower"
        )
    config: dict[str, Any] = tower.config["config"]
    return config


def copy_tokenizer(tower: TextTower) -> PreTrainedTokenizerBase:
    """Return a transformers tokenizer that cuts at the tower's context length."""
    assert isinstance(tower.tokenizer, PretrainedTokenizer)
    tokenizer = copy.deepcopy(tower.tokenizer.tokenizer)
    tokenizer.model_max_length = tower.context_length
    return tokenizer


def linear_image_head(model: LiT, target: str) -> Tensor:
    """Return the matrix (E, D) that takes the image tower's features to the joint space, before normalising.

    Raises:
        TowerError: what the model does there is not a matrix.
    """
    if model.center is not None:
        raise TowerError(
            "the model was tuned on a centred store: it subtracts a mean from unit vectors and normalises again, and "
            f"{target} has a place for a matrix only; use --to onnx, or tune on a store made without --mean-center"
        )
    if model.image_head is None:
        return torch.eye(model.width)
    if model.image_head.bias is not None and model.image_head.bias.abs().max() > 0:
        raise TowerError(
            f"the image head adds a bias to unit vectors, and {target} has a place for a matrix only; use --to onnx"
        )
    return model.image_head.weight.detach()


@dataclass(frozen=True)
class BareHead:
    """A text head without a bias: `weight @ (features + shift)` is what the head gives."""

    weight: Tensor  # (D, H)
    shift: Tensor  # (H,)
    norm: nn.LayerNorm | None  # what the features leave
    shared: bool  # the encoder uses that norm in other places too


def bare_head(tower: TextTower, target: str) -> BareHead:
    """Turn the text head into a matrix, for libraries whose projection has no bias.

    Raises:
        TowerError: it is no matrix, or there is no other place for the bias.
    """
    head = tower.head
    if not isinstance(head, nn.Linear):
        kind = "a kernel head" if isinstance(head, KernelHead) else "a head of two layers"
        raise TowerError(
            f"this model has {kind}, and {target}'s projection is a matrix; use --to onnx or "
            "--to sentence-transformers, or tune with --head linear"
        )
    found = last_norm(tower.encoder, input_ids=torch.tensor(tower.tokenize(["a b c"])))
    norm, shared = found or (None, False)
    if head.bias.abs().max() == 0:
        return BareHead(head.weight.detach(), torch.zeros(head.in_features), norm, shared)
    if norm is None:
        raise TowerError(
            f"the head of {tower.spec} has a bias, {target}'s projection has none, and {type(tower.encoder).__name__} "
            "does not end in a LayerNorm that could hold it; use --to onnx or --to sentence-transformers"
        )
    return BareHead(*fold_bias(head, norm), norm, shared)


def shift_features(encoder: nn.Module, tower: TextTower, head: BareHead) -> None:
    """Add the shift of a bare head to all that `encoder` gives, a copy of the tower's encoder.

    Raises:
        TowerError: its layers share the norm that would hold the shift.
    """
    if head.shift.abs().max() == 0:
        return
    if head.shared:
        raise TowerError(f"the layers of {tower.spec} share the norm that would hold the head's bias; use --to onnx")
    [name] = [name for name, module in tower.encoder.named_modules() if module is head.norm]
    norm = encoder.get_submodule(name)
    assert isinstance(norm, nn.LayerNorm)
    norm.bias.add_(head.shift)


@contextmanager
def foreign_call(what: str) -> Iterator[None]:
    """Turn errors of another library into a sentence. Put nothing of lamplit's own into the block.

    Raises:
        TowerError: the other library failed.
    """
    try:
        yield
    except READ_ERRORS as error:
        raise TowerError(f"{what}: {first_line(error)}") from error
