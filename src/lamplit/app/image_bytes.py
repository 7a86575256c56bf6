"""Images for browsers: only those of the store, decoded within bounds and encoded again, never a file as it is."""

from __future__ import annotations

import io
import stat
from pathlib import Path

from torch import Tensor

from lamplit.data.images import decode_image, open_bytes, read_thumbnail
from lamplit.errors import ImageError

MAX_FILE = 200 * 2**20  # bytes


def as_jpeg(file: Path, side: int) -> bytes:
    """Read an image and encode it as a JPEG of at most `side` x `side` pixels, its transparent parts on white.

    Raises:
        ImageError: the file cannot be shown; the text is the reason.
    """
    _require_file(file)
    encoded = io.BytesIO()
    read_thumbnail(file, side).save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def as_pixels(file: Path) -> Tensor:
    """Read an image to (3, H, W) uint8 RGB, upright, its transparent parts on white.

    Raises:
        ImageError: the file cannot be shown; the text is the reason.
    """
    _require_file(file)
    return decode_image(open_bytes(file), name=file.name)


def _require_file(file: Path) -> None:
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise ImageError("file not found") from error
    if not stat.S_ISREG(status.st_mode):  # a device or a pipe would never end
        raise ImageError("not a file")
    if status.st_size > MAX_FILE:
        raise ImageError(f"{status.st_size / 2**20:.0f} MB, more than the bound of {MAX_FILE // 2**20}")
