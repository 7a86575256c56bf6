"""The folder of a saved model: the names of its files, and what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError
from lamplit.towers.identity import TowerIdentity

FORMAT = 1
CONFIG = "config.json"
TEXT_TOWER = "text_tower.safetensors"
TEXT_GRAPH = "text_tower.onnx"
IMAGE_HEAD = "image_head.safetensors"
TOKENIZER = "tokenizer"


def read_config(folder: Path) -> dict[str, Any]:
    """Read the description of a saved model; its `image_tower` is a `TowerIdentity`.

    Raises:
        UsageError: there is none, it is damaged, or a newer lamplit wrote it.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UsageError(
            f"no model at {folder}: it has no config.json; expected a folder that lamplit tune wrote, or lit:NAME"
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        if config["format"] > FORMAT:
            raise UsageError(f"{file} has format {config['format']}; this lamplit reads up to {FORMAT}: upgrade it")
        return config | {"image_tower": TowerIdentity.from_dict(config["image_tower"])}
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{file} is not the config.json of a model that lamplit tune wrote") from error
