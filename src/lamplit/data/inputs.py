"""What callers give for images and texts: one or many, in several forms; a wrong one is refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from io import IOBase
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lamplit.data.decoding.images import convert_image, decode_image, name_of, open_bytes
from lamplit.errors import ImageError, UsageError, kind_of

ImageInput = str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor
_FORMS = "a path, encoded bytes, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)"


def list_images(images: ImageInput | Iterable[ImageInput]) -> tuple[list[ImageInput], bool]:
    """List the images, and tell whether one alone was given rather than several.

    Args:
        images: one image, several, or a batch: (N, H, W, 3) as an array, (N, 3, H, W) as a tensor.

    Raises:
        UsageError: it is neither, or one of several is no image; the message has its number.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # a column of paths
        listed: list[ImageInput] = images.ravel().tolist()  # type: ignore[assignment]
    elif isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        listed = list(images)
    elif isinstance(images, str | Path | bytes | Image.Image | np.ndarray | Tensor):
        return [images], True
    elif isinstance(images, Iterable) and not isinstance(images, Mapping | Set | IOBase | bytearray):
        listed = list(images)
    else:
        raise UsageError(f"images are {kind_of(images)}; expected {_FORMS}, or a list of these")
    for row, image in enumerate(listed):
        _require_image(image, f"image {row}")
    return listed, False


def decode_input(image: ImageInput) -> Tensor:
    """Turn one image into (3, H, W) uint8 RGB on the CPU.

    Raises:
        ImageError: the image is damaged, empty, too large, or not there.
        UsageError: it is no image at all, or has the wrong type of numbers or the wrong shape.
    """
    _require_image(image, "an image")
    if isinstance(image, Image.Image):
        return convert_image(image)
    if isinstance(image, str | Path | bytes):
        image = Path(image) if isinstance(image, str) else image
        return decode_image(open_bytes(image), name=name_of(image))
    if 0 in image.shape:
        raise ImageError("no pixels")
    if isinstance(image, Tensor):
        image = image.detach().permute(1, 2, 0).contiguous().cpu().numpy()
    return convert_image(Image.fromarray(image))


def decode_nth(images: list[ImageInput], row: int) -> Tensor:
    """Turn image `row` of a list into (3, H, W) uint8 RGB on the CPU; an error says which image it is.

    Raises:
        ImageError: the image is damaged, empty, too large, or not there.
        UsageError: it is no image at all, or has the wrong type of numbers or the wrong shape.
    """
    image = images[row]
    try:
        return decode_input(image)
    except ImageError as error:
        if len(images) == 1 and not isinstance(image, str | Path):  # it has no name, and there is no other
            raise
        number = f"image {row}" if len(images) > 1 else "the image"
        name = f" ({image})" if isinstance(image, str | Path) else ""
        raise ImageError(f"{number}{name}: {error}") from error


def list_texts(texts: str | Iterable[str]) -> tuple[list[str], bool]:
    """List the texts, and tell whether one alone was given: a str is one text, not a list of letters.

    Raises:
        UsageError: it is neither a str nor several.
    """
    if isinstance(texts, str):
        return [texts], True
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping | Set | bytes | bytearray | IOBase | Tensor):
        raise UsageError(f"texts are {kind_of(texts)}; expected a str, or a list of str")
    listed = list(texts)
    for row, text in enumerate(cast("list[object]", listed)):
        if not isinstance(text, str):
            found = "None" if text is None else f"{text!r:.50}, {kind_of(text)}"
            raise UsageError(f"text {row} is {found}; expected a str")
    return listed, False


def _require_image(image: object, name: str) -> None:
    """Raise if something is no image, or has the wrong type of numbers or the wrong shape."""
    if isinstance(image, np.ndarray):
        _require_pixels(f"{name} is an array", image.dtype, image.shape, channels=2, expected="(H, W, 3)")
    elif isinstance(image, Tensor):
        _require_pixels(f"{name} is a tensor", image.dtype, tuple(image.shape), channels=0, expected="(3, H, W)")
    elif not isinstance(image, str | Path | bytes | Image.Image):
        raise UsageError(f"{name} is {kind_of(image)}; expected {_FORMS}")


def _require_pixels(subject: str, dtype: object, shape: tuple[int, ...], *, channels: int, expected: str) -> None:
    name = str(dtype).removeprefix("torch.")
    if name != "uint8":
        raise UsageError(
            f"{subject} of {name}; expected uint8, from 0 to 255, as it is before it is scaled or normalised"
        )
    if len(shape) != 3 or shape[channels] != 3:
        raise UsageError(f"{subject} of shape {shape}; expected {expected}, or a list or batch of such")
