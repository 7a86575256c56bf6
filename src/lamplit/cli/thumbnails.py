"""What a search found, in a terminal, with a thumbnail of each image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from lamplit.cli import tables
from lamplit.cli.terminal import erase_line
from lamplit.data.images import read_thumbnail
from lamplit.errors import ImageError
from lamplit.retrieval.searcher import Hit

_HEIGHT, _HEIGHT_IN_BLOCKS = 6, 10  # rows of cells; a cell is about twice as high as it is wide
_PIXELS = 512  # more than the cells have
_LONGEST = 3  # times as long as it is wide; what is longer would have no cell in the other direction


def print_hits(hits: Sequence[Hit]) -> None:
    """Print what was found as a table, each line beside a thumbnail; without one where the image cannot be read.

    The terminal is asked how it shows images; stdin and stdout must be one, and textual-image be installed.
    """
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it warns where a terminal does not say its cells' size
    from textual_image import renderable  # asks the terminal when it is first imported

    erase_line()
    images = [_thumbnail(hit, renderable.Image) for hit in hits]
    # In kitty's protocol the exact colour of cells names the image in them, however few colours text may have.
    color_system: Any = "truecolor" if renderable.Image is renderable.TGPImage else "auto"
    console = Console(color_system=color_system, no_color=False)
    for table in tables.hits(hits, images):
        console.print(table)


def _thumbnail(hit: Hit, kind: Any) -> Any:
    try:
        image = _middle(read_thumbnail(Path(hit.path), _LONGEST * _PIXELS))
    except ImageError:
        return ""
    image.thumbnail((_PIXELS, _PIXELS))
    height = _HEIGHT_IN_BLOCKS if kind.__module__.endswith("halfcell") else _HEIGHT
    if image.width >= image.height:
        return kind(image, width=2 * height, height="auto")
    return kind(image, width="auto", height=height)


def _middle(image: Image.Image) -> Image.Image:
    width, height = image.size
    kept_width, kept_height = min(width, _LONGEST * height), min(height, _LONGEST * width)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height))
