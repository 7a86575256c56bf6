"""Both towers as a `VisionTextDualEncoderModel`, whose projections have no bias and read `pooler_output`.

A text tower that reads the class token fits the models whose pooler is tanh(A x + b) of that token: with A = e and a
small e, tanh is the identity to the last digit of a float, and the projection divides by e again. The head's bias is
folded (see `bias`). A tower that averages tokens, or has no pooled output, does not fit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError
from lamplit.exports.export_report import ExportReport
from lamplit.exports.parts import (
    BareHead,
    bare_head,
    copy_tokenizer,
    find_image_tower,
    find_text_tower,
    find_transformers_config,
    foreign_call,
    linear_image_head,
    shift_features,
)
from lamplit.exports.sample import TOLERANCE, Sample, require_agreement, text_tolerance
from lamplit.model import LiT
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.loading import load_strictly, quiet_transformers
from lamplit.towers.texts.text_tower import TextTower

NAME = "VisionTextDualEncoderModel"
_RESAMPLE = {"nearest": 0, "lanczos": 3, "bilinear": 2, "bicubic": 3}  # lanczos as `Preprocessing.resize` has it


def write(model: LiT, folder: Path, sample: Sample) -> ExportReport:
    """Write both towers and the processor, and check what transformers gives for them.

    Raises:
        TowerError: the class has no place for what a tower does, or the vectors differ by more than 1e-5.
    """
    image, text = find_image_tower(model), find_text_tower(model)
    report = ExportReport("transformers", str(folder), sample.origin)
    refusal = f"{NAME} cannot hold {image.spec} and {text.spec}"
    with quiet_transformers(), torch.no_grad():
        built = _build(model, image, text, refusal)
        settings = _processor_settings(image.preprocessing, report.notes)
        tokenizer = copy_tokenizer(text)
        with foreign_call(refusal):
            built.save_pretrained(folder)
            VisionTextDualEncoderProcessor(CLIPImageProcessor(**settings), tokenizer).save_pretrained(folder)
        _check(folder, image, sample, text_tolerance(model, sample), report, refusal)
    if model.logit_bias is not None:
        report.notes.append(f"{NAME} has no logit bias: add {float(model.logit_bias):.4f} to its logits")
    return report


def _build(model: LiT, image: ImageTower, text: TextTower, refusal: str) -> Any:
    vision_config, text_config = _vision_config(image), find_transformers_config(text, NAME)
    with foreign_call(refusal):
        config = VisionTextDualEncoderConfig(
            vision_config=vision_config,
            text_config=text_config,
            projection_dim=model.width,
            logit_scale_init_value=float(model.log_scale),
        )
        built = VisionTextDualEncoderModel(config).eval()
    built.visual_projection.weight.copy_(linear_image_head(model, NAME))
    built.logit_scale.copy_(model.log_scale)
    _fill_vision(built.vision_model, image)
    _fill_text(built, text)
    return built


def _vision_config(tower: ImageTower) -> dict[str, Any]:
    if tower.pool is not None:
        raise TowerError(f"{NAME} pools as its vision model does, not by {tower.pool}; use --to onnx")
    if tower.config.get("projected"):
        raise TowerError(f"{NAME} leaves out the projection of CLIP that {tower.spec} ends with; use --to onnx")
    if tower.config["library"] == "timm":
        nameless: dict[str, Any] = {"num_classes": 0, "label_names": []}
        # transformers gives num_classes itself.
        args = {name: value for name, value in (tower.config.get("args") or {}).items() if name != "num_classes"}
        return {
            "model_type": "timm_wrapper", "architecture": tower.config["name"], "hidden_size": tower.width, **nameless,
            "model_args": args or None,
        }  # fmt: skip
    if tower.config["library"] != "transformers":
        raise TowerError(
            f"{NAME} builds towers of timm and of transformers, and {tower.spec} is neither; use --to onnx"
        )
    config = dict(tower.config["config"])
    if getattr(tower.backbone, "pooler", True) is None:  # the class token is read; a linear pooler gives it as it is
        config["pooler_act"] = "linear"
    return config if "hidden_size" in config else config | {"hidden_size": tower.width}


def _fill_vision(vision: Any, tower: ImageTower) -> None:
    if tower.config["library"] == "timm":
        load_strictly(vision.timm_model, tower.backbone.state_dict(), tower.spec)
        return
    state = tower.backbone.state_dict()
    if getattr(tower.backbone, "pooler", True) is None and isinstance(getattr(vision, "pooler", None), nn.Module):
        state |= {
            "pooler.dense.weight": torch.eye(tower.width),
            "pooler.dense.bias": torch.zeros(tower.width),
        }
    load_strictly(vision, state, tower.spec)


def _fill_text(built: Any, tower: TextTower) -> None:
    """Give the text model its weights and the projection that makes its pooled output the tower's vector."""
    text, encoder = built.text_model, tower.encoder
    if type(text) is not type(encoder):
        raise TowerError(
            f"{NAME} opens a {type(text).__name__} for {tower.spec}, which is not its encoder alone; use --to onnx or "
            "--to sentence-transformers"
        )
    head = bare_head(tower, NAME)
    state = encoder.state_dict()
    dense = _tanh_pooler(text)
    if tower.pooling == "cls" and dense is not None and head.norm is not None:
        scale = _linear_scale(head)
        dense.weight.copy_(scale * torch.eye(len(head.shift)))
        dense.bias.copy_(scale * head.shift)
        pooler = {name: value for name, value in text.state_dict().items() if name.startswith("pooler.")}
        load_strictly(text, state | pooler, tower.spec)
        built.text_projection.weight.copy_(head.weight / scale)
        return
    tokens = torch.tensor(tower.tokenize(["a b c"]))
    pooled = encoder(input_ids=tokens).get("pooler_output")
    if pooled is None or not torch.equal(pooled, tower.features(tokens.tolist())):
        reads = {"cls": "the class token", "mean": "the mean of all tokens", "last": "the last token"}[tower.pooling]
        gives = "has no pooled output" if dense is None else "pools the class token"
        raise TowerError(
            f"{NAME} reads a text model's pooled output; {tower.spec} reads {reads}, and {type(text).__name__} "
            f"{gives}; use --to onnx or --to sentence-transformers (or --to open-clip, for BERT and RoBERTa)"
        )
    load_strictly(text, state, tower.spec)
    shift_features(text, tower, head)
    built.text_projection.weight.copy_(head.weight)


def _tanh_pooler(text: Any) -> nn.Linear | None:
    """Find the matrix of a pooler that is tanh(A x + b) of the first token; None if there is no such pooler."""
    pooler = getattr(text, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return None
    activations = (getattr(pooler, "activation", None), getattr(text, "pooler_activation", None))
    linear = [module for module in pooler.modules() if isinstance(module, nn.Linear)]
    if len(linear) != 1 or not any(isinstance(activation, nn.Tanh) for activation in activations):
        return None
    return linear[0]


def _linear_scale(head: BareHead) -> float:
    """Return the power of two below which tanh(x) is x: x²/3 is lost against 1 in a float32 for every feature."""
    assert head.norm is not None
    width = len(head.shift)
    # No coordinate that leaves a LayerNorm exceeds gamma √H + beta.
    largest = float((head.norm.weight.abs() * math.sqrt(width) + head.norm.bias.abs() + head.shift.abs()).max())
    return float(2.0 ** math.floor(math.log2(math.sqrt(3 * 2.0**-24) / largest)))


def _processor_settings(preprocessing: Preprocessing, notes: list[str]) -> dict[str, Any]:
    height, width = preprocessing.image_size
    scaled = [int(side / preprocessing.crop_fraction + 1e-9) for side in (height, width)]
    if preprocessing.fit == "crop" and height != width:
        notes.append("its processor cannot scale to an image that is not square: prepare the pixels with lamplit")
    if not preprocessing.antialias:
        notes.append("its processor smooths when it scales; this tower was trained without: use lamplit's pixels")
    squash = preprocessing.fit == "squash"
    return {
        "size": {"height": scaled[0], "width": scaled[1]} if squash else {"shortest_edge": min(scaled)},
        "crop_size": {"height": height, "width": width},
        "resample": _RESAMPLE[preprocessing.interpolation],
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _check(
    folder: Path, image: ImageTower, sample: Sample, tolerance: float, report: ExportReport, refusal: str
) -> None:
    """Open the folder as a user would, and compare."""
    assert sample.pixels is not None
    assert sample.zimg is not None
    assert sample.ztxt is not None
    pixels = image.preprocessing.normalize(sample.pixels)
    with foreign_call(refusal):
        opened = VisionTextDualEncoderModel.from_pretrained(folder).eval()
        processor = VisionTextDualEncoderProcessor.from_pretrained(folder)
        tokens = processor.tokenizer(sample.texts, padding=True, truncation=True, return_tensors="pt")
        prepared = processor(images=sample.images, return_tensors="pt")["pixel_values"]
        zimg, zimg_prepared = (
            F.normalize(opened.get_image_features(pixel_values=each).pooler_output, dim=-1)
            for each in (pixels, prepared)
        )
        ztxt = F.normalize(opened.get_text_features(**tokens).pooler_output, dim=-1)
    report.differences["image vectors"] = require_agreement("image tower", zimg, sample.zimg, TOLERANCE)
    report.differences["text vectors"] = require_agreement("text tower", ztxt, sample.ztxt, tolerance)
    report.preprocessing_cosine = float((zimg_prepared * sample.zimg).sum(1).min())
