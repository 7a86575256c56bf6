"""Where in an image words are read: their cosine with each place alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

from lamplit.data.inputs import ImageInput, decode_nth, list_images
from lamplit.errors import TowerError, UsageError, kind_of
from lamplit.model import LiT, as_model
from lamplit.retrieval.heat_picture import Window, draw_heat
from lamplit.retrieval.model_reader import ModelReader
from lamplit.retrieval.picture_files import save_picture
from lamplit.retrieval.queries import encode_words, require_unit
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.images.places import Places
from lamplit.towers.lock import evaluating
from lamplit.unit_vectors import as_array

SIDE = 1024  # pixels of the picture that is kept, at most


@dataclass(frozen=True, repr=False)
class HeatMap:
    """Where in an image words are read.

    Attributes:
        values: (h, w) float32, the first at the top left: cosine of the words and each place alone, -1 to 1.
        score: cosine of the words and the whole image.
        size: width and height of the image in pixels, upright.
        window: left, top, right and bottom of the part that the tower saw, in pixels of the image; the places divide
            it evenly.
        picture: the image, upright, made small: at most 1024 x 1024 pixels.
    """

    values: NDArray[np.float32]
    score: float
    size: tuple[int, int]
    window: Window
    picture: Image.Image

    def __repr__(self) -> str:
        (height, width), (x, y) = self.values.shape, self.peak
        return f"<HeatMap {height} × {width}: {self.values.max():.3f} at ({x:.0f}, {y:.0f}), whole {self.score:.3f}>"

    @property
    def peak(self) -> tuple[float, float]:
        """Middle of the place where the words are read most: x and y in pixels of the image."""
        row, column = np.unravel_index(int(self.values.argmax()), self.values.shape)
        left, top, right, bottom = self.window
        height, width = self.values.shape
        return left + (right - left) * (float(column) + 0.5) / width, top + (bottom - top) * (float(row) + 0.5) / height

    def draw(self) -> Image.Image:
        """Draw the map over `picture`: orange where the words are read most, pale below half of the highest cosine.

        What the tower did not see is hatched.
        """
        across, down = self.picture.width / self.size[0], self.picture.height / self.size[1]
        left, top, right, bottom = self.window
        return draw_heat(self.picture, self.values, (left * across, top * down, right * across, bottom * down))

    def save(self, out: str | Path) -> None:
        """Write what `draw` draws to an image file, whole or not at all; its ending decides the format.

        Raises:
            UsageError: it ends in something else than .png, .jpg or .webp.

        Example:
            >>> lamplit.locate("runs/stamps", "farm.jpg", "a horse").save("where.png")
        """
        save_picture(self.draw(), out)


def locate(
    model: str | Path | LiT, image: ImageInput, words: str, *, device: str | torch.device | None = None
) -> HeatMap:
    """Find out where in an image a model reads words.

    The image tower's own pooling, and what follows it, are applied to each place alone: a patch, or a place of its last
    map. That tells what the vector of the image is made of; it is no outline of a thing. Towers that read a class token
    have no such places.

    On the command line: `lamplit locate`.

    Args:
        model: a folder, a name, or an open model.
        image: a path, encoded bytes, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W).
        words: words; or a sum of words in quotes, such as `"beach" - 0.5 * "people"`.
        device: torch device; by default the accelerator, if there is one.

    Raises:
        UsageError: there is no model, the words are blank or unknown to the text tower, or `image` is no image.
        TowerError: the image tower cannot show places, or the model lacks a tower.
        ImageError: the image cannot be used.

    Example:
        >>> found = lamplit.locate("runs/stamps", "farm.jpg", "a horse")
        >>> found.values.shape, found.peak
        ((7, 7), (312.0, 187.5))
    """
    given, is_one = list_images(image)
    if not is_one:
        raise UsageError(f"locate takes one image; this is {kind_of(image)}")
    if not isinstance(words, str):
        raise UsageError(f"locate takes words as a str; these are {kind_of(words)}")
    opened = as_model(model, device)
    opened.image_preprocessing()  # or there is no image tower
    vector = require_unit(encode_words(ModelReader(opened), words), words)
    return heat_map(opened, decode_nth(given, 0), vector)


@torch.no_grad()
def heat_map(model: LiT, pixels: Tensor, vector: NDArray[np.float32], side: int = SIDE) -> HeatMap:
    """Find out where in (3, H, W) uint8 pixels a model reads a text, whose (E,) unit vector is given.

    Args:
        model: an open model.
        pixels: of the upright image.
        vector: of the text.
        side: largest width and height of the picture that is kept.

    Raises:
        TowerError: the image tower cannot show places.
    """
    preprocessing = model.image_preprocessing()
    places, whole = _find_places(model, preprocessing.resize(pixels)[None])
    ztxt = torch.from_numpy(vector).to(model.device)
    zplaces, zimg = (model.project(F.normalize(of[0].float(), dim=-1)) for of in (places, whole))
    height, width = pixels.shape[-2:]
    picture: Image.Image = to_pil_image(pixels)
    picture.thumbnail((side, side))
    return HeatMap(
        values=as_array(zplaces @ ztxt),
        score=float(zimg @ ztxt),
        size=(width, height),
        window=preprocessing.window(height, width),
        picture=picture,
    )


def can_locate(model: LiT) -> bool:
    """Tell whether an open model can show where it reads words; its image tower runs once."""
    if model.text_tower is None or model.image_tower is None or model.identity.preprocessing is None:
        return False
    try:
        _find_places(model, torch.zeros(1, 3, *model.identity.preprocessing.image_size, dtype=torch.uint8))
    except TowerError:
        return False
    return True


@torch.no_grad()
def _find_places(model: LiT, images: Tensor) -> Places:
    tower = model.unlocked_image_tower
    if not isinstance(tower, ImageTower):
        raise TowerError(f"{kind_of(tower)} cannot show where it reads words; open it with lamplit.open_image_tower")
    with evaluating(tower):
        return tower.find_places(images.to(model.device))
