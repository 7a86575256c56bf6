"""Both towers as a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens.

The image tower is open_clip's `TimmModel`, the text tower its `HFTextEncoder`, whose projection has no bias: the
head's bias is folded (see `bias`) into the last norm of the encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError, require
from lamplit.exports.export_report import ExportReport
from lamplit.exports.parts import (
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
from lamplit.towers.loading import load_strictly, quiet_logging, quiet_transformers
from lamplit.towers.saving import save_weights
from lamplit.towers.texts.text_tower import TextTower

_POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}
# One line for every shell: double quotes around it, and none inside.
_README = """# A model for open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")

open_clip finds the text encoder by its absolute path, so after moving or copying this folder, type this in it:

    python -c "import json, pathlib as p; f = p.Path('open_clip_config.json'); c = json.loads(f.read_text()); \
c['model_cfg']['text_cfg']['hf_model_name'] = str(p.Path('text_encoder').resolve()); \
f.write_text(json.dumps(c, indent=2))"
"""


def write(model: LiT, folder: Path, sample: Sample) -> ExportReport:
    """Write configuration, weights and tokenizer, and check what open_clip gives for them.

    Raises:
        TowerError: open_clip has no place for what a tower does, or the vectors differ by more than 1e-5.
        MissingExtraError: open_clip is not installed.
    """
    open_clip = require("open_clip", "export")
    image, text = find_image_tower(model), find_text_tower(model)
    report = ExportReport("open-clip", str(folder), sample.origin)
    config = {
        "model_cfg": _model_config(model, image, text, folder),
        "preprocess_cfg": _preprocess_config(image.preprocessing, report.notes),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(_README)
    AutoConfig.for_model(**text.config["config"]).save_pretrained(folder / "text_encoder")
    copy_tokenizer(text).save_pretrained(folder)
    refusal = f"open_clip cannot hold {image.spec} and {text.spec}"
    with quiet_transformers(), torch.no_grad():
        with quiet_logging(), foreign_call(refusal):  # it warns that there are no weights yet
            built = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        _fill(built, model, image, text)
        state = {name: tensor.contiguous().clone() for name, tensor in built.state_dict().items()}
        save_weights(state, folder / "open_clip_model.safetensors")
        _check(folder, model, sample, report, refusal)
    report.notes += [
        "open_clip's tokenizer mends texts before it reads them (curly quotes, HTML entities, runs of spaces): its "
        "vectors are those of the mended text",
        "open_clip finds the text encoder's configuration by its absolute path: after moving the folder, type "
        "the line that its README.md shows",
    ]
    return report


def _model_config(model: LiT, image: ImageTower, text: TextTower, folder: Path) -> dict[str, Any]:
    if image.config["library"] != "timm":
        raise TowerError(f"open_clip opens image towers of timm, and {image.spec} is none; use --to onnx")
    if own := sorted((image.config.get("args") or {}).keys() - {"num_classes", "global_pool"}):
        raise TowerError(
            f"open_clip builds timm's models by their names alone, and {image.spec} has {' and '.join(own)} of its "
            "own; use --to onnx"
        )
    if image.pool is not None:
        raise TowerError(f"open_clip pools as timm does, and {image.spec} was opened with {image.pool}; use --to onnx")
    height, width = image.preprocessing.image_size
    return {
        "embed_dim": model.width,
        "init_logit_bias": None if model.logit_bias is None else float(model.logit_bias),
        "vision_cfg": {
            "timm_model_name": image.config["name"],
            "timm_model_pretrained": False,
            "timm_pool": _timm_pool(image.backbone),
            "timm_proj": "none" if model.image_head is None else "linear",
            "image_size": height if height == width else [height, width],
        },
        "text_cfg": {
            "hf_model_name": str((folder / "text_encoder").resolve()),
            "hf_tokenizer_name": "the files beside this one",
            "hf_proj_type": "linear",
            "hf_pooler_type": _pooler(text),
            "context_length": text.context_length,
        },
    }


def _timm_pool(backbone: Any) -> str:
    """Return the pooling of a timm model by the name that timm's builder takes."""
    pool = getattr(backbone, "global_pool", None) or getattr(getattr(backbone, "head", None), "global_pool", None)
    return str(pool if isinstance(pool, str) else getattr(pool, "pool_type", ""))


def _pooler(tower: TextTower) -> str:
    from open_clip.hf_configs import arch_dict

    config = find_transformers_config(tower, "open_clip")
    kind = config["model_type"]
    if kind not in arch_dict or config.get("is_encoder_decoder"):
        raise TowerError(
            f"open_clip's text encoders with a norm that can hold a bias are bert, roberta and xlm-roberta, and "
            f"{tower.spec} is {kind}; use --to onnx or --to sentence-transformers"
        )
    if tower.pooling not in _POOLERS:
        raise TowerError(f"{tower.spec} reads the last token, which open_clip's poolers of such encoders do not")
    if config.get("pad_token_id") != tower.tokenizer.pad_id:
        raise TowerError(
            f"open_clip masks the tokens {config.get('pad_token_id')} of the encoder's configuration, but the "
            f"tokenizer of {tower.spec} pads with {tower.tokenizer.pad_id}"
        )
    return _POOLERS[tower.pooling]


def _preprocess_config(preprocessing: Preprocessing, notes: list[str]) -> dict[str, Any]:
    if preprocessing.fit == "crop" and preprocessing.crop_fraction != 1:
        notes.append(
            f"open_clip's preprocess shows the tower the whole middle square, lamplit {preprocessing.crop_fraction:g} "
            "of its side: use timm.data.create_transform with this crop_pct, or lamplit's Preprocessing"
        )
    if not preprocessing.antialias or preprocessing.interpolation == "nearest":
        notes.append("open_clip's preprocess smooths when it scales; this tower was trained without")
    return {
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": "bilinear" if preprocessing.interpolation in ("bilinear", "nearest") else "bicubic",
        "resize_mode": "squash" if preprocessing.fit == "squash" else "shortest",
    }


def _fill(built: Any, model: LiT, image: ImageTower, text: TextTower) -> None:
    load_strictly(built.visual.trunk, image.backbone.state_dict(), image.spec)
    matrix = linear_image_head(model, "open_clip")
    if model.image_head is not None:
        built.visual.head.proj.weight.copy_(matrix)
    load_strictly(built.text.transformer, text.encoder.state_dict(), text.spec)
    head = bare_head(text, "open_clip")
    shift_features(built.text.transformer, text, head)
    built.text.proj.weight.copy_(head.weight)
    built.logit_scale.copy_(model.log_scale)
    if model.logit_bias is not None:
        built.logit_bias.copy_(model.logit_bias)


def _check(folder: Path, model: LiT, sample: Sample, report: ExportReport, refusal: str) -> None:
    """Open the folder as a user would, and compare."""
    import open_clip

    assert sample.pixels is not None
    assert sample.zimg is not None
    pixels = find_image_tower(model).preprocessing.normalize(sample.pixels)
    with foreign_call(refusal):
        opened, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        opened.eval()
        zimg = opened.encode_image(pixels, normalize=True)
        ztxt = opened.encode_text(tokenizer(sample.texts), normalize=True)
        prepared = torch.stack([preprocess(image) for image in sample.images])
        zimg_prepared = opened.encode_image(prepared, normalize=True)
    expected = model.encode_texts([tokenizer.clean_fn(text) for text in sample.texts])
    report.differences["image vectors"] = require_agreement("image tower", zimg, sample.zimg, TOLERANCE)
    report.differences["text vectors"] = require_agreement("text tower", ztxt, expected, text_tolerance(model, sample))
    report.preprocessing_cosine = float((zimg_prepared * sample.zimg).sum(1).min())
