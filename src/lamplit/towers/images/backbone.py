"""What a library's opener returns: a backbone, its preprocessing, and the classifier it came with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from lamplit.data.decoding.preprocessing import Preprocessing

MAX_DIFFERENCE = 0.05  # of a library's prepared image from ours: mean over it, in units of its normalised pixels


@dataclass(frozen=True)
class ClassHead:
    """A supervised tower's own classifier: texts for each class, and its vector in the tower's space."""

    texts: list[list[str]]  # C lists, the usual name first
    vectors: Tensor  # (C, D)

    def distinct_texts(self) -> list[str]:
        """Return each text once, for several classes may have it."""
        return list(dict.fromkeys(text for texts in self.texts for text in texts))


@dataclass(frozen=True)
class Backbone:
    """An opened backbone; `config` says how to build it again without its weights."""

    module: nn.Module
    preprocessing: Preprocessing
    config: dict[str, Any]
    class_head: ClassHead | None = None


def class_texts(names: list[str], definition: str = "") -> list[str]:
    """Return texts for a class: its name, a caption, its synonyms, its definition."""
    texts = [names[0], f"A {names[0]}.", ", ".join(names), definition]
    return [text for text in dict.fromkeys(texts) if text]


def smooth_image() -> Image.Image:
    """Return an image to compare preprocessings on: a pixel's shift counts little, other colours or crops much."""
    small = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((320, 400), Image.Resampling.BICUBIC)
