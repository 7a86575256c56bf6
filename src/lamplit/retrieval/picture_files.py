"""Files of pictures that are drawn here: their formats, and the letters in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageFont

from lamplit.errors import UsageError
from lamplit.files import replacing

_ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Pillow's own font has letters up to here, and Pillow finds these in the folders of the system, most letters first.
_LATIN = 0x24F
_FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf")


def picture_format(out: str | Path) -> str:
    """Return the format of an image file that is to be written.

    Raises:
        UsageError: its name has another ending than .png, .jpg or .webp.
    """
    kind = _ENDINGS.get(Path(out).suffix.lower())
    if kind is None:
        raise UsageError(f"{out} cannot be written as a picture; expected a name that ends in .png, .jpg or .webp")
    return kind


def save_picture(picture: Image.Image, out: str | Path) -> None:
    """Write a picture whole or not at all, into a folder that is made if need be; raises as `picture_format` does."""
    kind = picture_format(out)
    with replacing(Path(out)) as partial:
        picture.save(partial, kind)


def one_line(text: str) -> str:
    """Turn line breaks and other spaces into single spaces: only one line is drawn."""
    return " ".join(text.split())


def font_for(texts: str, size: int) -> Any:
    """Return a font of so many pixels; one of the system if there are letters that Pillow's own font lacks."""
    if max(map(ord, texts), default=0) > _LATIN:
        for name in _FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:  # the system has no such font
                continue
    return ImageFont.load_default(size)
