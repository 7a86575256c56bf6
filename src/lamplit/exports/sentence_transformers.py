"""The text tower as a sentence-transformers model: encoder, pooling, head and normalisation are modules of its own."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamplit.errors import require
from lamplit.exports.export_report import ExportReport
from lamplit.exports.parts import copy_tokenizer, find_text_tower, find_transformers_config, foreign_call
from lamplit.exports.sample import Sample, require_agreement, text_tolerance
from lamplit.model import LiT
from lamplit.towers.loading import quiet_transformers
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.layered_head import LayeredHead
from lamplit.towers.texts.text_tower import TextTower

_FAR_BELOW = -17.0  # where log(1 + exp(x)) is exp(x) to the last digit of a float
_POOLING = {"cls": "cls", "mean": "mean", "last": "lasttoken"}


def write(model: LiT, folder: Path, sample: Sample) -> ExportReport:
    """Write the text tower, and check what `SentenceTransformer(folder)` gives.

    Raises:
        TowerError: the tower is not of transformers, or the vectors differ by more than 1e-5.
        MissingExtraError: sentence-transformers is not installed.
    """
    sentence_transformers = require("sentence_transformers", "export")
    tower = find_text_tower(model)
    assert sample.ztxt is not None
    find_transformers_config(tower, "sentence-transformers")
    report = ExportReport("sentence-transformers", str(folder), sample.origin)
    tokenizer = copy_tokenizer(tower)
    with quiet_transformers(), foreign_call(f"sentence-transformers cannot hold {tower.spec}"):
        _modules(tower, tokenizer).save(str(folder), create_model_card=False)
        opened = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        vectors = opened.encode(sample.texts, convert_to_tensor=True, show_progress_bar=False)
    report.differences["text vectors"] = require_agreement(
        "text tower", vectors, sample.ztxt, text_tolerance(model, sample)
    )
    return report


def _modules(tower: TextTower, tokenizer: Any) -> Any:
    """Build the library's modules from a tower's weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    with tempfile.TemporaryDirectory() as folder:
        _with_pooler(tower.encoder).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = parts.Transformer(folder, max_seq_length=tower.context_length)
    pooling = parts.Pooling(tower.head.in_features, pooling_mode=_POOLING[tower.pooling])
    modules = [encoder, pooling, *_head(tower.head, parts), parts.Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


@torch.no_grad()
def _head(head: nn.Linear | KernelHead | LayeredHead, parts: Any) -> list[nn.Module]:
    """Build the library's layers from a head."""
    if not isinstance(head, KernelHead):
        layers = [(head, nn.Identity())] if isinstance(head, nn.Linear) else head.layers()
        built = [parts.Dense(each.in_features, each.out_features, activation_function=act) for each, act in layers]
        for dense, (layer, _) in zip(built, layers, strict=True):
            dense.linear.load_state_dict(layer.state_dict())
        return built
    # Vectors are normalised in the end, so exp does what the softmax does. The library has no exp, but softplus is it
    # far below 0.
    centred = parts.Dense(head.in_features, head.in_features, activation_function=nn.Identity())
    keys = parts.Dense(head.in_features, head.anchors, activation_function=nn.Softplus())
    values = parts.Dense(head.anchors, head.out_features, bias=False, activation_function=nn.Identity())
    nn.init.eye_(centred.linear.weight)
    centred.linear.bias.copy_(-head.mean)
    keys.linear.weight.copy_(head.keys.weight)
    keys.linear.bias.fill_(_FAR_BELOW - float(head.keys.weight.norm(dim=-1).max()))
    values.linear.weight.copy_(head.values.weight / math.exp(_FAR_BELOW))
    return [centred, parts.Normalize(), keys, values]


def _with_pooler(encoder: Any) -> Any:
    """Give BERT a pooler of zeros, which nothing reads: without it every load would warn of a random one."""
    whole = type(encoder)(encoder.config)
    missing = whole.load_state_dict(encoder.state_dict(), strict=False).missing_keys
    for name in missing:
        nn.init.zeros_(whole.get_parameter(name))
    return whole if missing else encoder
