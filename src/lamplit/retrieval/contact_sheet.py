"""Contact sheets: the images that queries found, or groups of duplicates, in one image file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lamplit.data.decoding.images import read_thumbnail
from lamplit.data.places.image_places import image_name
from lamplit.errors import ImageError, UsageError, kind_of
from lamplit.locations.paths import path_of
from lamplit.retrieval.picture_files import font_for, one_line, save_picture
from lamplit.retrieval.searcher import Hit
from lamplit.store.duplicates import DuplicateGroup

_CELL, _MARGIN, _TITLE, _CAPTION = 180, 10, 30, 40
_LONGEST = 200  # characters of a caption, of which some thirty have room


def contact_sheet(found: Mapping[str, Sequence[Hit]], out: str | Path) -> None:
    """Draw one row of images per query, best first, each with its score and first text.

    An image that cannot be read any more is a grey square. Letters that are not Latin need a font of the system.

    On the command line: `lamplit search --sheet`.

    Args:
        found: the hits of each query.
        out: the image file to write; its ending decides the format.

    Raises:
        UsageError: the hits are not by their query, or `out` ends in something else than .png, .jpg or .webp.

    Example:
        >>> searcher = lamplit.Searcher("runs/stamps", "stamps.lance")
        >>> found = {query: searcher.search(query, k=6) for query in ("a hat", "a horse")}
        >>> lamplit.contact_sheet(found, "found.png")
    """
    if not isinstance(found, Mapping):
        raise UsageError(f"a contact sheet takes hits by their query; these are {kind_of(found)}: give {{query: hits}}")
    columns = max([1, *map(len, found.values())])
    row_height = _TITLE + _CELL + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (columns * (_CELL + _MARGIN) + _MARGIN, len(found) * row_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, hits) in enumerate(found.items()):
        top, title = _MARGIN + row * row_height, one_line(query)
        draw.text((_MARGIN, top), title, fill="black", font=font_for(title, 18))
        for column, hit in enumerate(hits):
            left = _MARGIN + column * (_CELL + _MARGIN)
            _paste(sheet, hit, left, top + _TITLE)
            text = one_line(hit.texts[0][:_LONGEST]) if hit.texts else image_name(hit.path)
            font = font_for(text, 12)
            while draw.textlength(text, font) > _CELL and len(text) > 4:
                text = text[:-4] + "..."
            draw.text((left, top + _TITLE + _CELL + 2), f"{hit.score:.2f}", fill="dimgray", font=font)
            draw.text((left, top + _TITLE + _CELL + 16), text, fill="black", font=font)
    save_picture(sheet, out)


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
