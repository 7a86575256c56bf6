"""Text encoders from their descriptions, without weights."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from lamplit.errors import TowerError, first_line
from lamplit.towers.dinotxt_models import build_text as build_dinotxt
from lamplit.towers.open_clip_models import build_text
from lamplit.towers.texts.encoders import build_encoder
from lamplit.towers.texts.scratch import ScratchEncoder
from lamplit.towers.texts.static_texts import StaticEncoder

# What the code of timm and transformers raises if a setting is not of the kind that it was written for.
_BUILD_ERRORS = (
    TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError, MemoryError,
    StrictDataclassError,
)  # fmt: skip


def build_from(config: dict[str, Any]) -> nn.Module:
    """Build an encoder without its weights, from `TextTower.config`.

    Raises:
        TowerError: no encoder has these settings.
    """
    options = {key: value for key, value in config.items() if key != "library"}
    try:
        if config["library"] == "scratch":
            return ScratchEncoder(**options)
        if config["library"] == "open_clip":
            return build_text(options)
        if config["library"] == "static":
            return StaticEncoder(**options)
        if config["library"] == "dinotxt":
            return build_dinotxt(options)
        encoder: nn.Module = build_encoder(AutoConfig.for_model(**options["config"]))
    except _BUILD_ERRORS as error:
        raise TowerError(f"the text tower that config.json describes cannot be built: {first_line(error)}") from error
    return encoder
