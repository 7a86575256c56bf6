"""JSON that is one document: lists of rows, COCO's and Karpathy's captions, and captions by file name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lamplit.data.json_text import parse_json
from lamplit.data.skipped import BadRows
from lamplit.data.tables.columns import Cells
from lamplit.data.tables.encodings import Encoding, open_text
from lamplit.data.tables.splits import choose_split, refuse_split
from lamplit.errors import kind_of

_EXPECTED = (
    "expected a list of rows, one row a line, COCO's images and annotations, Karpathy's images with sentences, "
    "or captions by file name"
)


@dataclass(frozen=True)
class Annotations:
    """The rows of one document.

    Attributes:
        notes: what a reader should know of it, in plain sentences.
        rows: reads the document again; it is not held.
    """

    notes: tuple[str, ...]
    rows: Callable[[], list[Cells]]


def read_annotations(file: Path, encoding: Encoding, split: str | None, bad: BadRows) -> Annotations | None:
    """Read a file of JSON that is one document; None if it has one row a line.

    Args:
        file: where it is.
        encoding: how its text is encoded.
        split: which split is wanted of those that its images name; `all` for every image; by default `train`.
        bad: where to list what is no row in a list of rows.

    Raises:
        ValueError: it is no JSON, or holds nothing of a known kind.
        UsageError: it has no such split.
    """
    if _has_lines(file, encoding):
        return None
    notes = [encoding.note] if encoding.note else []
    rows = _rows(_load(file, encoding), file, bad)
    chosen: set[str] | None = None
    splits = Counter(row["split"] for row in rows if isinstance(row.get("split"), str) and "sentences" in row)
    if splits:
        chosen, note = choose_split(file.name, splits, split)
        notes += [note] if note else []
    else:
        refuse_split(file.name, split)

    def read() -> list[Cells]:
        rows = _rows(_load(file, encoding), file, bad)
        return rows if chosen is None else [row for row in rows if row.get("split") in chosen]

    return Annotations(tuple(notes), read)


def _has_lines(file: Path, encoding: Encoding) -> bool:
    with open_text(file, encoding) as lines:
        filled = (line for line in lines if line.strip())
        first = next(filled, "")
        if not first.lstrip().startswith("{") or next(filled, None) is None:
            return not first
    try:
        parse_json(first)
    except ValueError:
        return False
    return True


def _load(file: Path, encoding: Encoding) -> Any:
    with open_text(file, encoding) as opened:
        try:
            return parse_json(opened.read())
        except ValueError as error:
            raise ValueError(f"it is not JSON ({error})") from error


def _rows(document: Any, file: Path, bad: BadRows) -> list[Cells]:
    if isinstance(document, list):
        rows = [row for row in document if isinstance(row, dict)]
        if document and not rows:
            raise ValueError(f"row 1 is {kind_of(document[0])}; expected an object of columns")
        if len(rows) < len(document):
            for number, row in enumerate(document, start=1):
                if not isinstance(row, dict):
                    bad.add(number, f"this is {kind_of(row)}; expected an object of columns", unit="row")
        return rows
    if not isinstance(document, dict):
        raise ValueError(f"it holds {kind_of(document)}; {_EXPECTED}")
    if _is_objects(document.get("images")) and _is_objects(document.get("annotations")):
        return _coco_rows(document["images"], document["annotations"], file)
    lists = [value for value in document.values() if _is_objects(value)]
    if len(lists) == 1:  # Karpathy's images, and tables under one name such as `data`
        return [_with_folder(row) for row in lists[0]]
    if document and all(isinstance(value, str | list) and PurePath(name).suffix for name, value in document.items()):
        return [{"file_name": name, "captions": value} for name, value in document.items()]
    if any(isinstance(value, dict | list) for value in document.values()) and "image" not in document:
        raise ValueError(f"it is an object of {', '.join(list(document)[:10])}; {_EXPECTED}")
    return [document]  # one row alone


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _coco_rows(images: list[Cells], annotations: list[Cells], file: Path) -> list[Cells]:
    captions: dict[Any, list[Any]] = {}
    for annotation in annotations:
        if "caption" in annotation:
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    if not captions:
        raise ValueError(f"its annotations have no captions; give captions_{file.stem.rpartition('_')[2]}.json instead")
    return [image | {"captions": captions.get(image.get("id"), [])} for image in images]


def _with_folder(row: Cells) -> Cells:
    """Put the folder of Karpathy's COCO before the name of the file."""
    folder, name = row.get("filepath"), row.get("filename")
    if isinstance(folder, str) and isinstance(name, str) and not PurePath(folder).suffix:
        return row | {"filename": f"{folder}/{name}"}
    return row
