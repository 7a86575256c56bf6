"""LiT: a locked image tower, a text tower that reads it, and the scale of their cosines.

A saved model is a folder that works offline and can be read one tower at a time: `config.json`,
`text_tower.safetensors`, `image_tower.safetensors`, `tokenizer/`, and `image_head.safetensors` where there is one;
`text_tower.onnx`, by which words are read without torch, is written beside them by `exports.words`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit._version import __version__
from lamplit.data.images import convert_image, decode_image, open_bytes
from lamplit.errors import TowerError, UsageError
from lamplit.store.lance_store import Store
from lamplit.towers.devices import pick_device
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, load_image_tower, open_published_image_tower
from lamplit.towers.loading import load_whole
from lamplit.towers.lock import Locked
from lamplit.towers.model_folder import FORMAT, IMAGE_HEAD, TEXT_GRAPH, TEXT_TOWER, read_config
from lamplit.towers.published.big_vision import Published
from lamplit.towers.texts.text_tower import TextTower, build_text_tower, open_published_text_tower
from lamplit.unit_vectors import as_array

logger = logging.getLogger(__name__)
ImageInput = str | Path | bytes | Image.Image


class LiT(nn.Module):
    """The two-tower model of the paper (section 3). Without an image head the locked space is the joint space.

    Args:
        text_tower: reads texts into the image tower's width.
        identity: which image tower the text tower reads.
        image_tower: the tower itself, where images are to be encoded; `Locked` unless it is to be trained.
        center: (D,) mean to subtract from unit image vectors, for stores made with `--mean-center`.
        image_head: maps the tower's vectors into the joint space, (N, D) to (N, E); nothing where the tower's own
            space is the joint one (the paper's best setting).
        logit_multiplier: first multiplier on cosines.
        logit_bias: first offset of the logits, for the sigmoid loss; nothing for softmax.
    """

    def __init__(
        self,
        text_tower: TextTower | None,
        identity: TowerIdentity,
        image_tower: nn.Module | None = None,
        *,
        center: Tensor | None = None,
        image_head: nn.Linear | None = None,
        logit_multiplier: float = 10.0,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.name = "unnamed"  # what results call it; `load` knows better
        self.run_folder: Path | None = None  # folder of the run that left the model; set by `load`
        self.identity = identity
        self.text_tower = text_tower
        self.image_tower = Locked(image_tower) if isinstance(image_tower, ImageTower) else image_tower
        self.image_head = image_head
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_multiplier)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.register_buffer("center", center, persistent=False)
        self.center: Tensor | None

    def unlock(self, image_tower: ImageTower) -> None:
        """Take an image tower that is to be trained with the text tower; whoever loads the model finds it locked."""
        self.image_tower = image_tower

    @property
    def unlocked_image_tower(self) -> nn.Module | None:
        """The image tower itself, without its lock."""
        return self.image_tower.tower if isinstance(self.image_tower, Locked) else self.image_tower

    @property
    def logit_multiplier(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.log_scale.exp()

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its outputs are."""
        return self.log_scale.device

    @property
    def width(self) -> int:
        """Width of the joint space."""
        return self.identity.width if self.image_head is None else self.image_head.out_features

    @property
    def space(self) -> str:
        """Fingerprint of the joint space: that of the image tower, and of the centre and the head behind it if any."""
        parts = [] if self.center is None else [self.center]
        parts += [] if self.image_head is None else list(self.image_head.parameters())
        return self.identity.space([as_array(part) for part in parts])

    def project(self, zimg: Tensor) -> Tensor:
        """Bring unit vectors of the image tower into the joint space: (N, D) in, (N, E) unit vectors out."""
        if self.center is not None:
            zimg = F.normalize(zimg - self.center, dim=-1)
        return zimg if self.image_head is None else F.normalize(self.image_head(zimg), dim=-1)

    @torch.no_grad()
    def read_store(self, store: Store) -> Tensor:
        """Vectors of a store's images in the joint space, (N, E).

        Raises:
            StoreError: another tower embedded it.
        """
        store.require_tower(self.identity)
        return torch.cat([self.project_all(part) for part in torch.split(store.vectors(), 65536)])

    @torch.no_grad()
    def project_all(self, zimg: Tensor) -> Tensor:
        """As `project`, of vectors that may be on another device, and without gradients."""
        return self.project(zimg.to(self.device))

    def project_rows(self, zimg: NDArray[np.float32]) -> NDArray[np.float32]:
        """As `project_all`, of a float32 array and to one, as search keeps them."""
        return as_array(self.project_all(torch.from_numpy(zimg)))

    @torch.no_grad()
    def encode_images(self, images: Sequence[ImageInput], batch_size: int = 32) -> Tensor:
        """Embed images: N files, encoded bytes or PIL images in, (N, D) unit vectors out.

        Raises:
            TowerError: the model was loaded without its image tower, or never had one.
            ImageError: an image cannot be used.
        """
        if self.image_tower is None or self.identity.preprocessing is None:
            raise _without_image_tower(self.identity)
        resize = self.identity.preprocessing.resize
        parts = [torch.empty(0, self.width, device=self.device)]
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([resize(_decode(image)) for image in images[start : start + batch_size]])
            parts.append(self.project(F.normalize(self.image_tower(pixels.to(self.device)), dim=-1)))
        return torch.cat(parts)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 512) -> Tensor:
        """Embed texts: N strings in, (N, D) unit vectors out. The log says how many lost their end, if any did.

        Raises:
            TowerError: the model was loaded without its text tower.
        """
        if self.text_tower is None:
            raise TowerError("this model is open without its text tower; load it with towers='both'")
        was_training = self.text_tower.training
        self.text_tower.eval()
        tokens = self.text_tower.tokenize(texts)
        self.text_tower.count_truncated(texts, tokens)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        ztxt = torch.empty(len(tokens), self.width, device=self.device)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ztxt[chosen] = F.normalize(self.text_tower([tokens[i] for i in chosen]), dim=-1)
        self.text_tower.train(was_training)
        return ztxt

    def save(self, folder: str | Path) -> None:
        """Write the model into `folder`.

        Whichever tower it is open without stays out, and so does one that was given to a model of imported vectors.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.image_tower, ImageTower):  # it trains, so it is not the tower any more that it was
            self.identity = replace(self.image_tower.identity(), spec=f"model:{folder.resolve()}")
        config = {
            "format": FORMAT,
            "lamplit": __version__,
            "image_tower": self.identity.to_dict(),
            "center": None if self.center is None else self.center.tolist(),
            "image_head": None if self.image_head is None else self.image_head.out_features,
            "text_tower": None,
            "logit_bias": None if self.logit_bias is None else float(self.logit_bias.detach()),
        }
        (folder / TEXT_GRAPH).unlink(missing_ok=True)  # that of what was here before
        if self.text_tower is not None:
            config["text_tower"] = self.text_tower.describe()
            self.text_tower.save_tokenizer(folder / "tokenizer")
            save_model(_TextPart(self), str(folder / TEXT_TOWER))
        if self.image_head is not None:
            save_model(self.image_head, str(folder / IMAGE_HEAD))
        tower = self.unlocked_image_tower
        if tower is not None and not self.identity.imported:
            save_image_tower(tower, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class _TextPart(nn.Module):
    """What `text_tower.safetensors` holds: the tower and the two scalars, never the image tower."""

    def __init__(self, model: LiT) -> None:
        super().__init__()
        self.text_tower = model.text_tower
        self.log_scale = model.log_scale
        self.logit_bias = model.logit_bias


def load(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    towers: Literal["both", "text", "image"] = "both",
    image_tower: nn.Module | None = None,
) -> LiT:
    """Load a model in eval mode; a saved one needs nothing but its folder.

    Args:
        folder: what `LiT.save` or a tuning run wrote; or `lit:NAME_OR_FILE`, one of the models that the paper's authors
            published (`lit:B16B_2`, say), from its own .npz file.
        device: torch device; by default the accelerator, if there is one.
        towers: load one alone to search (`text`) or embed (`image`) with less memory.
        image_tower: the module itself, for a model whose tower was given as one; for a model of imported vectors an
            open tower with its own weights, of which nothing can prove that it made the vectors.

    Raises:
        UsageError: no model there.
        TowerError: its weights do not fit, or are not there.
    """
    if str(folder).startswith("lit:"):
        return _load_published(str(folder), towers).to(pick_device(device))
    folder = Path(folder)
    config = read_config(folder)
    identity: TowerIdentity = config["image_tower"]
    center = None if config["center"] is None else torch.tensor(config["center"])
    text = None
    if towers != "image" and config["text_tower"] is not None:
        text = build_text_tower(config["text_tower"], folder / "tokenizer")
    head_width = config.get("image_head")
    image_head = None if head_width is None else nn.Linear(identity.width, head_width)
    model = LiT(text, identity, center=center, image_head=image_head, logit_bias=config["logit_bias"])
    if text is not None:
        load_whole(_TextPart(model), folder / TEXT_TOWER)
    if image_head is not None:
        load_whole(image_head, folder / IMAGE_HEAD)
    weights = folder / "image_tower.safetensors"
    if towers == "image" or (towers == "both" and (weights.is_file() or image_tower is not None)):
        if not identity.imported:
            model.image_tower = Locked(load_image_tower(identity, weights, image_tower))
        elif isinstance(image_tower, ImageTower):
            model.identity, model.image_tower = _adopt(identity, image_tower)
        else:
            raise _without_image_tower(identity)
    model.name = folder.absolute().name
    model.run_folder = folder if (folder / "settings.json").is_file() else None
    return model.to(pick_device(device)).eval()


def as_model(
    model: str | Path | LiT,
    *,
    device: str | torch.device | None = None,
    towers: Literal["both", "text", "image"] = "both",
) -> LiT:
    """Load the model at a path, or `lit:NAME`; an open one is returned as it is, where it is.

    Raises:
        UsageError: no model there, or a device for a model that is open already.
        TowerError: its weights do not fit, or are not there.
    """
    if not isinstance(model, LiT):
        return load(model, device=device, towers=towers)
    if device is not None and torch.device(device) != model.device:
        raise UsageError(f"the model is open on {model.device}; move it with model.to({str(device)!r})")
    return model


def merge_lora(folder: str | Path, out: str | Path) -> None:
    """Write a model that was tuned with LoRA as an ordinary one, with the same vectors and no need of `peft`.

    Raises:
        UsageError: no model there, or it has no LoRA; or `out` holds a model.
        TowerError: its weights do not fit, or are not there.
    """
    if (Path(out) / "config.json").exists():
        raise UsageError(f"{out} holds a model; give another --out")
    model = load(folder)
    if model.text_tower is None:
        raise UsageError(f"{folder} has no text tower, so there is no LoRA to merge")
    model.text_tower.merge_lora()
    model.save(out)


def save_image_tower(tower: nn.Module, folder: Path) -> None:
    """Write the weights of an image tower beside the text tower that reads it."""
    save_model(tower, str(folder / "image_tower.safetensors"))


def _load_published(spec: str, towers: Literal["both", "text", "image"]) -> LiT:
    published = Published(spec)
    image = open_published_image_tower(published)
    text = None if towers == "image" else open_published_text_tower(published)
    opened = None if towers == "text" else image
    model = LiT(text, image.identity(), opened, logit_multiplier=published.logit_multiplier)
    model.name = Path(spec.removeprefix("lit:")).stem
    return model.eval()


def _without_image_tower(identity: TowerIdentity) -> TowerError:
    if identity.imported:
        return TowerError(
            f"this model was tuned on imported vectors, made by {identity.spec}, and has no image tower to open "
            "images with. Where you have that tower, give it in Python: "
            "lamplit.load(FOLDER, image_tower=lamplit.open_image_tower(...))"
        )
    return TowerError(f"this model is open without its image tower ({identity.spec}); load it with towers='both'")


def _adopt(identity: TowerIdentity, tower: ImageTower) -> tuple[TowerIdentity, Locked]:
    """Take a tower for the one that made imported vectors, on the word of who gives it."""
    if tower.width != identity.width:
        raise TowerError(
            f"{tower.spec} gives vectors {tower.width} wide, but the model reads those of {identity.spec}, which are "
            f"{identity.width} wide"
        )
    logger.warning(
        "nothing can prove that %s made the vectors this model reads (they were imported, made by %s); compare "
        "model.encode_images of some images with their vectors",
        tower.spec,
        identity.spec,
    )
    return replace(identity, preprocessing=tower.preprocessing), Locked(tower)


def _decode(image: ImageInput) -> Tensor:
    if isinstance(image, Image.Image):
        return convert_image(image)
    return decode_image(open_bytes(Path(image) if isinstance(image, str) else image))
