"""The two sides of a step: images and texts, each from a tower that trains or from vectors that do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lamplit.data.crops import Crop, read_crops
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.large_batch import Part, cut_texts

CHUNK_PIXELS = 32 * 224 * 224
Encode = Callable[[Tensor], Tensor]


class Constants:
    """What a locked tower gave, read from memory; a head behind it may train.

    Args:
        vectors: (N, D) unit vectors, or features where there is a head.
        head: maps (n, D) to the joint space.
        device: where the head is.
    """

    def __init__(self, vectors: Tensor, head: nn.Module | None, device: torch.device) -> None:
        self.vectors, self.head, self.device = vectors, head, device

    def take(self, rows: Tensor) -> Part | Tensor:
        """Return the vectors of (B,) rows, or what maps them into the joint space."""
        vectors = self.vectors[rows].to(self.device)
        return vectors if self.head is None else Part(self.head, [vectors], torch.arange(len(rows)))


class Texts:
    """Tokens, through a text tower that trains."""

    def __init__(self, tokens: list[list[int]], encode: Callable[[list[list[int]]], Tensor]) -> None:
        self.tokens, self.encode = tokens, encode

    def take(self, rows: Tensor) -> Part:
        """Return (B,) texts to encode."""
        return cut_texts(self.encode, [self.tokens[i] for i in rows.tolist()])


class Images:
    """Images from their files, through an image tower that trains.

    Args:
        tower: maps uint8 images to features.
        head: maps unit features to the joint space, where there is one.
        device: where the tower is.
        trains_statistics: whether BatchNorm normalises by the images at hand, as a tower from scratch must.
    """

    def __init__(
        self, tower: ImageTower, head: nn.Module | None, device: torch.device, *, trains_statistics: bool
    ) -> None:
        self.tower, self.head, self.device = tower, head, device
        self.trains_statistics = trains_statistics
        self.skipped: dict[str, str] = {}  # reasons, by path
        self._crops: Iterator[tuple[Tensor, list[int], dict[str, str]]] | None = None
        self._images = torch.empty(0)

    def open(self, batches: Iterator[Sequence[Crop]], workers: int) -> None:
        """Begin to read what the coming steps will ask for."""
        self._crops = read_crops(batches, self.tower.preprocessing, workers=workers)

    def read(self) -> list[int]:
        """Read the next batch; return the places in it whose images could be read."""
        assert self._crops is not None
        self._images, good, reasons = next(self._crops)
        self.skipped |= reasons
        return good

    def take(self, encode: Encode, *, trains: bool) -> Part | Tensor:
        """Return the images that were read, to encode; without their tower as long as it does not train.

        Args:
            encode: maps (n, 3, height, width) images to (n, D) features.
            trains: whether the tower changes in this step.
        """
        height, width = self.tower.preprocessing.image_size
        most = max(2, CHUNK_PIXELS // (height * width))
        chunks = self._images.tensor_split(-(-len(self._images) // most))
        order = torch.arange(len(self._images))
        if trains:
            self._set_train()
            return Part(lambda chunk: self._joint(encode(chunk)), chunks, order, self._again(encode))
        self.tower.eval()
        with torch.no_grad():
            vectors = F.normalize(torch.cat([encode(chunk) for chunk in chunks]), dim=-1)
        return vectors if self.head is None else Part(self.head, [vectors], order)

    def _joint(self, features: Tensor) -> Tensor:
        vectors: Tensor = features if self.head is None else self.head(F.normalize(features, dim=-1))
        return vectors

    def _again(self, encode: Encode) -> Encode:
        """Encode a second time: BatchNorm has counted these images already."""

        def run(chunk: Tensor) -> Tensor:
            counting = [layer for layer in self._batch_norms() if layer.track_running_stats]
            for layer in counting:
                layer.track_running_stats = False
            vectors = self._joint(encode(chunk))
            for layer in counting:
                layer.track_running_stats = True
            return vectors

        return run

    def _set_train(self) -> None:
        self.tower.train()
        if not self.trains_statistics:
            for layer in self._batch_norms():
                layer.eval()

    def _batch_norms(self) -> list[_BatchNorm]:
        return [module for module in self.tower.modules() if isinstance(module, _BatchNorm)]


@torch.no_grad()
def text_features(tower: TextTower, texts: Sequence[str], batch_size: int = 512) -> Tensor:
    """Features of texts before the tower's head, as it stands, (M, feature width)."""
    was_training = tower.training
    tower.eval()
    tokens = tower.tokenize(texts)
    parts = [tower.features(tokens[i : i + batch_size]).float() for i in range(0, len(tokens), batch_size)]
    tower.train(was_training)
    return torch.cat(parts)
