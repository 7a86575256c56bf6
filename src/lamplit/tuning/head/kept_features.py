"""What an encoder says of a classifier's names, kept in the user's cache: else every run would read them anew.

A supervised image tower has some thousands of names and definitions, more than a small collection has captions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamplit._version import __version__
from lamplit.files import cache_folder, replacing
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.sides import token_features

MOST_KEPT = 8  # files, of some MB each; the oldest go


def features_file(tower: TextTower, tokens: Sequence[list[int]]) -> Path:
    """Return the file in the cache for the features of these texts, which depend on the encoder as it is now."""
    told = [torch.__version__, __version__, tower.device.type, weights_digest(tower.encoder), tower.pooling, *tokens]
    return cache_folder() / "features" / f"{blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()}.safetensors"


def read_or_encode(tower: TextTower, tokens: Sequence[list[int]], *, progress: bool = False) -> Tensor:
    """Return what `token_features` does, (M, feature width); read it where it was computed before.

    Args:
        tower: has not been tuned in this run, or the features would never be read again.
        tokens: token ids of M texts.
        progress: show a bar on stderr.
    """
    file = features_file(tower, tokens)
    with suppress(OSError, SafetensorError):  # there is none, or it is damaged
        return load_file(file)["features"].to(tower.device)
    features = token_features(tower, tokens, progress=progress)
    with suppress(OSError):  # a full disk, a cache that belongs to somebody else: the next run computes them again
        with replacing(file) as partial:
            save_file({"features": features.cpu()}, partial)
        kept = sorted(file.parent.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    return features
