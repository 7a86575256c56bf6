"""From class names to prompts."""

from __future__ import annotations

from collections.abc import Sequence

from lamplit.errors import UsageError

DEFAULT_TEMPLATES = ("{}", "A {}.", "a photo of a {}.")
TEMPLATE_SETS = {"lamplit": DEFAULT_TEMPLATES, "name": ("{}",), "photo": ("A photo of a {}",)}


def fill(class_name: str, templates: Sequence[str]) -> list[str]:
    """Put a class name into every template.

    Raises:
        UsageError: a template has no `{}`.
    """
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"template {template!r} has no place for the class name; put {{}} there")
    return [template.replace("{}", class_name) for template in templates]
