"""What a run is made of: the two towers, which of them train and at what rate, and what each side of a step reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.data.crops import Crop, read_crops
from lamplit.errors import LamplitError, TuneError
from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.towers.devices import has_fast_bf16
from lamplit.towers.images.image_tower import ImageTower, build_image_tower, open_image_tower
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.large_batch import Part
from lamplit.tuning.optimizers import build_optimizer, parameter_groups, warmup_cosine
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.sides import Constants, Images, Texts, text_features
from lamplit.tuning.split import Links

logger = logging.getLogger(__name__)


class Assembly:
    """The model of a run with its optimizer.

    Args:
        store: whose pairs are tuned on, and whose tower is read or tuned.
        settings: the run's dials.
        texts: the distinct texts that are tuned on.
        batch_size: pairs in a loss, for the sigmoid's bias.
        total_steps: of the run, for the rates.
        device: where all of it is.
    """

    def __init__(
        self,
        store: Store,
        settings: TuneSettings,
        texts: Sequence[str],
        *,
        batch_size: int,
        total_steps: int,
        device: torch.device,
    ) -> None:
        self.settings, self.device, self.total_steps = settings, device, total_steps
        self.paths: list[str] = store.column("path")
        center = None if settings.image_trains else store.center
        self.zimg = store.vectors(center)
        self.text_tower = open_text_tower(
            settings.text_tower,
            width=store.tower.width,
            texts=texts,
            context_length=settings.context_length,
            pretrained=settings.pretrained_text,
            # Published heads read plain vectors of pre-trained towers.
            reads=None if center is not None or settings.mode[0] == "u" else store.tower.fingerprint,
        )
        if settings.lora is not None:
            self.text_tower.add_lora(settings.lora)
        self.tokens = self.text_tower.tokenize(texts)
        self.image_tower = _open_image_tower(store, settings)
        bias = None if settings.loss == "softmax" else -math.log(batch_size - 1)
        head = _identity(store.tower.width) if settings.image_head else None
        self.model = LiT(
            self.text_tower, store.tower, center=center, image_head=head, logit_bias=bias,
            logit_multiplier=self.text_tower.trained_scale or 10.0,
        ).to(device)  # fmt: skip
        self.locked: dict[str, nn.Module] = {}
        self.text_side = self._text_side(texts)
        self.optimizer = build_optimizer(
            settings.optimizer, self.model, lr=settings.peak_lr, weight_decay=settings.weight_decay
        )
        for group in self.optimizer.param_groups:
            group |= {"peak": settings.peak_lr, "start": 0}
        self.image_side = self._image_side()
        self._digests = {name: weights_digest(module) for name, module in self.locked.items()}

    def _text_side(self, texts: Sequence[str]) -> Constants | Texts:
        if self.settings.text_trains:
            return Texts(self.tokens, self._encode_texts)
        self.locked["text tower"] = self.text_tower.encoder.requires_grad_(False)
        return Constants(text_features(self.text_tower, texts).cpu(), self.text_tower.head, self.device)

    def _image_side(self) -> Constants | Images:
        tower, settings = self.image_tower, self.settings
        if not settings.image_trains:
            if tower is not None:
                self.locked["image tower"] = tower.requires_grad_(False)
            return Constants(self.zimg, self.model.image_head, self.device)
        assert tower is not None
        # Convolutions train 1.2 to 1.6 times faster so on a CPU, and nothing else changes.
        tower.backbone.to(memory_format=torch.channels_last)
        self.model.attach_trainable_image_tower(tower.to(self.device))
        decay = settings.weight_decay if settings.image_weight_decay is None else settings.image_weight_decay
        start = round(settings.image_delay * self.total_steps)
        for group in parameter_groups(tower, weight_decay=decay):
            self.optimizer.add_param_group(group | {"lr": 0.0, "peak": settings.peak_image_lr, "start": start})
        # A tower from scratch has no statistics to keep; those of a pre-trained one stay, as when it was locked.
        return Images(tower, self.model.image_head, self.device, trains_statistics=settings.mode[0] == "u")

    def set_rates(self, step: int) -> dict[str, float]:
        """Set the learning rates of a step (from 0); return them by their names in the log."""
        for group in self.optimizer.param_groups:
            total = self.total_steps - group["start"]
            rise = round(self.settings.warmup_ratio * total)
            # The first step of the paper's schedule has rate 0; counting from 1 puts it to use.
            place = step - group["start"] + 1
            factor = warmup_cosine(place, warmup_steps=rise, total_steps=total + 1) if place > 0 else 0.0
            group["lr"] = group["peak"] * factor
        rates = {"lr": self.optimizer.param_groups[0]["lr"]}
        return rates | ({"image_lr": self.optimizer.param_groups[-1]["lr"]} if self.settings.image_trains else {})

    def sides(self, images: Tensor, texts: Tensor, step: int) -> list[Part | Tensor]:
        """Return what a step encodes, or its unit vectors where nothing trains: images, then texts."""
        if isinstance(self.image_side, Constants):
            return [self.image_side.take(images), self.text_side.take(texts)]
        start = self.optimizer.param_groups[-1]["start"]
        return [self.image_side.take(self._encode_images, trains=step >= start), self.text_side.take(texts)]

    def loss(self, zimg: Tensor, ztxt: Tensor, *, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Take the loss of a step on unit vectors, (B, D) each."""
        scale, bias = self.model.logit_multiplier, self.model.logit_bias
        if bias is None:
            return softmax_loss(zimg, ztxt, scale, image_ids=image_ids, text_ids=text_ids)
        return sigmoid_loss(zimg, ztxt, scale, bias, image_ids=image_ids, text_ids=text_ids)

    @torch.no_grad()
    def image_vectors(self, links: Links) -> tuple[Tensor, Links]:
        """Return unit vectors of the linked images as the model has them now, and the links of these.

        Images that cannot be read are left out.

        Raises:
            TuneError: none of them can.
        """
        rows, places = torch.unique(links.image_index, return_inverse=True)
        if isinstance(self.image_side, Constants):
            zimg, head = self.zimg[rows].to(self.device), self.model.image_head  # centred already
            zimg = zimg if head is None else F.normalize(head(zimg), dim=-1)
            return zimg, Links(links.texts, places, links.text_index)
        tower, parts, good = self.image_side.tower.eval(), [], torch.zeros(len(rows), dtype=torch.bool)
        batches = [[Crop(self.paths[row], None) for row in part.tolist()] for part in rows.split(64)]
        for number, crops in enumerate(read_crops(batches, tower.preprocessing, workers=0)):
            self.image_side.skipped |= crops.reasons
            if not crops.good:
                continue
            good[torch.tensor(crops.good) + 64 * number] = True
            parts.append(self.model.project(F.normalize(self._encode_images(crops.images), dim=-1)))
        if not parts:
            raise TuneError(f"none of {len(rows)} held-out images could be read, {self.paths[int(rows[0])]} first")
        kept = good[places]
        moved = (good.cumsum(0) - 1)[places[kept]]
        return torch.cat(parts), Links(links.texts, moved, links.text_index[kept])

    def require_images(self, rows: Tensor) -> None:
        """Refuse to tune an image tower on images that are not files here.

        Raises:
            TuneError: naming one, and the way out.
        """
        lost = [self.paths[row] for row in torch.unique(rows).tolist() if not Path(self.paths[row]).is_file()]
        if lost:
            raise TuneError(
                f"mode {self.settings.mode} reads images again in every epoch, and {len(lost)} of the store's are "
                f"not files here, {lost[0]} among them. Bring them back; unpack images that are inside an archive "
                "into a folder, and embed them from there"
            )

    def require_lock(self) -> None:
        """Prove that what was locked has not changed.

        Raises:
            TuneError: something has.
        """
        for name, module in self.locked.items():
            now = weights_digest(module)
            if now != self._digests[name]:
                raise TuneError(
                    f"the locked {name} changed: its weights had the fingerprint {self._digests[name]} and have {now}. "
                    "This is a defect of lamplit; please report it"
                )

    def _encode_texts(self, tokens: list[list[int]]) -> Tensor:
        with self._precision():
            vectors: Tensor = self.text_tower(tokens)
        return vectors

    def _encode_images(self, images: Tensor) -> Tensor:
        assert self.image_tower is not None
        with self._precision():
            features: Tensor = self.image_tower(images.to(self.device))
        return features.float()

    def _precision(self) -> AbstractContextManager[Any]:
        bf16 = self.settings.precision == "bf16" or (self.settings.precision == "auto" and has_fast_bf16(self.device))
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


def _identity(width: int) -> nn.Linear:
    """A head that begins as nothing: what the head start fits, and what a locked tower knows, stays valid."""
    head = nn.Linear(width, width)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _open_image_tower(store: Store, settings: TuneSettings) -> ImageTower | None:
    """Open the tower that made the store: to be tuned, or for its classifier and to be saved with the model."""
    identity = store.tower
    if identity.imported:
        if settings.image_trains:
            raise TuneError(f"the vectors of {store.path} were imported: there is no {identity.spec} to tune here")
        logger.info("the vectors were imported, made by %s; the model is saved without an image tower", identity.spec)
        return None
    if settings.mode[0] == "u":
        return build_image_tower(identity)
    try:
        tower = open_image_tower(
            identity.spec, weights=identity.weights, preprocessing=identity.preprocessing, pool=identity.pool
        )
        if tower.identity().fingerprint != identity.fingerprint:
            raise TuneError(f"{identity.spec} is not the tower that made {store.path} any more")
    except LamplitError as error:
        if settings.image_trains:
            raise TuneError(f"the image tower {identity.spec} cannot be tuned: {error}") from error
        logger.warning("the image tower %s cannot be opened (%s); the model is saved without it", identity.spec, error)
        return None
    return tower
