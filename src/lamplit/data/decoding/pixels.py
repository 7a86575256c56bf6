"""From an image that Pillow has loaded to RGB pixels, some rows at a time: the peak is the two, and little more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

_ROWS_PIXELS = 2**20  # converted at once
_UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 RGB of a loaded image, upright, its transparent parts on white.

    Greys of more than 8 bits are scaled, not clipped. The image is of no use afterwards: its memory is given back
    before it is turned.
    """
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    is_wide_grey = image.mode.startswith("I") or image.mode == "F"
    low, high = _grey_range(image) if is_wide_grey else (0.0, 0.0)
    for top, rows in _rows(image):
        pixels[top : top + rows.height] = _grey(rows, low, high)[..., None] if is_wide_grey else _on_white(rows)
    turn = _UPRIGHT.get(_orientation(image))
    if turn is None:
        return pixels
    image.close()
    image.im = None  # type: ignore[assignment]  # an image that was not opened from a file keeps its pixels when closed
    return np.ascontiguousarray(turn(pixels))


def _rows(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    step = max(1, _ROWS_PIXELS // max(1, image.width))
    for top in range(0, image.height, step):
        yield top, image.crop((0, top, image.width, min(image.height, top + step)))


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except SyntaxError:  # damaged EXIF; the pixels are good, and viewers ignore it too
        return 1
    return orientation if isinstance(orientation, int) else 1


def _on_white(rows: Image.Image) -> NDArray[np.uint8]:
    if rows.has_transparency_data:
        rgba = rows.convert("RGBA")
        rows = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(rows.convert("RGB"))


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """Return what is black and what is white.

    32-bit and float greys do not say what white is: the least usual white that no pixel exceeds, or else the range of
    the pixels.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0.0, 65535.0
    low, high = 0.0, -np.inf
    for _, rows in _rows(image):
        values = np.asarray(rows)
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(float(values.min()), low), max(float(values.max()), high)
    if high == -np.inf:
        return 0.0, 1.0
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return low, next((white for white in whites if low == 0 and high <= white), high)


def _grey(rows: Image.Image, low: float, high: float) -> NDArray[np.uint8]:
    values = np.nan_to_num(np.asarray(rows, dtype=np.float64), posinf=high, neginf=low)
    grey = ((values - low) * (255 / ((high - low) or 1))).round().clip(0, 255).astype(np.uint8)
    if "transparency" in rows.info and rows.mode.startswith("I;16"):
        grey[values == rows.info["transparency"]] = 255
    return grey
