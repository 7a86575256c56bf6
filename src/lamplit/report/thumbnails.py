"""Small pictures inside a page, as data: URIs."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

from torchvision.transforms.v2.functional import to_pil_image

from lamplit.data.images import decode_image, open_bytes
from lamplit.errors import ImageError

SIDE = 88  # pixels of the longer side
MOST_PICTURES = 100  # of a page, at 2 to 4 KB each


def inline(folder: Path, name: str) -> str | None:
    """Make a small JPEG of the picture `name` of `folder`, as a data: URI; None if it is missing, broken or outside."""
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        return None
    try:
        picture = to_pil_image(decode_image(open_bytes(file)))
    except ImageError:
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=70, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def share(num_pairs: int) -> int:
    """How many examples of each confusion a page has room for, when it shows so many confusions."""
    return max(1, min(4, MOST_PICTURES // max(1, num_pairs)))
