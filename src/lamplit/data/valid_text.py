"""Text that any other program can read: what is not valid Unicode is replaced."""

from __future__ import annotations

import os
import re
from typing import Any

# Half of a character of two UTF-16 units, as scraped JSON has it and as Python reads names that are not UTF-8.
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")  # as `valid_id` writes a byte that is not UTF-8


def valid_text(text: str) -> str:
    r"""Return a text with U+FFFD in place of each lone surrogate.

    Example:
        >>> valid_text("half \ud83d")
        'half �'
    """
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def valid_id(name: str) -> str:
    r"""Return a name with a backslash form in place of each byte that is not UTF-8, so that names stay distinct.

    Example:
        >>> valid_id("a\udcff1.png")
        'a\\xff1.png'
    """
    if name.isascii() or not _SURROGATE.search(name):
        return name
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def file_named(name: str) -> str:
    r"""Return the name of a file that `valid_id` named: the name itself, if there is such a file.

    Example:
        >>> file_named("a\\xff1.png")
        'a\udcff1.png'
    """
    if "\\x" not in name or os.name == "nt" or os.path.lexists(name):
        return name
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), os.fsencode(name)))


def valid_value(value: Any) -> Any:
    """Return a value that JSON can hold, its texts and the names in it made valid."""
    match value:
        case str():
            return valid_text(value)
        case list() | tuple():
            return [valid_value(item) for item in value]
        case dict():
            return {valid_text(name): valid_value(item) for name, item in value.items()}
    return value
