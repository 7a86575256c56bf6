"""Image backbones of transformers: vision models, and the vision towers of CLIP and SigLIP checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionModelWithProjection,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError, UsageError, first_line
from lamplit.towers.images.backbone import MAX_DIFFERENCE, Backbone, ClassHead, class_texts, smooth_image
from lamplit.towers.images.timm_models import open_timm
from lamplit.towers.loading import load_strictly, opening, plain_config, quiet_transformers, require_whole
from lamplit.towers.whole_models import (
    ProjectedVision,
    build_part,
    build_projected_vision,
    features_of,
    is_near,
    open_whole,
)

_MAX_SIDE = 4096  # pixels of an image's side; a hostile file could ask for any number
_PIL_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def open_transformers(
    name: str, weights: str | Path | None = None, preprocessing: Preprocessing | None = None
) -> Backbone:
    """Open a model of transformers by its folder or hub name.

    A checkpoint of a whole CLIP or SigLIP opens as its vision tower, and gives what that library calls the image
    features: CLIP's class token through `visual_projection` (so does a `CLIPVisionModelWithProjection`; a plain
    `CLIPVisionModel` has no projection and gives the class token), SigLIP's attention pooling. The preprocessing is
    read from the checkpoint's processor, where none is given.

    Raises:
        UsageError: weights were given beside the folder's own.
        TowerError: it cannot be opened, lacks weights, or is no vision model.
    """
    spec = f"hf:{name}"
    if weights is not None:
        raise UsageError(f"{spec} brings its own weights; put the file into a folder with its config.json instead")
    with opening(spec):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type == "timm_wrapper":  # a model of timm, which reads it itself
        return open_timm(f"{'local-dir' if Path(name).is_dir() else 'hf-hub'}:{name}", None, preprocessing)
    if _is_side(config):
        return _open_side(spec, name, preprocessing)
    loader, config, is_classifier = _loader(spec, config)
    preprocessing = preprocessing or _open_preprocessing(spec, name)
    with quiet_transformers(), opening(spec):
        model, report = loader.from_pretrained(
            name, config=config, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )  # fmt: skip
    class_head = _class_head(model, config) if is_classifier else None
    projected = loader is CLIPVisionModelWithProjection
    backbone = model if projected else model.base_model
    missing = {key.removeprefix(f"{model.base_model_prefix}.") for key in report["missing_keys"]}
    if missing and all(key.startswith("pooler.") for key in missing):
        # A pooler that was never trained: leave it out and read the class token.
        backbone.pooler, missing = None, set()
    options = {"add_pooling_layer": False} if getattr(backbone, "pooler", True) is None else {}
    require_whole(spec, missing, report["mismatched_keys"])
    built: dict[str, Any] = {"library": "transformers", "config": plain_config(config), "options": options}
    if projected:
        built["projected"] = True
    return Backbone(backbone, preprocessing, built, class_head)


def build_transformers(config: dict[str, Any]) -> nn.Module:
    """Build the model that a `Backbone.config` of this module describes, with random weights."""
    built = AutoConfig.for_model(**config["config"])
    if config.get("projected"):
        projected: nn.Module = CLIPVisionModelWithProjection(built)
        return projected
    if "projection" in config:
        return build_projected_vision(built, config["projection"])
    if type(built) not in MODEL_MAPPING:
        part: nn.Module = build_part(built)
        return part
    backbone: nn.Module = AutoModel.from_config(built, dtype=torch.float32, **config["options"])
    return backbone


def _is_side(config: Any) -> bool:
    """Tell whether a checkpoint is a two-tower model whose image side no class of transformers opens alone."""
    own_classes = config.model_type in ("clip", "siglip") or config.model_type.startswith("siglip2")
    return hasattr(config, "vision_config") and not own_classes


@torch.no_grad()
def _open_side(spec: str, name: str, preprocessing: Preprocessing | None) -> Backbone:
    """Take the image side out of a two-tower model; what it gives are the model's own image features."""
    whole = open_whole(spec, name)
    preprocessing = preprocessing or _open_preprocessing(spec, name)
    built: dict[str, Any] = {"library": "transformers", "config": plain_config(whole.config.vision_config)}
    projection = getattr(whole, "visual_projection", None)
    if projection is None:
        backbone = build_transformers(built | {"options": {}})
        load_strictly(backbone, whole.vision_model.state_dict(), f"the vision model of {spec}")
        built["options"] = {}
    else:
        built["projection"] = [projection.in_features, projection.out_features]
        side = ProjectedVision(whole.vision_model, projection)
        backbone = build_transformers(built)
        load_strictly(backbone, side.state_dict(), f"the image side of {spec}")
    pixels = preprocessing.reference(smooth_image())[None]
    with opening(spec):
        expected = features_of(whole.get_image_features(pixel_values=pixels))
        found = features_of(backbone.eval()(pixels))
    if not is_near(found, expected):
        raise TowerError(
            f"{spec} ({whole.config.model_type}) makes its image features in a way that lamplit does not know: they "
            "are not what its vision model pools, through its projection"
        )
    return Backbone(backbone, preprocessing, built)


def _loader(spec: str, config: Any) -> tuple[Any, Any, bool]:
    """Choose the class that reads a checkpoint, its config, and whether it is a classifier."""
    kinds = config.architectures or []
    if config.model_type == "clip":
        config.vision_config.projection_dim = config.projection_dim
        return CLIPVisionModelWithProjection, config.vision_config, False
    if "CLIPVisionModelWithProjection" in kinds:
        return CLIPVisionModelWithProjection, config, False
    if config.model_type == "siglip":
        return SiglipVisionModel, config.vision_config, False
    if config.model_type.startswith("siglip2"):
        raise TowerError(
            f"{spec} reads rows of patches from images of any shape (NaFlex), lamplit images of one size; "
            "open a SigLIP2 of a fixed size"
        )
    if config.model_type == "vit_mae":  # its own class hides three patches in four, at random
        fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        return ViTModel, ViTConfig(**fields), False
    is_classifier = any("ForImageClassification" in kind for kind in kinds)
    return AutoModelForImageClassification if is_classifier else AutoModel, config, is_classifier


def _class_head(model: Any, config: Any) -> ClassHead | None:
    classifier = getattr(model, "classifier", nn.Identity())  # some have two, under other names
    linear = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    names = [config.id2label[i] for i in range(config.num_labels)]
    if len(linear) != 1 or names[0] == "LABEL_0":
        return None
    return ClassHead([class_texts(name.split(", ")) for name in names], linear[0].weight.detach().clone())


def _open_preprocessing(spec: str, name: str) -> Preprocessing:
    with quiet_transformers(), opening(spec):
        processor = AutoImageProcessor.from_pretrained(name, use_fast=False, trust_remote_code=False)
    return _read_preprocessing(spec, processor)


def _read_preprocessing(spec: str, processor: Any) -> Preprocessing:
    """Read what a processor does from its settings, and see on an image that it does no more."""
    try:
        preprocessing = _preprocessing(processor.to_dict())
    except KeyError as error:
        raise TowerError(f"{spec} does not say how it wants its images; its processor has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise TowerError(f"{spec} says in a damaged file how it wants its images: {first_line(error)}") from error
    except ZeroDivisionError as error:
        raise TowerError(f"{spec} wants images of no size; expected sides up to {_MAX_SIDE}") from error
    if not all(1 <= side / preprocessing.crop_fraction <= _MAX_SIDE for side in preprocessing.image_size):
        raise TowerError(f"{spec} wants images of {preprocessing.image_size}; expected sides up to {_MAX_SIDE}")
    image = smooth_image()
    with opening(spec):
        processed = processor(images=image)["pixel_values"][0]
    expected = torch.as_tensor(np.array(processed))  # a copy: MobileViT's has negative strides
    found = preprocessing.reference(image)
    if found.shape != expected.shape or (found - expected).abs().mean() > MAX_DIFFERENCE:
        raise TowerError(
            f"{spec} prepares images in a way that lamplit does not know ({type(processor).__name__}); say what "
            "comes nearest with open_image_tower(..., preprocessing=Preprocessing(...))"
        )
    return preprocessing


def _preprocessing(processor: dict[str, Any]) -> Preprocessing:
    size, cropped = processor["size"], processor.get("crop_size")
    side = size.get("shortest_edge") or size["height"]
    fit: Literal["crop", "squash"] = "crop" if "shortest_edge" in size else "squash"
    height, width = size.get("height", side), size.get("width", side)
    crop_fraction = 1.0
    is_cropped = processor.get("do_center_crop") and cropped is not None
    if cropped is not None and is_cropped:
        height, width = cropped["height"], cropped["width"]
        crop_fraction = height / side
    if processor.get("crop_pct"):  # ConvNeXt's and PoolFormer's: the image is scaled to more than `size`
        fit, crop_fraction = ("crop", processor["crop_pct"]) if side < 384 else ("squash", 1.0)
    mean, std = _normalization(processor)
    return Preprocessing(
        image_size=(height, width),
        mean=mean,
        std=std,
        interpolation=_PIL_INTERPOLATION[int(processor["resample"])],  # type: ignore[arg-type]
        crop_fraction=crop_fraction,
        fit=fit,
        center="floor" if is_cropped or fit == "crop" else "round",
    )


def _normalization(processor: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of values from 0 to 1: EfficientNet's may be from -1 to 1, and be divided twice."""
    mean, std = processor["image_mean"], processor["image_std"]
    scale = 255 * processor.get("rescale_factor", 1 / 255)
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    again = std if processor.get("include_top") else [1.0] * len(std)
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    means = tuple((offset + value) / scale for value in mean)
    return means, tuple(value * more / scale for value, more in zip(std, again, strict=True))
