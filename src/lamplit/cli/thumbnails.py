"""The hits of a search in a terminal, with a thumbnail of each image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from PIL import Image
from rich.console import Console

from lamplit.cli import tables
from lamplit.cli.terminal import erase_line
from lamplit.data.decoding.images import read_thumbnail
from lamplit.errors import ImageError
from lamplit.locations.paths import path_of
from lamplit.retrieval.searcher import Hit

_HEIGHT, _HEIGHT_IN_BLOCKS = 6, 10  # rows of cells; a cell is about twice as high as it is wide
_PIXELS = 512  # more than the cells have
_MAX_ASPECT = 3  # a longer image would have no cell in the other direction


def print_hits(hits: Sequence[Hit]) -> None:
    """Print hits as a table, each beside its thumbnail; an image that cannot be read has none.

    The terminal is asked how it shows images, so stdin and stdout must be one; textual-image must be installed.
    """
    logging.getLogger("textual_image").setLevel(
        logging.ERROR
    )  # it warns if a terminal does not tell the size of its cells
    from textual_image import renderable  # asks the terminal when it is first imported

    erase_line()
    images = [_thumbnail(hit, renderable.Image) for hit in hits]
    # In kitty's protocol the exact colour of a cell names its image, so colours must not be reduced.
    color_system: Any = "truecolor" if renderable.Image is renderable.TGPImage else "auto"
    console = Console(color_system=color_system, no_color=False)
    for table in tables.hits(hits, images):
        console.print(table)


def _thumbnail(hit: Hit, kind: Any) -> Any:
    try:
        image = _crop_middle(read_thumbnail(path_of(hit.path), _MAX_ASPECT * _PIXELS))
    except ImageError:
        return ""
    image.thumbnail((_PIXELS, _PIXELS))
    height = _HEIGHT_IN_BLOCKS if kind.__module__.endswith("halfcell") else _HEIGHT
    if image.width >= image.height:
        return kind(image, width=2 * height, height="auto")
    return kind(image, width="auto", height=height)


def _crop_middle(image: Image.Image) -> Image.Image:
    width, height = image.size
    kept_width, kept_height = min(width, _MAX_ASPECT * height), min(height, _MAX_ASPECT * width)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height))
