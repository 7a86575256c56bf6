"""Images for browsers: only those of the store, decoded within bounds and encoded again, never a file as it is."""

from __future__ import annotations

import io
from pathlib import Path

from torch import Tensor

from lamplit.data.decoding.images import decode_image, name_of, open_bytes, read_thumbnail

MAX_FILE = 200 * 2**20  # bytes


def as_jpeg(file: Path, side: int) -> bytes:
    """Read an image and encode it as a JPEG of at most `side` x `side` pixels, its transparent parts on white.

    Raises:
        ImageError: the file cannot be shown; the text is the reason.
    """
    encoded = io.BytesIO()
    read_thumbnail(file, side, MAX_FILE).save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def as_pixels(file: Path) -> Tensor:
    """Read an image to (3, H, W) uint8 RGB, upright, its transparent parts on white.

    Raises:
        ImageError: the file cannot be shown; the text is the reason.
    """
    return decode_image(open_bytes(file, MAX_FILE), name=name_of(file))
