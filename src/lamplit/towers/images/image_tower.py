"""Image towers: a backbone with its preprocessing, from timm, transformers, a module of your own, or the demo.

Size, mean, deviation, interpolation, crop and pooling are read from the library that carries the tower.
Loading is strict: no tower is ever random unless `weights="random"` asks for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.fields import FieldError, Fields
from lamplit.errors import TowerError, UsageError
from lamplit.towers.dinotxt_models import SIDE, DinoTxt, open_dinotxt
from lamplit.towers.dinotxt_models import build_vision as build_dinotxt
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.backbone import Backbone, ClassHead
from lamplit.towers.images.open_clip_vision import open_vision, take_vision
from lamplit.towers.images.places import Places, find_places
from lamplit.towers.images.pooling import find_pools, pool_features, require_pool
from lamplit.towers.images.timm_models import DEMO_TOWERS, open_demo, open_timm
from lamplit.towers.images.transformers_models import build_transformers, open_transformers
from lamplit.towers.loading import load_whole
from lamplit.towers.lock import weights_digest
from lamplit.towers.model_folder import read_config, saved_folder
from lamplit.towers.open_clip_models import OpenClipModel, build_vision
from lamplit.towers.published.big_vision import Published, build_backbone
from lamplit.towers.timm_sources import build_timm
from lamplit.towers.whole_models import name_in_sentence_transformers


class ImageTower(nn.Module):
    """A backbone with its preprocessing: (B, 3, height, width) uint8 images in, (B, width) pooled features out.

    Opening it puts the backbone into eval mode and runs one image through it, on the device that it is on.

    Attributes:
        spec: what was opened, such as `timm:vit_base_patch16_224`.
        preprocessing: how it wants its images.
        config: how to build the backbone again without its weights, and its pooling if that is not the library's own.
        class_head: the classifier that the backbone came with, if its class names are known and it reads the pooled
            features; else None.
        weights: the file that the weights were read from; None for the library's own.
        width: of the features.
    """

    def __init__(
        self,
        spec: str,
        backbone: nn.Module,
        preprocessing: Preprocessing,
        config: dict[str, Any],
        class_head: ClassHead | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.preprocessing = preprocessing
        self.config = config
        self.class_head = class_head
        self.weights = weights
        self.pool: str | None = config.get("pool")
        self.eval()
        if self.pool is not None:
            require_pool(spec, self.pool, self.find_pools()[0])
        with torch.no_grad():  # no attribute for the width is common to all libraries
            blank = torch.zeros(1, 3, *preprocessing.image_size, dtype=torch.uint8, device=self.device)
            self.width = self(blank).shape[1]
        if class_head is not None and class_head.vectors.shape[1] != self.width:
            self.class_head = None  # the classifier reads something else than the pooled features

    @property
    def device(self) -> torch.device:
        """Where the tower is: the device of its first parameter or buffer, the CPU if it has none."""
        held = next(chain(self.backbone.parameters(), self.backbone.buffers()), None)
        return torch.device("cpu") if held is None else held.device

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, width) pooled features, not normalised, of (B, 3, height, width) uint8 images."""
        features = pool_features(self.backbone, self._normalized(images), self.pool)
        if features.ndim != 2:
            is_module = self.config["library"] == "module"
            raise TowerError(
                f"{self.spec} gives features of shape {tuple(features.shape)}; a tower gives one vector per "
                f"image, shape (B, width): {'pool them in the module' if is_module else 'choose how with --pool'}"
            )
        return features

    @torch.no_grad()
    def find_places(self, images: Tensor) -> Places:
        """Return the features of the places of (B, 3, height, width) uint8 images, and those of the images themselves.

        Raises:
            TowerError: this tower has no features of places.
        """
        try:
            return find_places(self.backbone, self._normalized(images), self.pool)
        except TowerError as error:
            offered = self.find_pools()[0] if self.config["library"] != "module" else []
            other = (
                "embed with --pool mean, and tune on that store" if "mean" in offered and self.pool != "mean"
                else "take one whose vector is the mean of its patches or of its last map, such as "
                "demo:efficientnet-lite0 or a SigLIP"
            )  # fmt: skip
            raise TowerError(f"{self.spec} cannot show where it reads words: {error}. For that, {other}") from error

    def _normalized(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing.normalize(images)
        weight = next(self.backbone.parameters(), None)
        return pixels if weight is None else pixels.to(weight.dtype)  # of a model in half precision

    @torch.no_grad()
    def find_pools(self) -> tuple[list[str], str | None]:
        """Return the poolings that this tower supports, and which of them is its library's own (None: another)."""
        noise = torch.rand(2, 3, *self.preprocessing.image_size, generator=torch.Generator().manual_seed(0))
        return find_pools(self.backbone, noise.to(self.device))

    def identity(self) -> TowerIdentity:
        """Return what identifies this tower; its fingerprint covers weights, preprocessing and architecture."""
        content = [weights_digest(self), self.preprocessing.to_dict(), self.config]
        fingerprint = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
        return TowerIdentity(self.spec, fingerprint, self.width, self.preprocessing, self.config, self.weights)


def open_image_tower(
    tower: str | nn.Module,
    *,
    weights: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    pool: str | None = None,
) -> ImageTower:
    """Open an image tower.

    Args:
        tower: `timm:NAME`, `timm:local-dir:FOLDER`, `timm:hf-hub:ORG/NAME`, `hf:NAME_OR_FOLDER`, `lit:NAME_OR_FILE`
            (that of a published model), `model:FOLDER` (that of a saved model, tuned or not),
            `open_clip:NAME/PRETRAINED` or `open_clip:FOLDER` (that of a model of open_clip, with its projection),
            `st:NAME_OR_FOLDER` (that of a CLIP of sentence-transformers), `dinotxt:FOLDER` (a DINO with the head of its
            dino.txt),
            `demo:efficientnet-lite0` (or 1, 2), or a module that maps (B, 3, height, width) float images to
            (B, width) features. An `hf:` checkpoint of a whole CLIP or SigLIP
            opens as its vision tower and gives what transformers calls its image features (CLIP's are projected);
            timm's CLIP towers give the class token before that projection.
        weights: for a timm tower, a safetensors file, state dict or trainer's checkpoint, in which the backbone is
            looked for; `"random"` for untrained weights; None for the pretrained ones of the library.
        preprocessing: needed for a module; for other towers it replaces what the library says.
        pool: `cls`, `mean` (of the patch tokens), `map` (a trained attention pooling) or `cls+mean`, if the tower
            supports it; None for what the library's own head uses.

    Returns:
        The tower in eval mode, on the CPU; a module of yours stays where it is.

    Raises:
        UsageError: the spec or the pooling is not one of the above.
        TowerError: the weights cannot be fetched, or do not fit; or the tower does not support the pooling.

    Example:
        >>> tower = lamplit.open_image_tower("timm:vit_base_patch16_224")
        >>> tower(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape
        torch.Size([1, 768])
    """
    if isinstance(tower, nn.Module):
        return _wrap_module(tower, weights, preprocessing, pool)
    tower = str(tower)  # what is no name is refused with the other wrong ones
    library, _, name = tower.partition(":")
    if library == "model" and name:
        return _open_saved(saved_folder(name) or Path(name), weights, preprocessing, pool)
    opened = _open_backbone(tower, weights, preprocessing)
    if preprocessing is not None:
        opened = replace(opened, preprocessing=preprocessing)
    origin = None if weights is None else "random" if weights == "random" else str(Path(weights).resolve())
    if pool is None:
        return _tower(tower, opened, origin)
    pooled = _tower(tower, replace(opened, config=opened.config | {"pool": pool}, class_head=None), origin)
    if pool == pooled.find_pools()[1]:  # the same tower, whether or not its pooling was named
        return _tower(tower, opened, origin)
    return pooled


def open_published_image_tower(published: Published) -> ImageTower:
    """Open the image tower of a published model; its head, if it has one, is part of the tower."""
    return _tower(published.spec, _published_backbone(published), None)


def _open_backbone(tower: str, weights: str | Path | None, preprocessing: Preprocessing | None) -> Backbone:
    """Open the backbone that a spec names, by the library that carries it."""
    library, _, name = tower.partition(":")
    if library == "timm" and name:
        return open_timm(name, weights, preprocessing)
    if library == "hf" and name:
        return open_transformers(name, weights, preprocessing)
    if library == "st" and name:
        return open_transformers(name_in_sentence_transformers(tower), weights, preprocessing)
    if library == "demo" and name in DEMO_TOWERS:
        if weights is not None:
            raise UsageError(f"{tower} brings its own weights; for others, open timm:{DEMO_TOWERS[name]}")
        return open_demo(name)
    if library not in ("lit", "open_clip", "dinotxt") or not name:
        demos = ", ".join(f"demo:{demo}" for demo in DEMO_TOWERS)
        kinds = (
            f"timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME_OR_FOLDER, lit:NAME, dinotxt:FOLDER, model:FOLDER or {demos}"
        )
        raise UsageError(f"{tower!r} is not an image tower; expected {kinds}")
    if weights is not None:
        raise UsageError(f"{tower} brings its own weights")
    if library == "dinotxt":
        return _dinotxt_backbone(open_dinotxt(tower))
    return open_vision(tower) if library == "open_clip" else _published_backbone(Published(tower))


def open_clip_image_tower(spec: str, opened: OpenClipModel) -> ImageTower:
    """Open the image tower of a model of open_clip that is open already."""
    return _tower(spec, take_vision(spec, opened), None)


def dinotxt_image_tower(spec: str, opened: DinoTxt) -> ImageTower:
    """Open the image tower of a dino.txt that is open already."""
    return _tower(spec, _dinotxt_backbone(opened), None)


def build_image_tower(identity: TowerIdentity) -> ImageTower:
    """Build the tower that `identity` names, with weights still to be loaded.

    Raises:
        TowerError: the tower is a module that only its owner can build.
    """
    config = Fields(identity.config, "config")
    try:
        library = config.text("library")
        if library == "timm":
            args = config.inside("args").values if config.has("args") else {}
            backbone = build_timm(config.text("name"), dict(args))
        elif library == "transformers":
            config.inside("config").text("model_type")
            backbone = build_transformers(identity.config)
        elif library == "open_clip":
            config.inside("vision_cfg"), config.integer("embed_dim"), config.flag("quick_gelu")
            backbone = build_vision(identity.config)
        elif library == "dinotxt":
            config.text("backbone"), config.inside("args").integer("embed_dim", least=1)
            config.integer("num_layers", most=100), config.integer("mlp_width", least=1)
            backbone = build_dinotxt(identity.config)
        elif library == "lit":
            sizes = {
                key: config.integer(key) if config.has(key) else None
                for key in config.values
                if key not in ("library", "pool")
            }
            backbone = build_backbone(**sizes)  # type: ignore[arg-type]  # what may be None is the layout's to know
        else:
            raise TowerError(f"{identity.spec} was given as a module; pass the module itself as image_tower=")
    except FieldError as error:
        raise TowerError(f"the description of {identity.spec} is damaged: {error}") from error
    assert identity.preprocessing is not None, "only imported vectors come without, and no library made them"
    return ImageTower(identity.spec, backbone, identity.preprocessing, identity.config)


def load_image_tower(identity: TowerIdentity, weights: Path, module: nn.Module | None = None) -> ImageTower:
    """Build a tower and load its weights from a saved model; `module` is needed if only its owner can build it.

    Raises:
        TowerError: the weights are not there, do not fit, or are those of another tower.
    """
    if identity.preprocessing is None:
        raise TowerError(f"the vectors of {identity.spec} were imported, so the tower itself is not here to be opened")
    if module is None:
        tower = build_image_tower(identity)
    else:
        tower = ImageTower(identity.spec, module, identity.preprocessing, identity.config)
    if module is None or weights.is_file():  # else it brings its own, and the fingerprint says whether they are right
        load_whole(tower, weights)
    found = tower.identity().fingerprint
    if found != identity.fingerprint:
        whose = weights if weights.is_file() else "the module"
        raise TowerError(f"{whose} has fingerprint {found}, but the model reads {identity.fingerprint}")
    return tower


def _open_saved(
    folder: Path, weights: str | Path | None, preprocessing: Preprocessing | None, pool: str | None
) -> ImageTower:
    spec = f"model:{folder.resolve()}"
    try:
        identity: TowerIdentity = read_config(folder)["image_tower"]
    except UsageError as error:
        raise TowerError(str(error)) from error
    changed = (preprocessing or identity.preprocessing, pool or identity.pool)
    if weights is not None or changed != (identity.preprocessing, identity.pool):
        raise UsageError(f"{spec} has its own weights, preprocessing and pooling; they cannot be replaced")
    return load_image_tower(replace(identity, spec=spec, weights=None), folder / "image_tower.safetensors")


def _tower(spec: str, opened: Backbone, weights: str | None) -> ImageTower:
    return ImageTower(spec, opened.module, opened.preprocessing, opened.config, opened.class_head, weights)


def _dinotxt_backbone(opened: DinoTxt) -> Backbone:
    preprocessing = Preprocessing(
        (SIDE, SIDE), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, interpolation="bicubic", crop_fraction=SIDE / 256
    )
    return Backbone(opened.vision, preprocessing, opened.vision_config)


def _published_backbone(published: Published) -> Backbone:
    config = {"library": "lit", **published.layout.image.config}
    return Backbone(published.read_backbone(), published.preprocessing, config)


def _wrap_module(
    module: nn.Module, weights: str | Path | None, preprocessing: Preprocessing | None, pool: str | None
) -> ImageTower:
    if weights is not None:
        raise UsageError("a module has its weights; load other ones into it before it is given")
    if pool is not None:
        raise UsageError("a module pools as it was written; let its forward pool otherwise")
    if preprocessing is None:
        raise UsageError(
            "a module does not say how it wants its images; open it first: lamplit.open_image_tower(module, "
            "preprocessing=lamplit.Preprocessing((224, 224), mean, std))"
        )
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return ImageTower(f"module:{name}", module, preprocessing, {"library": "module", "name": name})
