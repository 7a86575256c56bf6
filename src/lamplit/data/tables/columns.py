"""Which columns of a table hold the image, the texts and the rest, and what their cells mean."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lamplit.data.json_text import parse_json
from lamplit.errors import PairsError, UsageError, kind_of, nearest_names

# Looked for in this order, whatever their case.
IMAGE_COLUMNS = (
    "image", "images", "img", "jpg", "jpeg", "png", "webp",
    "file_name", "filename", "filepath", "file_path", "path", "image_path", "img_path", "image_name",
)  # fmt: skip
TEXT_COLUMNS = (
    "text", "texts", "caption", "captions", "title", "description",
    "sentence", "sentences", "alt", "txt", "comment", "raw", "conversations", "messages",
)  # fmt: skip
# What holds the text of an object in a cell of texts: Karpathy's sentences, and translations.
_TEXT_KEYS = ("raw", "caption", "text", "sentence", "value")
# Who says what describes the image, in LLaVA's conversations and in those of other chat models.
_ANSWERING = ("gpt", "assistant", "model")
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LIST_OF_QUOTED = re.compile(rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED}|\s+{_QUOTED})*\s*,?\s*\]", re.DOTALL)

Cells = dict[str, Any]


class CellError(PairsError):
    """A cell holds what its column cannot; the text also says what to do if the column is the wrong one.

    Attributes:
        reason: what the cell holds and what was expected.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True)
class ColumnNames:
    """The columns that a caller names; those that are None are found by their usual names."""

    image: str | None = None
    text: str | None = None  # or several, with commas between
    need_images: bool = True  # else a table without a column of images will do


def find_image_column(source: str, rows: list[Cells], wanted: str | None, *, optional: bool = False) -> str:
    """Return the column of images, given the first rows of a table; "" if it is optional and there is none.

    Raises:
        PairsError: there are no rows, or no column has a known name.
        UsageError: the wanted column does not exist.
    """
    if not rows:
        raise PairsError(f"{source} has no rows; expected one image a row, and its texts")
    if wanted:
        return _named(source, wanted, rows, "--image-column")
    if (found := _first(IMAGE_COLUMNS, rows)) or optional:
        return found or ""
    hint = " (web addresses: download them first, for example with img2dataset)"
    raise PairsError(
        f"{source} has no column named {', '.join(IMAGE_COLUMNS)}; it has {listed(rows)}"
        f"{hint if _first(('url', 'image_url'), rows) else ''}; name it with --image-column NAME of lamplit embed"
    )


def find_text_columns(
    source: str, rows: list[Cells], wanted: str | None, candidates: Sequence[str] = TEXT_COLUMNS
) -> tuple[str, ...]:
    """Return the columns of texts: the wanted ones (commas between), else the first candidate that exists, if any.

    A candidate of which some cell is filled comes before one that is empty in all rows.
    """
    if wanted:
        names = [wanted] if any(wanted in row for row in rows) else wanted.split(",")
        return tuple(_named(source, name.strip(), rows, "--text-column") for name in names)
    of_text = [{column: cell for column, cell in row.items() if not _is_content(cell)} for row in rows]
    filled = [{column: cell for column, cell in row.items() if not _is_empty(cell)} for row in of_text]
    found = _first(candidates, filled) or _first(candidates, of_text)
    return (found,) if found else ()


def listed(rows: list[Cells], wanted: str = "") -> str:
    """Name the columns of some rows, for an error; those that look like the wanted one come first."""
    return nearest_names(wanted, dict.fromkeys(column for row in rows for column in row)) or "no columns"


def image_cell(value: Any, column: str) -> str | bytes:
    """Return a cell's image: its path, or its bytes; an empty cell is an empty image, skipped later."""
    if isinstance(value, list) and len(value) <= 1:
        value = value[0] if value else None
    if _is_media(value):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return b""
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise CellError(
            f"column {column} holds web addresses ({value[:60]})",
            "download the images first, for example with img2dataset, and give the folder of tars that it writes",
        )
    if isinstance(value, str | bytes):
        return value
    raise CellError(
        f"column {column} holds {kind_of(value)}; expected a path or the bytes of one image",
        "name another column with --image-column NAME",
    )


def text_cells(row: Cells, columns: Sequence[str]) -> tuple[str, ...]:
    """Return every text of the named columns, stripped, blank ones dropped."""
    return strip([text for column in columns for text in _texts(row.get(column), column)])


def strip(texts: Iterable[str]) -> tuple[str, ...]:
    """Strip texts and drop the blank ones."""
    return tuple(filter(None, map(str.strip, texts)))


def metadata_cells(row: Cells, taken: Sequence[str]) -> Cells:
    """Return the columns that are neither image nor text, as values that JSON can hold.

    Bytes are left out: they are other media, and too large to store with every vector.
    """
    return {column: _plain(value) for column, value in row.items() if column not in taken and not _is_content(value)}


def _named(source: str, wanted: str, rows: list[Cells], option: str) -> str:
    present = {column for row in rows for column in row}
    alike = [wanted] if wanted in present else [c for c in present if c.casefold() == wanted.casefold()]
    if len(alike) != 1:
        raise UsageError(f"{source} has no column {wanted!r}; it has {listed(rows, wanted)}; type {option} NAME")
    return alike[0]


def _first(candidates: Sequence[str], rows: list[Cells]) -> str | None:
    present = {column.casefold(): column for row in rows for column in row}
    return next((present[candidate] for candidate in candidates if candidate in present), None)


def _texts(value: Any, column: str) -> list[str]:
    match value:
        case None:
            return []
        case str():
            return _texts_in(value, column)
        case list() if any(isinstance(item, dict) and ("from" in item or "role" in item) for item in value):
            return [text for item in value if _answers(item) for text in _said(item, column)]
        case list():
            return [text for item in value for text in _texts(item, column)]
        case dict() if key := next((key for key in _TEXT_KEYS if key in value), None):
            return _texts(value[key], column)
        case dict() if value and all(isinstance(item, str | list | None) for item in value.values()):
            return [text for item in value.values() for text in _texts(item, column)]  # in several languages
        case int() | float():
            return [str(value)] if math.isfinite(value) else []
    raise CellError(
        f"column {column} holds {kind_of(value)}; expected a text or a list of texts",
        "name another column with --text-column NAME",
    )


def _texts_in(cell: str, column: str) -> list[str]:
    """Return the texts of a cell: those in a list as JSON, Python or numpy writes it, none of an empty one."""
    written = cell.strip()
    if not (written.startswith("[") and written.endswith("]")):
        return [cell]
    try:
        items = parse_json(written)
    except ValueError:
        items = None
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return items
    if isinstance(items, list) and all(isinstance(item, dict) and item.keys() & {*_TEXT_KEYS} for item in items):
        return _texts(items, column)
    if not _LIST_OF_QUOTED.fullmatch(written):
        return [cell]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd backslashes
        try:
            return [ast.literal_eval(text) for text in re.findall(_QUOTED, written, re.DOTALL)]
        except (ValueError, SyntaxError):
            return [cell]


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _answers(item: Any) -> bool:
    return isinstance(item, dict) and item.get("from", item.get("role")) in _ANSWERING


def _said(item: Cells, column: str) -> list[str]:
    said = item.get("value", item.get("content"))
    parts = said if isinstance(said, list) else [said]
    return [
        text
        for part in parts
        if not (isinstance(part, dict) and part.get("type") != "text")
        for text in _texts(part, column)
    ]


def _is_content(value: Any) -> bool:
    return isinstance(value, bytes) or _is_media(value)


def _is_media(value: Any) -> bool:
    # As `datasets` stores images and sounds that it does not decode.
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(name): _plain(item) for name, item in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
