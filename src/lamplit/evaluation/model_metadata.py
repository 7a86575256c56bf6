"""Which model a result is of: its name, its towers, and fingerprints that tell it from others of the same name."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from lamplit.errors import TowerError
from lamplit.model import LiT
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.text_tower import TextTower


def model_metadata(model: LiT, text: str | None = None) -> dict[str, str]:
    """Describe a model for its results: names and fingerprints of the model and of its towers.

    `text` is the fingerprint of its text tower, if that is known.
    """
    return {
        "name": model.name,
        "fingerprint": model_fingerprint(model, text),
        "image_tower": model.identity.spec,
        "image_tower_fingerprint": model.identity.fingerprint,
        "text_tower": "none" if model.text_tower is None else model.text_tower.spec,
    }


def model_fingerprint(model: LiT, text: str | None = None) -> str:
    """Return 32 hexadecimal digits that cover all that a score depends on: both towers, image head and scale.

    `text` is the fingerprint of the text tower, if that is known.
    """
    if text is None:
        text = "none" if model.text_tower is None else text_fingerprint(model.text_tower)
    bias = None if model.logit_bias is None else float(model.logit_bias.detach())
    content = [model.space, text, float(model.log_scale.detach()), bias]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def text_fingerprint(tower: TextTower) -> str:
    """Return 32 hexadecimal digits that cover all that a text's vector depends on.

    These are weights, architecture, pooling, context length and the files of the tokenizer.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(weights_digest(tower).encode())
    digest.update(json.dumps(tower.describe(), sort_keys=True, default=str).encode())
    with tempfile.TemporaryDirectory() as folder:
        tower.save_tokenizer(Path(folder))
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def require_text_tower(model: LiT) -> TextTower:
    """Return the model's text tower.

    Raises:
        TowerError: the model is open without it.
    """
    if model.text_tower is None:
        raise TowerError("this model is open without its text tower; load it with towers='both'")
    return model.text_tower
