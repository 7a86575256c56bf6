"""The classes that the page begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES


@dataclass(frozen=True)
class ClassChoice:
    """Classes, their prompts, and how near an image must be to one of them."""

    names: Sequence[str]
    templates: Sequence[str] = DEFAULT_TEMPLATES
    threshold: float | None = None  # best cosine under which an image is none of these classes, where calibrated
