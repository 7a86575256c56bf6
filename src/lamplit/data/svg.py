"""SVG drawings, drawn by resvg (the extra `svg`)."""

from __future__ import annotations

import io

from PIL import Image

from lamplit.errors import ImageError, first_line, require

_SHORT = 2000  # bytes of a PNG; one that is longer has more than one colour


def draw_svg(svg: str, **options: int) -> bytes:
    """Draw a trusted SVG on white; return a PNG.

    Raises:
        MissingExtraError: the renderer is not installed.
        ImageError: the SVG cannot be drawn.
    """
    resvg_py = require("resvg_py", "svg")
    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True, **options))
    except ValueError as error:
        raise ImageError(f"SVG cannot be drawn ({first_line(error)})") from error


def is_blank(image: bytes) -> bool:
    """Tell whether a small PNG has one colour."""
    if len(image) > _SHORT:
        return False
    with Image.open(io.BytesIO(image)) as opened:
        return all(low == high for low, high in opened.convert("RGB").getextrema())
