"""Values for others to read, without the folders of this machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_LIBRARIES = re.compile(r"(?:[a-z_]{2,}:)*")  # timm:, hf:, model:hf:


def reduce_paths(value: Any) -> Any:
    """Return JSON values in which every text that is a path, or a library and a path, has its last part alone.

    Names on a hub, which have one slash, and addresses stay as they are.

    Example:
        >>> reduce_paths({"text_tower": "hf:/home/ann/bert", "image_tower": "hf:google/vit"})
        {'text_tower': 'hf:bert', 'image_tower': 'hf:google/vit'}
    """
    if isinstance(value, dict):
        return {key: reduce_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [reduce_paths(each) for each in value]
    return _reduced(value) if isinstance(value, str) else value


def last_part(path: str) -> str:
    """Return the name of a file or folder, of this system or another."""
    return PureWindowsPath(path).name or path


def _reduced(text: str) -> str:
    if "://" in text:
        return text
    found = _LIBRARIES.match(text)
    library = found[0] if found else ""
    name = text[len(library) :]
    size, at, vocabulary = name.partition("@")
    if at and "/" not in size:  # scratch:small@FILE
        library, name = f"{library}{size}@", vocabulary
    return library + last_part(name) if _is_path(name) else text


def _is_path(name: str) -> bool:
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        return len(name) > 1
    slashes = name.count("/") + name.count("\\")
    return name.startswith(("~", "./", "../")) or slashes > 1 or (slashes == 1 and Path(name).exists())
