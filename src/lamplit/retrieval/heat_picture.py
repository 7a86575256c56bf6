"""A heat map over its picture: where the map lies, and how it is drawn. Nothing here knows of models."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Window = tuple[float, float, float, float]  # left, top, right, bottom
PALE = 0.5  # of the highest value: below that no colour is drawn, or there is some nearly everywhere
_HOT = np.array([255, 140, 26], np.float32) / 255  # what white becomes where the words are read most
_PAPER = 224  # the grey that other parts fade to
_FADED = 0.6  # how far
_HATCH, _HATCH_WIDTH, _HATCH_SHADE = 12, 2, 0.8  # the lines on what the tower did not see: distance, width, shade


def spread(values: NDArray[np.float32], window: Window, size: tuple[int, int]) -> NDArray[np.float32]:
    """Stretch a map over the part of a picture that it lies on, linearly between the middles of its places.

    Args:
        values: (h, w); the first is at the top left.
        window: left, top, right and bottom of that part, in pixels of the picture.
        size: width and height of the picture.

    Returns:
        (H, W): NaN where the map is not.
    """
    left, top, right, bottom = window
    height, width = values.shape
    rows, are_rows_in = _places(top, bottom, size[1], height)
    columns, are_columns_in = _places(left, right, size[0], width)
    tall = np.stack([np.interp(rows, np.arange(height), column) for column in values.T], axis=1)
    whole = np.stack([np.interp(columns, np.arange(width), row) for row in tall])
    whole[~are_rows_in] = np.nan
    whole[:, ~are_columns_in] = np.nan
    return whole.astype(np.float32)


def _places(start: float, end: float, length: int, num_places: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return between which places the middle of each pixel lies, and whether it lies on the map at all."""
    along = (np.arange(length) + 0.5 - start) / (end - start)
    return along * num_places - 0.5, (along >= 0) & (along <= 1)


def draw_heat(picture: Image.Image, values: NDArray[np.float32], window: Window) -> Image.Image:
    """Draw a map over an RGB picture: orange where it is highest, pale below `PALE` of that, hatched where it is not.

    Args:
        picture: the upright picture.
        values: (h, w) map.
        window: the part of the picture that the map lies on, in its pixels.
    """
    heat = spread(values, window, picture.size)
    unseen = np.isnan(heat)
    peak = float(values.max())
    part = np.nan_to_num(heat / peak) if peak > 0 else np.zeros_like(heat)
    strength = ((part - PALE) / (1 - PALE)).clip(0, 1)[..., None]
    pixels = np.asarray(picture, np.float32)
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    pale = grey + (_PAPER - grey) * _FADED
    drawn = pale + (pixels * _HOT - pale) * strength
    lines = np.add.outer(np.arange(picture.height), np.arange(picture.width)) % _HATCH < _HATCH_WIDTH
    drawn[unseen & lines] *= _HATCH_SHADE
    return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))
