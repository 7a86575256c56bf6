"""Files that stand beside an image and say something about it: .txt, .json and the like."""

from __future__ import annotations

import json
from pathlib import Path

from lamplit.data.columns import TEXT_COLUMNS, Cells, strip, text_cells

TEXT_ENDINGS = frozenset(("txt", "text", "caption", "title", "transcript", "cls", "id"))
# A larger .json beside an image is another kind of file: outlines of objects, or an image once more as text.
MAX_JSON_BYTES = 2**18


def last_ending(name: str) -> str:
    """Return what is behind the last dot of a name, in lower case; all of it if there is no dot.

    Example:
        >>> last_ending("input.JPG")
        'jpg'
    """
    return name.rpartition(".")[2].lower()


def sidecar_cells(ending: str, content: bytes) -> Cells:
    """Return what a sidecar holds, as cells by name.

    The object in a `.json` gives its own keys; another value in `captions.json` gives a cell `captions`. What is not
    JSON stays the text that it is.
    """
    if last_ending(ending) != "json":
        return {ending: content.decode("utf-8-sig", "replace")}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # one bad sidecar among a million ends nothing
        return {ending: content.decode("utf-8", "replace")}
    if isinstance(value, dict):
        return value
    return {ending.rpartition(".")[0] or ending: value}


def read_beside(image: Path) -> tuple[tuple[str, ...], Cells]:
    """Return the texts and the further cells that stand beside an image's file.

    Texts are the lines of the same-named `.txt`; without one, the first usual column of texts in the same-named
    `.json`. The rest of that object is metadata.
    """
    captions = image.with_suffix(".txt")
    texts = strip(captions.read_text("utf-8-sig", "replace").splitlines()) if captions.is_file() else ()
    table = image.with_suffix(".json")
    if not table.is_file() or table.stat().st_size > MAX_JSON_BYTES:
        return texts, {}
    cells = sidecar_cells("json", table.read_bytes())
    if not captions.is_file() and (column := next((name for name in TEXT_COLUMNS if _is_text(cells.get(name))), None)):
        return text_cells({column: cells.pop(column)}, (column,)), cells
    return texts, cells


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
