"""Where a timm model comes from: its registered name, a folder that timm wrote, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn

from lamplit.data.json_text import parse_json
from lamplit.errors import TowerError, UsageError, first_line
from lamplit.towers.loading import READ_ERRORS

_CONFIG = "config.json"
# In the order in which timm looks for them.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")
# Of create_model, not of the model: where weights come from and where they go.
_NOT_OF_THE_MODEL = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable",
    "exportable", "no_jit", "features_only", "device", "dtype",
}  # fmt: skip


@dataclass(frozen=True)
class TimmSource:
    """How timm builds a model, and where its weights are.

    Attributes:
        name: as timm registers it, with a tag or without.
        args: what it is built with beside its name, in JSON values.
        pretrained_cfg: preprocessing and classes, where a config.json says them; None for the registered ones.
        folder: that brought this and its weights; None if it is no folder.
        hub_id: of the repository that brought it; None if there is none.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] | None = None
    folder: Path | None = None
    hub_id: str | None = None

    def create(self, **options: Any) -> Any:
        """Build the model with random weights, or as the `options` of timm's create_model say."""
        cfg = {} if self.pretrained_cfg is None else {"pretrained_cfg": self.pretrained_cfg}
        return create_timm(self.name, self.args, **cfg, **options)

    def find_weights(self) -> Path:
        """Return the file of weights in the folder.

        Raises:
            TowerError: there is none.
        """
        assert self.folder is not None
        named = [self.folder / name for name in _WEIGHT_FILES]
        others = [file for suffix in _WEIGHT_SUFFIXES for file in sorted(self.folder.glob(f"*{suffix}"))]
        for file in (*named, *others):
            if file.is_file():
                return file
        raise TowerError(f"{self.folder} holds no weights; expected model.safetensors beside its {_CONFIG}")


def create_timm(name: str, args: dict[str, Any], **options: Any) -> Any:
    """Build timm's model `name`; layers in `args` may be given by the name that `timm.layers` has for them."""
    given = {key: value for key, value in args.items() if key not in _NOT_OF_THE_MODEL}
    layers = {key: getattr(timm.layers, value) for key, value in given.items() if key == "mlp_layer"}
    return timm.create_model(name, **(given | layers | options))


def build_timm(name: str, args: dict[str, Any] | None = None) -> nn.Module:
    """Build timm's model `name` without its classifier, with random weights.

    Raises:
        TowerError: timm does not build that.
    """
    model: Any = build_source(f"timm:{name}", TimmSource(name, args or {}))
    model.reset_classifier(0)
    built: nn.Module = model
    return built


def build_source(spec: str, source: TimmSource, **options: Any) -> Any:
    """Build the model of a source, with random weights unless `options` say more.

    Raises:
        TowerError: timm does not build that.
    """
    try:
        return source.create(**options)
    except (*READ_ERRORS, AssertionError) as error:  # what timm raises on arguments that it does not take
        raise TowerError(f"{spec} could not be built with {source.args}: {first_line(error)}") from error


def find_source(name: str) -> TimmSource:
    """Find what `timm:` is followed by: a name, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.

    Raises:
        UsageError: timm has no such model.
        TowerError: the folder or the repository cannot be read, or is not of timm.
    """
    try:
        origin, name = timm.models.parse_model_name(name)
    except ValueError as error:
        raise UsageError(
            f"timm has no model {name!r}; type timm:local-dir:FOLDER for a folder, timm:hf-hub:ORG/NAME for the hub, "
            "or a name that timm.list_models() has"
        ) from error
    if origin == "local-dir":
        return read_folder(Path(name))
    if origin == "hf-hub":
        with reaching_hub(name):
            found = load_model_config_from_hf(name)
        return _source(f"timm:hf-hub:{name}", *found, hub_id=name)
    _require_known(name)
    return TimmSource(name)


def read_folder(folder: Path) -> TimmSource:
    """Read the config.json that timm's save_for_hf writes.

    Raises:
        UsageError: timm has no model of this architecture.
        TowerError: it is not there, damaged, or not of timm.
    """
    if not (folder / _CONFIG).is_file():
        raise TowerError(f"there is no {folder / _CONFIG}; expected a folder that timm's save_for_hf wrote")
    if not is_timm_folder(folder):
        raise TowerError(
            f"{folder / _CONFIG} names no architecture of timm; a folder of transformers opens as hf:{folder}"
        )
    try:
        found = load_model_config_from_path(folder)
    except READ_ERRORS as error:
        raise TowerError(f"{folder / _CONFIG} is damaged: {first_line(error)}") from error
    return _source(f"timm:local-dir:{folder}", *found, folder=folder)


def is_timm_folder(folder: Path) -> bool:
    """Tell whether a folder has a config.json that names an architecture as timm's do."""
    try:
        config = parse_json((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("architecture"), str)


def source_beside(name: str, weights: Path) -> TimmSource | None:
    """Return what the config.json beside a file of weights says of the model `name`; None if there is none of it."""
    if not is_timm_folder(weights.parent):
        return None
    source = read_folder(weights.parent)
    return source if source.name == name.partition(".")[0] else None


@contextmanager
def reaching_hub(hub_id: str) -> Iterator[None]:
    """Turn what the hub's client raises into a `TowerError` that says what to type; only calls of it go inside."""
    try:
        yield
    except (*READ_ERRORS, AssertionError) as error:
        raise TowerError(
            f"timm:hf-hub:{hub_id} could not be fetched ({first_line(error)}). Where there is a network, type "
            f"`hf download {hub_id} --local-dir FOLDER` (after `hf auth login` if its authors ask for consent), then "
            "give timm:local-dir:FOLDER"
        ) from error


def _source(spec: str, cfg: dict[str, Any], name: str, args: dict[str, Any] | None, **where: Any) -> TimmSource:
    _require_known(name)
    size = tuple(cfg.get("input_size") or (3, 224, 224))
    if len(size) != 3 or size[0] != 3:
        raise TowerError(f"{spec} reads images of {size[0] if size else 'no'} channels; lamplit's have 3")
    kept = {key: value for key, value in (args or {}).items() if key not in _NOT_OF_THE_MODEL and value is not None}
    kept.pop("in_chans", None)
    if cfg.get("fixed_input_size"):
        kept.setdefault("img_size", list(size[1:]))
    unsourced = {key: value for key, value in cfg.items() if key not in ("source", "file", "hf_hub_id", "url")}
    return TimmSource(name, kept, unsourced, **where)


def _require_known(name: str) -> None:
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), 8)) or "see timm.list_models()"
        raise UsageError(f"timm has no model {name!r}; near it: {near}")
