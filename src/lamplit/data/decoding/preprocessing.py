"""How a tower wants its images: size, crop, interpolation, mean and standard deviation.

The values always come from the tower's own library. Images stay `uint8` until they are on the tower's
device, so that what travels between processes is four times smaller.

A search reads this as a part of a store's metadata, and needs no image. Importing torch and torchvision takes seconds,
so only the functions that need them import them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from lamplit.data.fields import Fields

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# What a file may ask for; a damaged one could ask for any amount of memory.
MAX_SIDE = 2**14
_REACH = 3  # of the widest filter, Lanczos, in pixels of the smaller of two images
_LONGEST = 8  # times as long as high; of a longer image only the middle is scaled
MIN_CROP_FRACTION = 0.01
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_CHOICES = {
    "interpolation": INTERPOLATIONS,
    "fit": ("crop", "squash"),
    "center": ("round", "floor"),
}


@dataclass(frozen=True)
class Preprocessing:
    """Turns an image into a tower's input.

    `fit="crop"` scales the short side to `image_size / crop_fraction` and takes the centre;
    `fit="squash"` scales both sides to it, whatever the aspect ratio.
    `antialias=False` samples the image at single points, bilinearly, and cuts off the fractions, as the LiT authors'
    own pipeline does (TensorFlow's `resize` and a cast); every other tower's library averages over areas and rounds.
    `border` pixels are cut off on every side before anything else.
    `center` says where the odd pixel of an uneven margin goes: torchvision and timm round half the margin (to even),
    transformers rounds it down.

    Attributes:
        image_size: height and width in pixels.
        mean: subtracted from each channel, whose values are 0 to 1.
        std: what each channel is then divided by.
        interpolation: how an image is scaled.
        crop_fraction: side of the centre that is taken, as a fraction of the short side.
        fit: crop or squash.
        antialias: whether areas are averaged over.
        center: where the odd pixel of an uneven margin goes.
        border: pixels that are cut off on every side first.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_fraction: float = 1.0
    fit: Literal["crop", "squash"] = "crop"
    antialias: bool = True
    center: Literal["round", "floor"] = "round"
    border: int = 0

    def resize(self, image: Tensor) -> Tensor:
        """Scale and crop one image: (3, H, W) uint8 in, (3, height, width) uint8 out."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as TF

        height, width = image.shape[-2:]
        if self.border and min(height, width) > 2 * self.border:
            image = image[:, self.border : height - self.border, self.border : width - self.border]
        size = self._target_size(image.shape[-2], image.shape[-1])
        if max(size) > _LONGEST * min(size) and self.fit == "crop":
            return self._resize_middle(image, *size)
        # Lanczos exists in PIL only; bicubic is its nearest neighbour on tensors.
        mode = "bicubic" if self.interpolation == "lanczos" else self.interpolation
        if tuple(image.shape[-2:]) != size and self.antialias:
            image = TF.resize(image, list(size), InterpolationMode(mode), antialias=True)
        elif tuple(image.shape[-2:]) != size:
            image = _sample(image, *size)
        cropped: Tensor = self._crop(image, image.shape[-2], image.shape[-1])
        return cropped

    def window(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return which part of an image of `height` x `width` pixels `resize` keeps: left, top, right and bottom.

        They are pixels from the outer edge of the first one, so the whole image is (0, 0, width, height).
        """
        border = self.border if min(height, width) > 2 * self.border else 0
        inner = height - 2 * border, width - 2 * border
        target = self._target_size(*inner)
        margins = target[0] - self.image_size[0], target[1] - self.image_size[1]
        starts = [margin // 2 if self.center == "floor" else round(margin / 2) for margin in margins]
        scales = inner[0] / target[0], inner[1] / target[1]
        top, left = (border + start * scale for start, scale in zip(starts, scales, strict=True))
        bottom, right = top + self.image_size[0] * scales[0], left + self.image_size[1] * scales[1]
        return left, top, right, bottom

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise (B, 3, height, width) uint8 images by mean and standard deviation; return float32."""
        import torch

        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1) * 255
        return (images.float() - mean) / std

    def reference(self, image: Image.Image) -> Tensor:
        """Prepare one RGB image slowly, with PIL as the towers' own libraries do: (3, height, width) float32.

        `resize` is compared with it.
        """
        import torch
        from PIL import ImageOps
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import v2 as transforms
        from torchvision.transforms.v2 import functional as TF

        if self.border and min(image.size) > 2 * self.border:
            image = ImageOps.crop(image, self.border)
        size = self._target_size(image.height, image.width)
        image = TF.resize(image, list(size), InterpolationMode(self.interpolation))
        image = self._crop(image, image.height, image.width)
        pixels = transforms.Compose([transforms.PILToTensor(), transforms.ToDtype(torch.float32, scale=True)])
        normalized: Tensor = TF.normalize(pixels(image), list(self.mean), list(self.std))
        return normalized

    def _crop(self, image: Any, height: int, width: int) -> Any:
        from torchvision.transforms.v2 import functional as TF

        crop_height, crop_width = self.image_size
        if self.center == "round":
            return TF.center_crop(image, [crop_height, crop_width])
        return TF.crop(image, (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)

    def _resize_middle(self, image: Tensor, height: int, width: int) -> Tensor:
        """Scale to height and width and crop, by computing no more than the crop.

        A line of 1 x 30,000 pixels, scaled whole, would be 224 x 6,720,000. PIL scales what lies in a box of fractions
        of pixels, so that every pixel is what it would be in the whole.
        """
        import numpy as np
        import torch
        from PIL import Image

        crop_height, crop_width = self.image_size
        margins = height - crop_height, width - crop_width
        top, left = (margin // 2 if self.center == "floor" else round(margin / 2) for margin in margins)
        if not self.antialias:
            return _sample(image, height, width, (slice(top, top + crop_height), slice(left, left + crop_width)))
        rows, box_rows = _part(image.shape[-2], height, top, crop_height)
        columns, box_columns = _part(image.shape[-1], width, left, crop_width)
        part = Image.fromarray(image[:, rows, columns].permute(1, 2, 0).contiguous().numpy())
        box = box_columns[0], box_rows[0], box_columns[1], box_rows[1]
        resampling = Image.Resampling[self.interpolation.upper()]
        middle = np.array(part.resize((crop_width, crop_height), resampling, box))
        return torch.from_numpy(middle).permute(2, 0, 1).contiguous()

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        # As torchvision and timm: the short side is exact, the long side rounded down; a target that is not
        # square is filled by the larger of the two scales.
        # The bit more is for 224 / (224 / 400), which is 399.99... in floats.
        target_height, target_width = (int(side / self.crop_fraction + 1e-9) for side in self.image_size)
        if self.fit == "squash":
            return target_height, target_width
        if target_height == target_width:
            if height <= width:
                return target_height, int(target_height * width / height)
            return int(target_width * height / width), target_width
        scale = max(target_height / height, target_width / width)
        return round(height * scale), round(width * scale)

    def in_words(self) -> str:
        """Return a line of text, to be printed with every result."""
        height, width = self.image_size
        target_height, target_width = self._target_size(height, width)
        how = f"{self.interpolation}{'' if self.antialias else ' at single points'}"
        framed = f"{self.border} pixels cut off every side, then " if self.border else ""
        if self.fit == "squash":
            sizes = f"{target_width} x {target_height}, whatever the aspect ratio"
        else:
            sizes = f"a short side of {min(target_height, target_width)}"
        cropped = f", centre of {width} x {height}" if self.fit == "crop" or self.crop_fraction < 1 else ""
        return f"{framed}resized to {sizes} ({how}){cropped}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; newer fields only if they are not at their defaults (fingerprints stay)."""
        later = {"antialias": True, "center": "round", "border": 0}
        return {key: value for key, value in asdict(self).items() if key not in later or value != later[key]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo `to_dict` after a trip through JSON, which turns tuples into lists.

        Raises:
            FieldError: a value is missing, unknown, or cannot be meant; the text names its key.
        """
        return cls.from_fields(Fields(values))

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Do what `from_dict` does with an object inside a file; errors name the whole key."""
        fields.require_known([field.name for field in dataclasses.fields(cls)])
        read = dict(fields.values)
        height, width = read["image_size"] = tuple(fields.numbers("image_size", 2))
        if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in (height, width)):
            raise fields.error("image_size", f"height and width in whole pixels, 1 to {MAX_SIDE}")
        read["mean"], read["std"] = tuple(fields.numbers("mean", 3)), tuple(fields.numbers("std", 3))
        if not all(read["std"]):
            raise fields.error("std", "three numbers other than 0")
        for key in ("interpolation", "fit", "center"):
            if key in read:
                fields.choice(key, _CHOICES[key])
        if "crop_fraction" in read and not MIN_CROP_FRACTION <= fields.number("crop_fraction") <= 1:
            raise fields.error("crop_fraction", f"a number from {MIN_CROP_FRACTION} to 1")
        if "antialias" in read:
            fields.flag("antialias")
        if "border" in read:
            fields.integer("border")
        return cls(**read)


def _part(length: int, new_length: int, start: int, size: int) -> tuple[slice, tuple[float, float]]:
    """Return the pixels that `size` new ones from `start` on are made of, and where these begin and end among them."""
    scale = length / new_length
    reach = math.ceil(_REACH * max(scale, 1)) + 1
    begin, end = start * scale, min((start + size) * scale, length)
    first, last = max(0, math.floor(begin) - reach), min(length, math.ceil(end) + reach)
    return slice(first, last), (begin - first, end - first)


def _sample(image: Tensor, height: int, width: int, window: tuple[slice, slice] = (slice(None), slice(None))) -> Tensor:
    """Resize (3, H, W) to (3, height, width) as TensorFlow does, step by step: other orders round differently.

    Of the outcome, only the rows and columns of `window` are computed.
    """
    import torch

    upper, lower, down = (values[window[0]] for values in _neighbours(image.shape[1], height))
    left, right, across = (values[window[1]] for values in _neighbours(image.shape[2], width))
    rows_above, rows_below = image[:, upper].float(), image[:, lower].float()
    above, below = (
        rows[:, :, left] + (rows[:, :, right] - rows[:, :, left]) * across for rows in (rows_above, rows_below)
    )
    return (above + (below - above) * down[:, None]).to(torch.uint8)


def _neighbours(length: int, new_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two pixels between which each new one lies, by their centres, and how far along, in float32."""
    import torch

    scale = torch.tensor(length, dtype=torch.float32) / new_length
    centers = (torch.arange(new_length, dtype=torch.float32) + 0.5) * scale - 0.5
    first = centers.floor()
    return first.clamp(min=0).long(), centers.ceil().clamp(max=length - 1).long(), centers - first
