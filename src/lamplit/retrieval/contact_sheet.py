"""Contact sheets: the images that queries found, or groups of duplicates, in one image file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lamplit.data.decoding.images import read_thumbnail
from lamplit.data.places.image_places import image_name
from lamplit.errors import ImageError
from lamplit.locations.paths import path_of
from lamplit.retrieval.searcher import Hit
from lamplit.store.duplicates import DuplicateGroup

_CELL, _MARGIN, _TITLE, _CAPTION = 180, 10, 30, 40


def contact_sheet(found: Mapping[str, Sequence[Hit]], out: str | Path) -> None:
    """Draw one row of images per query, best first, each with its score and first text.

    An image that cannot be read any more is a grey square.

    On the command line: `lamplit search --sheet`.

    Args:
        found: the hits of each query.
        out: the image file to write; its ending decides the format.

    Example:
        >>> searcher = lamplit.Searcher("runs/stamps", "stamps.lance")
        >>> found = {query: searcher.search(query, k=6) for query in ("a hat", "a horse")}
        >>> lamplit.contact_sheet(found, "found.png")
    """
    columns = max(1, *(len(hits) for hits in found.values()))
    row_height = _TITLE + _CELL + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (columns * (_CELL + _MARGIN) + _MARGIN, len(found) * row_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    title_font, font = ImageFont.load_default(18), ImageFont.load_default(12)
    for row, (query, hits) in enumerate(found.items()):
        top = _MARGIN + row * row_height
        draw.text((_MARGIN, top), query, fill="black", font=title_font)
        for column, hit in enumerate(hits):
            left = _MARGIN + column * (_CELL + _MARGIN)
            _paste(sheet, hit, left, top + _TITLE)
            text = hit.texts[0] if hit.texts else image_name(hit.path)
            while draw.textlength(text, font) > _CELL and len(text) > 4:
                text = text[:-4] + "..."
            draw.text((left, top + _TITLE + _CELL + 2), f"{hit.score:.2f}", fill="dimgray", font=font)
            draw.text((left, top + _TITLE + _CELL + 16), text, fill="black", font=font)
    sheet.save(out)


def duplicates_sheet(groups: Sequence[DuplicateGroup], out: str | Path) -> None:
    """Draw the first 50 groups of duplicates, up to 8 images of each; write no file if there are none."""
    found = {
        f"{number}: {len(group.images)} images": [
            Hit(image.cosine, image.id, image.path, [], {}) for image in group.images[:8]
        ]
        for number, group in enumerate(groups[:50], 1)
    }
    if found:
        contact_sheet(found, out)


def _paste(sheet: Image.Image, hit: Hit, left: int, top: int) -> None:
    try:
        image = read_thumbnail(path_of(hit.path), _CELL)
    except ImageError:
        ImageDraw.Draw(sheet).rectangle((left, top, left + _CELL, top + _CELL), fill="lightgray")
        return
    sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
