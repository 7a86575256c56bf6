"""Models of open_clip, opened by open_clip itself and taken apart: its own image tower, and its text tower.

A text tower that open_clip took from transformers becomes an ordinary one here; its own stays its own module. All of
open_clip that is not public is called in this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamplit.errors import TowerError, UsageError, first_line, require
from lamplit.towers.loading import READ_ERRORS, quiet_logging, quiet_transformers
from lamplit.towers.tokens.open_clip_tokenizers import EXTRA


class OpenClipModel(NamedTuple):
    """A model of open_clip, its tokenizer, and its configuration."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]

    @property
    def logit_multiplier(self) -> float:
        """What cosines are multiplied by."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float | None:
        """What is added to the logits; None if the model has no such number."""
        bias = self.model.logit_bias
        return None if bias is None else float(bias.detach())


def open_open_clip(spec: str) -> OpenClipModel:
    """Open a model of open_clip with all its weights, in eval mode, on the CPU.

    Args:
        spec: `open_clip:FOLDER`, `open_clip:NAME/PRETRAINED` (a name of open_clip's own list, and a tag or a file), or
            `open_clip:ORG/NAME` on the hub. A file of weights is never unpickled.

    Raises:
        MissingExtraError: open_clip is not installed.
        UsageError: a name of its list without the weights.
        TowerError: there is no such model, or it cannot be opened, or it lacks weights.
    """
    open_clip = require("open_clip", EXTRA)
    name = spec.removeprefix("open_clip:")
    known, _, pretrained = name.partition("/")
    options: dict[str, Any] = {}
    if Path(name).is_dir():
        name = f"local-dir:{name}"
    elif known in open_clip.list_models():
        if not pretrained:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(known)) or "none; give a file"
            raise UsageError(f"{spec} names no weights; type open_clip:{known}/PRETRAINED, with one of: {tags}")
        name, options = known, {"pretrained": pretrained}
        # OpenAI's weights want another GELU than the configuration of that name has; open_clip only warns.
        options["force_quick_gelu"] = bool((open_clip.get_pretrained_cfg(known, pretrained) or {}).get("quick_gelu"))
    else:
        name = f"hf-hub:{name}"
    with quiet_transformers(), _calling(spec):
        config = open_clip.get_model_config(name)
        model = open_clip.create_model(name, require_pretrained=True, pretrained_text=False, **options)
        tokenizer = open_clip.get_tokenizer(name)
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    return OpenClipModel(model.eval(), tokenizer, config)


@contextmanager
def _calling(spec: str) -> Iterator[None]:
    """Turn what open_clip raises into a `TowerError`; keep back what it says on the way."""
    try:
        with quiet_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except READ_ERRORS as error:
        raise TowerError(f"{spec} could not be opened by open_clip: {first_line(error)}") from error


class OpenClipVision(nn.Module):
    """The image tower of a model of open_clip: (B, 3, height, width) normalised images in, (B, D) features out."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of images."""
        features: Tensor = self.visual(pixels)
        return features


def vision_config(opened: OpenClipModel) -> dict[str, Any]:
    """Return what builds the image tower again without its weights."""
    vision = opened.config["vision_cfg"] | {"timm_model_pretrained": False, "output_tokens": False}
    return {"library": "open_clip", "vision_cfg": vision, **_shared(opened.config)}


def build_vision(config: dict[str, Any]) -> OpenClipVision:
    """Build an image tower from `vision_config`, with random weights.

    Raises:
        MissingExtraError: open_clip is not installed.
        TowerError: the configuration cannot be built.
    """
    build = require("open_clip.model", EXTRA)._build_vision_tower
    with _calling("an image tower"):
        return OpenClipVision(build(config["embed_dim"], config["vision_cfg"], config["quick_gelu"]).eval())


class _Hidden(NamedTuple):
    last_hidden_state: Tensor  # (B, T, width)


class OpenClipText(nn.Module):
    """The text tower of open_clip's own kind, up to its last norm: (B, T) ids in, (B, T, width) out."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> _Hidden:
        """Encode texts. There is no mask: rows are filled, or no token sees a later one."""
        hidden, mask = self.text._embeds(input_ids)
        if mask is not None:
            mask = mask[..., : hidden.shape[1], : hidden.shape[1]]
        hidden = self.text.ln_final(self.text.transformer(hidden, attn_mask=mask))
        # CoCa reads a token of its own behind the filled row; here it is in the last one's place.
        return _Hidden(hidden if self.text.cls_emb is None else hidden[:, 1:])


def text_config(opened: OpenClipModel) -> dict[str, Any]:
    """Return what builds a text tower of open_clip's own kind again without its weights and its projection."""
    text = opened.config["text_cfg"] | {"proj_type": "none", "output_tokens": False}
    return {"library": "open_clip", "text_cfg": text, **_shared(opened.config)}


def build_text(config: dict[str, Any]) -> OpenClipText:
    """Build a text tower from `text_config`, with random weights.

    Raises:
        MissingExtraError: open_clip is not installed.
        TowerError: the configuration cannot be built.
    """
    build = require("open_clip.model", EXTRA)._build_text_tower
    with _calling("a text tower"):
        return OpenClipText(build(config["embed_dim"], config["text_cfg"], config["quick_gelu"]))


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    return {"embed_dim": config["embed_dim"], "quick_gelu": bool(config.get("quick_gelu", False))}


@torch.no_grad()
def prepare(opened: OpenClipModel, image: Any) -> Tensor:
    """Return an image as open_clip prepares it for this model: (3, height, width)."""
    transform = require("open_clip.transform", EXTRA)
    prepared: Tensor = transform.image_transform_v2(preprocess_config(opened), is_train=False)(image)
    return prepared


def preprocess_config(opened: OpenClipModel) -> Any:
    """Return open_clip's settings of how this model takes its images."""
    return require("open_clip.transform", EXTRA).PreprocessCfg(**opened.model.visual.preprocess_cfg)
