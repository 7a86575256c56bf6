"""Prompts: templates with class names filled in."""

from __future__ import annotations

import string
from collections.abc import Sequence

from lamplit.errors import UsageError

DEFAULT_TEMPLATES = ("{}", "A {}.", "a photo of a {}.")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def fill(class_name: str, templates: Sequence[str]) -> list[str]:
    """Put a class name into every template.

    Raises:
        UsageError: a template has no `{}`.
    """
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"template {template!r} has no place for the class name; put {{}} there")
    return [template.replace("{}", class_name) for template in templates]


def canonicalize(text: str, keep: str = "{}") -> str:
    """Write a text as big_vision's evaluators do: `_` is a space, no ASCII punctuation, lower case, single spaces.

    Args:
        text: a template, or a class name.
        keep: punctuation that stays: `{}` in templates, `,` in class names.

    Source: big_vision, evaluators/proj/image_text/prompt_engineering.py.
    """
    parts = text.replace("_", " ").split(keep)
    return " ".join(keep.join(part.translate(_NO_PUNCTUATION) for part in parts).lower().split())
