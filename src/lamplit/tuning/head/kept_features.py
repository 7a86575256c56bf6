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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamplit._version import __version__
from lamplit.files import cache_folder, replacing
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.sides import token_features

MOST_KEPT = 8  # files, of some MB each; the oldest go
_NAME, _DIGEST = "features", "blake2b"


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
    if (kept := _read(file)) is not None:
        return kept.to(tower.device)
    features = token_features(tower, tokens, progress=progress)
    with suppress(OSError):  # a full disk, a cache that belongs to somebody else: the next run computes them again
        with replacing(file) as partial:
            save_file({_NAME: features.cpu()}, partial, {_DIGEST: _digest(features)})
        files = sorted(file.parent.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)
        for old in files[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    return features


def _read(file: Path) -> Tensor | None:
    """Read features; None if there are none, or they are not what was written."""
    with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
        features: Tensor = opened.get_tensor(_NAME)
        if (opened.metadata() or {}).get(_DIGEST) == _digest(features):
            return features
    return None


def _digest(features: Tensor) -> str:
    return blake2b(features.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
