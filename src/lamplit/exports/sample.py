"""The sample that an export is checked on: texts and images, and the model's vectors of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from lamplit.data.decoding.images import convert_image, decode_image, open_bytes
from lamplit.data.sources import read_pairs
from lamplit.errors import ImageError, TowerError, UsageError
from lamplit.exports.parts import find_image_tower
from lamplit.model import LiT

TOLERANCE = 1e-5  # largest difference of any coordinate of a unit vector between two libraries' float32
NUM_PAIRS = 64
NUM_IMAGES = 12
SENTENCES = (
    "a",
    "dog",
    "A red bicycle.",
    "two children on a beach",
    "An old map of the city, 1785",
    "a photo of a golden retriever puppy",
    "The moon above a frozen lake at night.",
    "A bowl of ramen with an egg, spring onions and seaweed.",
    "Ein kleines blaues Haus am Ende einer langen, staubigen Straße",
    "une tasse de café sur une table en bois",
    "un mercado lleno de flores y frutas",
    "красная площадь зимой",
    "猫が窓の外を見ている",
    "EMPTY ROAD!!! (no cars?)",
    "diagram: x = 3.14, y > 0 & z",
    "close-up of a bee on a purple thistle, shallow depth of field, early morning light, dew on the leaves",
    "A long caption says much more than a short one: " + "there is a tree, and behind the tree a house, " * 12,
)


@dataclass(frozen=True)
class Sample:
    """Inputs, and the model's vectors of them on the CPU; None for a tower that the model lacks."""

    origin: str  # where the inputs come from, in words
    texts: list[str]
    images: list[Image.Image]
    pixels: Tensor | None  # (N, 3, height, width) uint8, as the image tower reads them
    zimg: Tensor | None  # (N, D) unit vectors
    ztxt: Tensor | None  # (number of texts, D) unit vectors


@torch.no_grad()
def take_sample(model: LiT, source: str | Path | None) -> Sample:
    """Embed the first pairs of a source; if `source` is None, sentences and patterns made here.

    Raises:
        UsageError: the source has no texts, or no image that can be used.
    """
    if source is None:
        origin = f"{len(SENTENCES)} built-in sentences and {NUM_IMAGES} generated images"
        texts, images = list(SENTENCES), [_pattern(number) for number in range(NUM_IMAGES)]
    else:
        texts, images = _read(source)
        origin = f"{len(texts)} texts and {len(images)} images of {source}"
    pixels = zimg = None
    if model.image_tower is not None:
        tower = find_image_tower(model)
        resize = tower.preprocessing.resize
        pixels = torch.stack([resize(convert_image(image)) for image in images])
        parts = (part.to(model.device) for part in torch.split(pixels, 16))
        zimg = torch.cat([model.project(F.normalize(tower(part), dim=-1)).cpu() for part in parts])
    ztxt = None if model.text_tower is None else model.encode_texts(texts).cpu()
    return Sample(origin, texts, images, pixels, zimg, ztxt)


def require_agreement(what: str, vectors: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the largest difference of any coordinate of unit vectors.

    Raises:
        TowerError: it is above `tolerance`.
    """
    if vectors.shape != expected.shape:
        raise TowerError(
            f"the exported {what} has the shape {tuple(vectors.shape)} for {tuple(expected.shape)}; nothing was written"
        )
    difference = float((vectors - expected).abs().max())
    if not difference <= tolerance:
        raise TowerError(
            f"the exported {what} differs from lamplit's by {difference:.1e}, more than {tolerance:.0e}; "
            "nothing was written"
        )
    return difference


@torch.no_grad()
def text_tolerance(model: LiT, sample: Sample) -> float:
    """Return how far text vectors may be off: `TOLERANCE`, or four times what float32 rounds away in this model.

    If a head's sums nearly cancel (as closed-form heads of an untrained encoder do), vectors in float32 are off
    from those in float64 by more than `TOLERANCE`, and other sums of the same numbers are as well.
    """
    assert model.text_tower is not None
    assert sample.ztxt is not None
    exact = copy.deepcopy(model.text_tower).double()
    ztxt = F.normalize(exact(exact.tokenize(sample.texts)), dim=-1)
    return max(TOLERANCE, 4 * float((sample.ztxt - ztxt).abs().max()))


def _read(source: str | Path) -> tuple[list[str], list[Image.Image]]:
    texts: list[str] = []
    images: list[Image.Image] = []
    for pair in islice(read_pairs(source), NUM_PAIRS):
        texts += pair.texts[:1]
        try:
            images.append(TF.to_pil_image(decode_image(open_bytes(pair.image))))
        except ImageError:  # the others are enough
            continue
    if not texts or not images:
        raise UsageError(f"{source} has {len(texts)} texts and {len(images)} usable images; a sample needs both")
    return texts, images


def _pattern(number: int) -> Image.Image:
    """Make an image of coloured clouds, the same in every run; `number` gives its size and roughness."""
    generator = torch.Generator().manual_seed(number)
    height, width = (int(torch.randint(180, 520, (1,), generator=generator)) for _ in range(2))
    grains = 2 ** (1 + number % 6)
    coarse = torch.rand(1, 3, grains, grains, generator=generator)
    pixels = F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1) * 255
    image: Image.Image = TF.to_pil_image(pixels.to(torch.uint8))
    return image
