"""LiT: a locked image tower, a text tower that reads it, and the multiplier of their cosines.

A saved model is a folder that works offline and can be read one tower at a time: `config.json`,
`text_tower.safetensors`, `image_tower.safetensors`, `tokenizer/`, and `image_head.safetensors` if there is one;
`split.safetensors` knows what it was tuned on, and what was held out;
`text_tower.onnx`, by which words are read without torch, is written beside them by `exports.text_graph`.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lamplit._version import __version__
from lamplit.data.inputs import ImageInput as ImageInput
from lamplit.data.split_record import FILE as SPLIT
from lamplit.data.split_record import SplitRecord
from lamplit.errors import TowerError, UsageError, kind_of
from lamplit.files import replacing, replacing_parts
from lamplit.locations.paths import require_local
from lamplit.store.lance_store import Store
from lamplit.towers.devices import is_same_device, pick_device
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, load_image_tower
from lamplit.towers.loading import load_whole, map_parameters
from lamplit.towers.lock import Locked
from lamplit.towers.model_folder import (
    CONFIG,
    FORMAT,
    IMAGE_HEAD,
    TEXT_GRAPH,
    TEXT_TOWER,
    TOKENIZER,
    read_config,
    saved_folder,
)
from lamplit.towers.opening import open_model
from lamplit.towers.saving import save_weights
from lamplit.towers.texts.text_tower import build_text_tower
from lamplit.towers.two_towers import LiTOutput as LiTOutput
from lamplit.towers.two_towers import TwoTowers, without_image_tower

logger = logging.getLogger(__name__)
Towers = Literal["both", "text", "image"]
IMAGE_TOWER = "image_tower.safetensors"
_RUN_SETTINGS = "settings.json"  # lamplit tune leaves it beside the model
_ROWS_AT_ONCE = 65536  # of a store, on the model's device


class LiT(TwoTowers):
    """Open one with `lamplit.load`; then `encode_texts`, `encode_images`.

    This is the two-tower model of the paper (section 3). Without an image head the locked space is the joint space.

    Args:
        text_tower: maps texts to vectors of the image tower's width; None if only images are encoded.
        identity: which image tower the text tower reads.
        image_tower: the tower itself, if images are to be encoded. The model holds this module, not a copy, and locks
            it: eval mode, no gradients.
        center: (D,) mean to subtract from unit image vectors, for stores made with `--mean-center`.
        image_head: maps the tower's vectors into the joint space, (N, D) to (N, E); None if the tower's own space is
            the joint one (the paper's best setting).
        logit_multiplier: first multiplier of cosines.
        logit_bias: first offset of the logits, for the sigmoid loss; None for softmax.
        trainable_image_tower: leave the image tower unlocked.

    Example:
        >>> model = lamplit.load("runs/stamps")
        >>> zimg = model.encode_images(["owl.png", "carp.png"])
        >>> ztxt = model.encode_texts(["an owl", "a fish", "a hat"])
        >>> logits = model.logit_multiplier * zimg @ ztxt.T  # (2, 3); plus model.logit_bias if it is not None
        >>> logits.softmax(-1)  # of a model of the softmax loss; of the sigmoid loss: logits.sigmoid()
    """

    run_folder: Path | None = None  # the tuning run that left the model; set by load()
    tuned_on: SplitRecord | None = None  # what it was tuned on, and what was held out; None if that is not known

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        device: str | torch.device | None = None,
        towers: Towers = "both",
        image_tower: nn.Module | None = None,
    ) -> LiT:
        """Load a model: the same as `lamplit.load`."""
        return load(name_or_folder, device=device, towers=towers, image_tower=image_tower)

    @torch.no_grad()
    def read_store(self, store: Store) -> Tensor:
        """Vectors of a store's images in the joint space, (N, E).

        Raises:
            StoreError: another tower embedded it.
        """
        store.require_tower(self.identity)
        return torch.cat([self.project_all(part) for part in torch.split(store.vectors(), _ROWS_AT_ONCE)])

    def save(self, folder: str | Path) -> None:
        """Write the model into `folder`; the model stays as it is. If anything fails, so does the folder.

        A tower that the model is open without is not written, nor one that was given to a model of imported vectors.
        What is there of a model of the same image tower stays; what is there of another's is removed.

        Raises:
            TowerError: the image tower is not the one that the model reads: what was saved could not be loaded.
            UsageError: `folder` is an address in object storage.
        """
        folder = Path(folder)
        tower = None if self.identity.imported else self.unlocked_image_tower
        config: dict[str, Any] = {
            "format": FORMAT,
            "lamplit": __version__,
            "image_tower": self._identity_saved_in(folder).to_dict(),
            "center": None if self.center is None else self.center.tolist(),
            "image_head": None if self.image_head is None else self.image_head.out_features,
            "text_tower": None,
            "logit_bias": None if self.logit_bias is None else float(self.logit_bias.detach()),
        }
        with replacing_parts(folder, CONFIG, self._not_its_own(folder, has_image_tower=tower is not None)) as partial:
            if self.text_tower is not None:
                config["text_tower"] = self.text_tower.describe()
                self.text_tower.save_tokenizer(partial / TOKENIZER)
                save_weights(_TextPart(self), partial / TEXT_TOWER)
            if self.image_head is not None:
                save_weights(self.image_head, partial / IMAGE_HEAD)
            if tower is not None:
                save_weights(tower, partial / IMAGE_TOWER)
            if self.tuned_on is not None:
                self.tuned_on.write(partial / SPLIT)
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _not_its_own(self, folder: Path, *, has_image_tower: bool) -> list[str]:
        """Name what a model that was saved in a folder before must not leave under this one."""
        names = [TEXT_GRAPH]  # made from the weights that were there before
        names += [SPLIT] if self.tuned_on is None else []
        names += [IMAGE_HEAD] if self.image_head is None else []
        if not _reads_tower(folder, self.identity):
            names += [] if has_image_tower else [IMAGE_TOWER]
            names += [TEXT_TOWER, TOKENIZER] if self.text_tower is None else []
        return names

    def _identity_saved_in(self, folder: Path) -> TowerIdentity:
        """Return the identity of the image tower as the saved model has it."""
        tower = self.unlocked_image_tower
        if tower is None or self.identity.imported:
            return self.identity
        if not isinstance(tower, ImageTower):
            raise TowerError(
                f"{kind_of(tower)} says nothing of its preprocessing; open it with lamplit.open_image_tower"
            )
        found = tower.identity()
        if not isinstance(self.image_tower, Locked):  # it trains, so it is another tower than it was
            return replace(found, spec=f"model:{folder.resolve()}")
        if found.fingerprint != self.identity.fingerprint:
            raise TowerError(
                f"the image tower has fingerprint {found.fingerprint}, but the model reads "
                f"{self.identity.fingerprint}: its weights or their precision were changed. Load the model again, and "
                "save that"
            )
        return self.identity


def _reads_tower(folder: Path, identity: TowerIdentity) -> bool:
    """Tell whether a model that reads this image tower is saved in a folder."""
    try:
        found: TowerIdentity = read_config(folder)["image_tower"]
    except UsageError:  # none, or one that nobody can read
        return False
    return found.fingerprint == identity.fingerprint


class _TextPart(nn.Module):
    """What `text_tower.safetensors` holds: the tower and the two scalars, never the image tower."""

    def __init__(self, model: LiT) -> None:
        super().__init__()
        self.text_tower = model.text_tower
        self.log_scale = model.log_scale
        self.logit_bias = model.logit_bias


def load(
    name_or_folder: str | Path,
    *,
    device: str | torch.device | None = None,
    towers: Towers = "both",
    image_tower: nn.Module | None = None,
) -> LiT:
    """Load a model in eval mode and without gradients; a saved one needs nothing but its folder.

    Args:
        name_or_folder: the folder that `LiT.save` or a tuning run wrote; `lit:NAME_OR_FILE`, a model that the
            paper's authors published (`lit:B16B_2`; `list_published` names them), from its own .npz file;
            `hf:NAME_OR_FOLDER`, a model that `lamplit push` put on the hub, or a two-tower model of transformers (CLIP,
            SigLIP, Chinese-CLIP and others);
            `open_clip:NAME/PRETRAINED` or `open_clip:FOLDER`; `st:NAME_OR_FOLDER`, a CLIP of sentence-transformers;
            `dinotxt:FOLDER`, Meta's files of dino.txt.
        device: torch device; by default the accelerator, if there is one.
        towers: load one alone to search (`text`) or embed (`image`) with less memory.
        image_tower: the module itself, for a model whose tower was given as one; for a model of imported vectors an
            open tower with its own weights, although nothing can prove that it made the vectors. A copy is used.

    Raises:
        UsageError: no model there, no such device, or no such towers.
        TowerError: the weights do not fit, or are missing.
        MissingExtraError: the library of the model is not installed.

    Example:
        >>> model = lamplit.load("runs/stamps", device="cpu")
    """
    if not isinstance(name_or_folder, str | Path):
        raise UsageError(
            "load takes a folder, or a name such as hf:NAME_OR_FOLDER; this is "
            + ("an open model: use it as it is" if isinstance(name_or_folder, LiT) else kind_of(name_or_folder))
        )
    where = pick_device(device)
    if towers not in get_args(Towers):
        raise UsageError(f"towers is {towers!r}; expected one of {', '.join(get_args(Towers))}")
    require_local(name_or_folder, "a model")
    folder = saved_folder(name_or_folder)
    if folder is not None:
        model = _load_folder(folder, towers, copy.deepcopy(image_tower))
        if folder != Path(name_or_folder):  # on the hub
            model.name = Path(str(name_or_folder).partition(":")[2]).name
    elif image_tower is None:
        model = _load_foreign(str(name_or_folder), towers)
    else:
        raise UsageError(f"{name_or_folder} brings its own image tower; leave out image_tower=")
    return model.to(where).eval().requires_grad_(False)


def as_model(model: str | Path | LiT, device: str | torch.device | None = None, towers: Towers = "both") -> LiT:
    """Load the model at a path or of a name; return an open one as it is, where it is.

    Raises:
        UsageError: no model there, or a device that an open model is not on.
        TowerError: the weights do not fit, or are missing.
    """
    if isinstance(model, str | Path):
        return load(model, device=device, towers=towers)
    if not isinstance(model, LiT):
        raise UsageError(f"the model is {kind_of(model)}; expected a folder, a name or what load returns")
    if device is not None and not is_same_device(pick_device(device), model.device):
        raise UsageError(f"the model is open on {model.device}; move it with model.to({str(device)!r})")
    return model


def merge_lora(model: str | Path | LiT, out: str | Path) -> None:
    """Write a model that was tuned with LoRA as an ordinary one, with the same vectors and no need of `peft`.

    On the command line: `lamplit merge`.

    Args:
        model: a folder, or an open model, which stays as it is.
        out: the folder to write.

    Raises:
        UsageError: no model there, or it has no LoRA; or `out` holds a model.
        TowerError: the weights do not fit, or are missing.
    """
    if (Path(out) / CONFIG).exists():
        raise UsageError(f"{out} holds a model; give another --out")
    merged = copy.deepcopy(model) if isinstance(model, LiT) else load(model, device="cpu")
    if merged.text_tower is None:
        raise UsageError(f"{model} has no text tower, so there is no LoRA to merge")
    merged.text_tower.merge_lora()
    merged.save(out)


def save_image_tower(tower: nn.Module, folder: Path) -> None:
    """Write the weights of an image tower beside the text tower that reads it."""
    with replacing(folder / IMAGE_TOWER) as partial:
        save_weights(tower, partial)


def restore(model: LiT, folder: Path) -> None:
    """Read the weights that were saved in `folder` into the model that saved them."""
    load_whole(_TextPart(model), folder / TEXT_TOWER)
    if model.image_head is not None:
        load_whole(model.image_head, folder / IMAGE_HEAD)
    if model.image_tower is not None and not isinstance(model.image_tower, Locked):
        load_whole(model.image_tower, folder / IMAGE_TOWER)


def map_text_tower(model: LiT, folder: Path) -> None:
    """Let the weights of a text tower that was loaded from `folder`, on the CPU, stay in their file, mapped."""
    map_parameters(_TextPart(model), folder / TEXT_TOWER)


def _load_folder(folder: Path, towers: Towers, image_tower: nn.Module | None) -> LiT:
    config = read_config(folder)
    identity: TowerIdentity = config["image_tower"]
    center = None if config["center"] is None else torch.tensor(config["center"])
    text = None
    if towers != "image" and config["text_tower"] is not None:
        text = build_text_tower(config["text_tower"], folder / TOKENIZER)
    head_width = config.get("image_head")
    image_head = None if head_width is None else nn.Linear(identity.width, head_width)
    model = LiT(text, identity, center=center, image_head=image_head, logit_bias=config["logit_bias"])
    if text is not None:
        load_whole(_TextPart(model), folder / TEXT_TOWER)
    if image_head is not None:
        load_whole(image_head, folder / IMAGE_HEAD)
    weights = folder / IMAGE_TOWER
    if towers == "image" or (towers == "both" and (weights.is_file() or image_tower is not None)):
        if not identity.imported:
            model.image_tower = Locked(load_image_tower(identity, weights, image_tower))
        elif isinstance(image_tower, ImageTower):
            model.identity, model.image_tower = _trust_image_tower(identity, image_tower)
        else:
            raise without_image_tower(identity)
    model.name = folder.absolute().name
    model.tuned_on = SplitRecord.find(folder)
    model.run_folder = folder if (folder / _RUN_SETTINGS).is_file() else None
    return model


def _load_foreign(spec: str, towers: Towers) -> LiT:
    opened = open_model(spec, text=towers != "image")
    model = LiT(
        opened.text,
        opened.image.identity(),
        None if towers == "text" else opened.image,
        logit_multiplier=opened.logit_multiplier,
        logit_bias=opened.logit_bias,
    )
    model.name = opened.name
    return model


def _trust_image_tower(identity: TowerIdentity, tower: ImageTower) -> tuple[TowerIdentity, Locked]:
    """Use a caller's tower for imported vectors; whether it made them cannot be verified."""
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
