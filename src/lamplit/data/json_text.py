"""JSON that anybody may have written."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 100  # lists and objects inside each other; what walks through a value calls itself for each


def parse_json(text: str | bytes) -> Any:
    """Return the value that a text of JSON stands for.

    Raises:
        ValueError: it is not JSON, or more than 100 of its lists and objects lie inside each other.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    opening = sum(map(text.count, "[{")) if isinstance(text, str) else sum(map(text.count, (b"[", b"{")))
    if opening > DEEPEST:
        _refuse_deep(value)
    return value


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inside for item in items if isinstance(item, list | dict)]
    if level:
        raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"more than {DEEPEST} lists and objects lie inside each other")
