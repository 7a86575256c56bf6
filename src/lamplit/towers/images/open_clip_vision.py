"""Image towers of open_clip, by open_clip's own modules."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError
from lamplit.towers.images.backbone import Backbone, smooth_image
from lamplit.towers.open_clip_models import (
    OpenClipModel,
    OpenClipVision,
    build_vision,
    open_open_clip,
    prepare,
    preprocess_config,
    vision_config,
)
from lamplit.towers.whole_models import is_near

_MAX_DIFFERENCE = 1e-4  # of open_clip's prepared image from ours: mean over it


@torch.no_grad()
def take_vision(spec: str, opened: OpenClipModel) -> Backbone:
    """Take the image tower out of an open model of open_clip.

    Raises:
        TowerError: its features or its preprocessing are not what lamplit would make of it.
    """
    preprocessing = _preprocessing(spec, opened)
    config = vision_config(opened)
    backbone = build_vision(config)
    backbone.load_state_dict(OpenClipVision(opened.model.visual).state_dict())
    image = smooth_image()
    pixels = prepare(opened, image)[None]
    expected = opened.model.encode_image(pixels, normalize=False)
    found = backbone(pixels)
    if not isinstance(expected, torch.Tensor) or not is_near(found, expected):
        raise TowerError(f"{spec} makes image features in a way that lamplit does not know; it opens CLIP and SigLIP")
    if (preprocessing.reference(image) - pixels[0]).abs().mean() > _MAX_DIFFERENCE:
        raise TowerError(f"{spec} prepares images in a way that lamplit does not know: {preprocess_config(opened)}")
    return Backbone(backbone, preprocessing, config)


def open_vision(spec: str) -> Backbone:
    """Open the image tower of a model of open_clip.

    Raises:
        MissingExtraError: open_clip is not installed.
        TowerError: it cannot be opened, or lacks weights.
    """
    return take_vision(spec, open_open_clip(spec))


def _preprocessing(spec: str, opened: OpenClipModel) -> Preprocessing:
    found: Any = preprocess_config(opened)
    fits: dict[str, Literal["crop", "squash"]] = {"shortest": "crop", "squash": "squash"}
    if found.resize_mode not in fits:
        raise TowerError(f"{spec} brings images to their size by {found.resize_mode!r}; expected shortest or squash")
    size = found.size if isinstance(found.size, list | tuple) else (found.size, found.size)
    return Preprocessing(
        image_size=(int(size[0]), int(size[1])),
        mean=tuple(found.mean),
        std=tuple(found.std),
        interpolation="bilinear" if found.interpolation == "bilinear" else "bicubic",
        fit=fits[found.resize_mode],
    )
