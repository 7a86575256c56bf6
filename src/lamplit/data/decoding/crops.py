"""Images as an image tower sees them while it is tuned: read again in every epoch, cropped at random or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from lamplit.data.decoding.images import decode_image, open_bytes
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.decoding.workers import identity_collate, worker_context, worker_start
from lamplit.errors import ImageError
from lamplit.locations.paths import path_of

AREA = (0.05, 1.0)  # of the image; big_vision's `inception_crop`
ASPECT_RATIO = (3 / 4, 4 / 3)


class Crop(NamedTuple):
    """An image to read, and the seed of its random crop; without a seed it is only resized."""

    path: str
    seed: int | None


class Crops(NamedTuple):
    """A batch of images."""

    images: Tensor  # (n, 3, height, width) uint8
    good: list[int]  # which of the batch's images these n are
    reasons: dict[str, str]  # why the others could not be read, by path


def read_crops(batches: Iterable[Sequence[Crop]], preprocessing: Preprocessing, *, workers: int) -> Iterator[Crops]:
    """Read batches of images in their order; images that cannot be read are left out, with the reason.

    The result depends only on paths and seeds, not on the number of worker processes.
    """
    loader = DataLoader(
        _Reader(preprocessing),
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists serves
        num_workers=workers,
        collate_fn=identity_collate,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=worker_start() if workers else None,
        generator=torch.Generator(),  # else it would draw from the one that a resumed run brings back
    )
    yield from loader


def inception_crop(image: Tensor, preprocessing: Preprocessing, seed: int) -> Tensor:
    """Cut a random rectangle out and scale it: (3, H, W) uint8 in, (3, height, width) uint8 out (appendix D).

    Its area is 5 % to 100 % of the image's, its aspect ratio 3:4 to 4:3.
    """
    mode = InterpolationMode("bicubic" if preprocessing.interpolation == "lanczos" else preprocessing.interpolation)
    crop = transforms.RandomResizedCrop(
        preprocessing.image_size, AREA, ASPECT_RATIO, mode, antialias=preprocessing.antialias
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cropped: Tensor = crop(image)
    return cropped


class _Reader(Dataset[Crops]):
    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __getitems__(self, batch: Sequence[Crop]) -> Crops:
        images: list[Tensor] = []
        good: list[int] = []
        reasons: dict[str, str] = {}
        for number, crop in enumerate(batch):
            try:
                image = decode_image(open_bytes(path_of(crop.path)))
            except ImageError as error:
                reasons[crop.path] = str(error)
                continue
            prepared = self.preprocessing
            images.append(prepared.resize(image) if crop.seed is None else inception_crop(image, prepared, crop.seed))
            good.append(number)
        blank = torch.empty(0, 3, *self.preprocessing.image_size, dtype=torch.uint8)
        return Crops(torch.stack(images) if images else blank, good, reasons)
