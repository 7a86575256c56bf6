"""The two sides of a step, images and texts: each is encoded by a tower that trains, or read from constant vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lamplit.data.decoding.crops import Crop, Crops, read_crops
from lamplit.errors import TuneError
from lamplit.progress import progress_bar
from lamplit.store.arrays.row_vectors import RowVectors
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.batches import Batches
from lamplit.tuning.large_batch import Part, cut_texts
from lamplit.tuning.ranks import Ranks
from lamplit.tuning.split import Links
from lamplit.tuning.tokens import Tokens

CHUNK_PIXELS = 32 * 224 * 224
EVALUATION_BATCH = 64
Precision = Callable[[], AbstractContextManager[Any]]  # enters the autocast of a run


class ImageSide(ABC):
    """The images of a step, in the joint space.

    Attributes:
        tower: the image tower, or None if it cannot be opened.
        head: maps unit vectors of the tower to the joint space, or None if they are in it.
        skipped: reasons why images could not be read, by path.
    """

    def __init__(self, tower: ImageTower | None, head: nn.Module | None) -> None:
        self.tower, self.head = tower, head
        self.skipped: dict[str, str] = {}

    @abstractmethod
    def open(self, batches: Batches, first: int, workers: int) -> None:
        """Prepare the coming steps of a run, from step `first` on."""

    @abstractmethod
    def part(self, rows: Tensor, step: int) -> tuple[Part | Tensor, Tensor]:
        """Return the images of the next step.

        Args:
            rows: (B,) rows of the store.
            step: number of the step, from 0.

        Returns:
            (b, D) unit vectors or what gives them, and (b,) indices into `rows` of the images that could be read.

        Raises:
            TuneError: fewer than two images could be read, or fewer than there are processes.
        """

    @abstractmethod
    def vectors(self, links: Links) -> tuple[Tensor, Links]:
        """Return (n, D) unit vectors of the linked images as the model gives them now, and links to these.

        Raises:
            TuneError: none of the images could be read.
        """

    @abstractmethod
    def require_lock(self) -> None:
        """Raise TuneError if a locked tower has changed."""

    def fingerprint(self) -> str:
        """Fingerprint of the tower's weights as they are now; empty without a tower."""
        return "" if self.tower is None else self.tower.identity().fingerprint

    def skipped_note(self) -> str:
        """Say how many images were skipped, and why the first three were."""
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(self.skipped.items())[:3])
        return (
            f"{len(self.skipped)} images could not be read and were left out ({reasons}); all are listed in report.json"
        )


class ConstantImages(ImageSide):
    """Vectors of a locked tower, read from the store's; a head behind them may train.

    Args:
        zimg: unit vectors of all rows of the store.
        tower: the tower that made them, or None.
        head: maps (n, D) to the joint space, or None.
        device: where the head is.
    """

    def __init__(
        self, zimg: RowVectors, tower: ImageTower | None, head: nn.Module | None, device: torch.device
    ) -> None:
        super().__init__(tower, head)
        self.zimg, self.device = zimg, device
        self._lock = None if tower is None else _Lock("image tower", tower)

    def open(self, batches: Batches, first: int, workers: int) -> None:
        """Do nothing: there are no files to read."""

    def part(self, rows: Tensor, step: int) -> tuple[Part | Tensor, Tensor]:
        """Return the vectors of (B,) rows, or what maps them to the joint space, and the indices of all rows."""
        return _constant_part(self.zimg[rows].to(self.device), self.head), torch.arange(len(rows))

    @torch.no_grad()
    def vectors(self, links: Links) -> tuple[Tensor, Links]:
        """Return (n, D) unit vectors of the linked images, and links to these."""
        rows, index = torch.unique(links.image_index, return_inverse=True)
        zimg = _project(self.zimg[rows].to(self.device), self.head)
        return zimg, Links(links.texts, index, links.text_index)

    def require_lock(self) -> None:
        """Raise TuneError if the tower has changed."""
        if self._lock is not None:
            self._lock.require()


class EncodedImages(ImageSide):
    """Images from their files, through a tower that trains.

    Args:
        tower: maps uint8 images to features.
        head: maps unit features to the joint space, or None.
        paths: the image file of each row of the store.
        precision: the autocast in which the tower runs.
        device: where the tower is.
        start: the step from which the tower trains; before it, images are constants.
        trains_statistics: whether BatchNorm normalises by the batch, as a tower from scratch must.
        ranks: the processes that share each batch; each reads its share of the images.
    """

    tower: ImageTower

    def __init__(
        self,
        tower: ImageTower,
        head: nn.Module | None,
        paths: pa.Array,
        *,
        precision: Precision,
        device: torch.device,
        start: int,
        trains_statistics: bool,
        ranks: Ranks,
    ) -> None:
        super().__init__(tower, head)
        self.paths, self.precision, self.device = paths, precision, device
        self.start, self.trains_statistics, self.ranks = start, trains_statistics, ranks
        self._crops: Iterator[Crops] | None = None

    def open(self, batches: Batches, first: int, workers: int) -> None:
        """Begin to read the images of the coming steps."""
        own = (crops[self.ranks.rank :: self.ranks.size] for crops in batches.crops(first, self.paths))
        self._crops = read_crops(own, self.tower.preprocessing, workers=workers)

    def part(self, rows: Tensor, step: int) -> tuple[Part | Tensor, Tensor]:
        """Read the images of the next step, and return them to encode; as vectors if the tower does not train yet."""
        assert self._crops is not None
        images, good, reasons = next(self._crops)
        is_good, ranks = torch.zeros(len(rows), dtype=torch.bool), self.ranks
        is_good[torch.tensor(good, dtype=torch.long) * ranks.size + ranks.rank] = True
        kept = torch.nonzero(ranks.agree(is_good)).flatten()
        if len(kept) < len(rows):  # which all processes know
            self.skipped |= ranks.merge(reasons)
        if len(kept) < (least := max(2, ranks.size)):  # every process takes a pair
            raise TuneError(f"fewer than {least} images of step {step + 1} could be read. {self.skipped_note()}")
        height, width = self.tower.preprocessing.image_size
        if not good:  # all processes take part in what follows; this one's vector is left out
            images = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        per_chunk = max(2, CHUNK_PIXELS // (height * width))
        chunks = images.tensor_split(-(-len(images) // per_chunk))
        gather = partial(ranks.gather, owners=kept % ranks.size)
        if step >= self.start:
            self._set_train()
            order = torch.arange(len(images))
            return Part(self._to_joint_space, chunks, order, self._encode_again, gather), kept
        self.tower.eval()
        with torch.no_grad():
            zimg = gather(F.normalize(torch.cat([self._encode(chunk) for chunk in chunks]), dim=-1))
        return _constant_part(zimg, self.head), kept

    @torch.no_grad()
    def vectors(self, links: Links) -> tuple[Tensor, Links]:
        """Encode the linked images; those that cannot be read are left out of the links."""
        rows, index = torch.unique(links.image_index, return_inverse=True)
        parts, good = [], torch.zeros(len(rows), dtype=torch.bool)
        files = self.paths.take(pa.array(rows.numpy())).to_pylist()
        batches = [
            [Crop(file, None) for file in files[start : start + EVALUATION_BATCH]]
            for start in range(0, len(files), EVALUATION_BATCH)
        ]
        self.tower.eval()
        for number, crops in enumerate(read_crops(batches, self.tower.preprocessing, workers=0)):
            self.skipped |= crops.reasons
            if crops.good:
                good[torch.tensor(crops.good) + EVALUATION_BATCH * number] = True
                parts.append(_project(F.normalize(self._encode(crops.images), dim=-1), self.head))
        if not parts:
            raise TuneError(f"none of {len(rows)} held-out images could be read, {files[0]} first")
        kept = good[index]
        moved = (good.cumsum(0) - 1)[index[kept]]
        return torch.cat(parts), Links(links.texts, moved, links.text_index[kept])

    def require_lock(self) -> None:
        """Do nothing: the tower may change."""

    def _encode(self, images: Tensor) -> Tensor:
        with self.precision():
            features: Tensor = self.tower(images.to(self.device))
        return features.float()

    def _to_joint_space(self, images: Tensor) -> Tensor:
        features = self._encode(images)
        vectors: Tensor = features if self.head is None else self.head(F.normalize(features, dim=-1))
        return vectors

    def _encode_again(self, images: Tensor) -> Tensor:
        """Encode a second time: BatchNorm has counted these images already."""
        counting = [layer for layer in self._batch_norms() if layer.track_running_stats]
        for layer in counting:
            layer.track_running_stats = False
        vectors = self._to_joint_space(images)
        for layer in counting:
            layer.track_running_stats = True
        return vectors

    def _set_train(self) -> None:
        self.tower.train()
        if not self.trains_statistics:
            for layer in self._batch_norms():
                layer.eval()

    def _batch_norms(self) -> list[_BatchNorm]:
        return [module for module in self.tower.modules() if isinstance(module, _BatchNorm)]


class TextSide(ABC):
    """The texts of a step, in the joint space."""

    @abstractmethod
    def part(self, texts: Tensor, more: Sequence[list[int]] = ()) -> Part | Tensor:
        """Return what gives (B + n, D) vectors of (B,) texts, by their indices, and of n more by their token ids."""

    @abstractmethod
    def lengths(self, texts: Tensor) -> Tensor:
        """Return what each of (B,) texts costs, in tokens: (B,)."""

    @abstractmethod
    def require_lock(self) -> None:
        """Raise TuneError if a locked encoder has changed."""


class ConstantTexts(TextSide):
    """Features of a locked encoder, computed once; the head behind them trains.

    Args:
        tower: the text tower.
        tokens: token ids of the distinct texts that are tuned on.
    """

    def __init__(self, tower: TextTower, tokens: Tokens) -> None:
        self.features = token_features(tower, tokens).cpu()
        self.head, self.device = tower.head, tower.device
        self._lock = _Lock("text tower", tower.encoder)

    def part(self, texts: Tensor, more: Sequence[list[int]] = ()) -> Part | Tensor:
        """Return what maps the features of (B,) texts to the joint space; a locked encoder takes no more texts."""
        assert not more
        return _constant_part(self.features[texts].to(self.device), self.head)

    def lengths(self, texts: Tensor) -> Tensor:
        """Return (B,) ones: features cost the same."""
        return torch.ones_like(texts)

    def require_lock(self) -> None:
        """Raise TuneError if the encoder has changed."""
        self._lock.require()


class EncodedTexts(TextSide):
    """Tokens, through a text tower that trains.

    Args:
        tower: maps lists of token ids to vectors.
        tokens: token ids of each text.
        precision: the autocast in which the tower runs.
    """

    def __init__(self, tower: TextTower, tokens: Tokens, precision: Precision) -> None:
        self.tower, self.tokens, self.precision = tower, tokens, precision

    def part(self, texts: Tensor, more: Sequence[list[int]] = ()) -> Part:
        """Return (B,) texts and n more to encode."""
        return cut_texts(self._encode, [*self.tokens.take(texts), *more])

    def lengths(self, texts: Tensor) -> Tensor:
        """Return how many tokens (B,) texts have."""
        return torch.from_numpy(self.tokens.sizes(texts))

    def require_lock(self) -> None:
        """Do nothing: the encoder may change."""

    def _encode(self, tokens: list[list[int]]) -> Tensor:
        with self.precision():
            vectors: Tensor = self.tower(tokens)
        return vectors


@torch.no_grad()
def token_features(
    tower: TextTower, tokens: Sequence[list[int]], batch_size: int = 512, *, progress: bool = False
) -> Tensor:
    """Compute (M, feature width) features of texts from their token ids, before the tower's head."""
    was_training = tower.training
    tower.eval()
    parts = []
    with progress_bar("texts", len(tokens), shown=progress) as advance:
        for start in range(0, len(tokens), batch_size):
            parts.append(tower.features(tokens[start : start + batch_size]).float())
            advance(len(parts[-1]), "")
    tower.train(was_training)
    return torch.cat(parts)


class _Lock:
    """A module that must not change, with the digest of its weights when the run began."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module.requires_grad_(False)
        self.digest = weights_digest(module)

    def require(self) -> None:
        now = weights_digest(self.module)
        if now != self.digest:
            raise TuneError(
                f"the locked {self.name} changed: its weights had the fingerprint {self.digest} and have {now}. "
                "This is a defect of lamplit; please report it"
            )


def _constant_part(vectors: Tensor, head: nn.Module | None) -> Part | Tensor:
    return vectors if head is None else Part(head, [vectors], torch.arange(len(vectors)))


def _project(zimg: Tensor, head: nn.Module | None) -> Tensor:
    return zimg if head is None else F.normalize(head(zimg), dim=-1)
