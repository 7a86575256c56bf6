"""The folder of a saved model: the names of its files, and its description, `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamplit.data.fields import FieldError, Fields
from lamplit.data.named.repositories import fetch_repository, read_repository_json
from lamplit.errors import UsageError
from lamplit.towers.identity import TowerIdentity

FORMAT = 3  # of config.json: 2 may have a kernel head, 3 the parts of other libraries' models
CONFIG = "config.json"
TEXT_TOWER = "text_tower.safetensors"
TEXT_GRAPH = "text_tower.onnx"
IMAGE_HEAD = "image_head.safetensors"
TOKENIZER = "tokenizer"
LIBRARIES = ("lit", "hf", "open_clip", "st", "dinotxt")  # whose models are opened as LIBRARY:NAME


def names_model(name_or_folder: object) -> bool:
    """Tell whether this is the name of a model of another library, such as `lit:B16B_2`, and no folder."""
    library, colon, _ = str(name_or_folder).partition(":")
    return bool(colon) and library in LIBRARIES


def saved_folder(name_or_folder: str | Path) -> Path | None:
    """Return the folder of a model that lamplit saved; None if the name is that of another library's model.

    Args:
        name_or_folder: the folder itself; or `hf:NAME_OR_FOLDER`, which is fetched from the hub if lamplit saved what
            is there.

    Raises:
        TowerError: the repository cannot be fetched.
    """
    if not names_model(name_or_folder):
        return Path(name_or_folder)
    library, _, name = str(name_or_folder).partition(":")
    config = read_repository_json(name, CONFIG) if library == "hf" and name else None
    if config is None or not {"lamplit", "image_tower", "text_tower"} <= config.keys():
        return None
    return Path(name) if Path(name).is_dir() else fetch_repository(name, "model")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the description of a saved model; its `image_tower` is a `TowerIdentity`.

    Raises:
        UsageError: there is none, it is damaged (the message names the key), or a newer lamplit wrote it.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UsageError(_why_no_model(folder))
    try:
        fields = Fields.parse(file.read_bytes())
        if fields.integer("format", least=1) > FORMAT:
            raise UsageError(
                f"{file} has format {fields.integer('format')}; this lamplit reads up to {FORMAT}: upgrade it"
            )
        identity = TowerIdentity.from_fields(fields.inside("image_tower"))
        _check(fields, identity)
    except FieldError as error:
        raise UsageError(
            f"{file} is not the config.json of a model that lamplit tune wrote, or damaged: {error}"
        ) from error
    return (
        {key: None for key in ("center", "image_head", "logit_bias")} | dict(fields.values) | {"image_tower": identity}
    )


def _why_no_model(folder: Path) -> str:
    """Say why there is no model at a path: a tower's name, a store, nothing at all or something else."""
    name = str(folder)
    library, colon, rest = name.partition(":")
    if colon and library == "model":
        return f"{name} names the image tower of a model; for the model itself leave out model:, and type {rest}"
    if colon and (library == "timm" or rest.startswith("efficientnet")):
        return (
            f"{name} is a tower, not a model; embed with it, then tune: lamplit embed SOURCE --image-tower {name} "
            "--out STORE (in Python lamplit.embed, lamplit.tune)"
        )
    if colon and library in ("demo", "scratch"):
        return (
            f"{name} is a tower, not a model; tune it first: lamplit tune STORE --text-tower {name} --out FOLDER "
            "(in Python lamplit.tune)"
        )
    if (folder / "_versions").is_dir():  # Lance's
        return f"{name} is a store, not a model; the model comes first: MODEL STORE"
    expected = "expected a folder that lamplit tune wrote, or a name: hf:, open_clip:, st:, dinotxt: or lit:"
    if not folder.exists():
        return f"there is no folder {name}; {expected}"
    return f"no model at {name}: it has no config.json; {expected}"


# Far above any tower. A damaged number would be built until the memory is full.
_MOST = 10_000_000
_MOST_LAYERS, _MOST_RANK = 1000, 10_000
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # in the words of transformers' models


def _check(fields: Fields, identity: TowerIdentity) -> None:
    """Check what a model says about its parts, so that nobody needs to who reads it."""
    if fields.has("center"):
        fields.numbers("center", identity.width)
    if fields.has("image_head"):
        fields.integer("image_head", least=1, most=_MOST)
    if fields.has("logit_bias"):
        fields.number("logit_bias")
    if "text_tower" not in fields.values:
        raise FieldError("text_tower is missing; expected null or an object")
    if not fields.has("text_tower"):
        return
    text = fields.inside("text_tower")
    text.text("spec")
    text.choice("pooling", ("cls", "mean", "last"))
    for key in ("context_length", "width", "feature_width"):
        text.integer(key, least=1, most=_MOST)
    _check_encoder(text.inside("config"))
    if text.has("anchors"):
        text.integer("anchors", least=1, most=_MOST)
    if text.has("lora"):
        text.integer("lora", least=1, most=_MOST_RANK)
    if text.has("layers"):
        layers = text.inside("layers")
        layers.integer("hidden_width", least=1, most=_MOST)
        layers.choice("activation", ("gelu", "tanh"))
    if text.has("tokenizer"):
        kinds = ("transformers", "sentencepiece", "wordpiece", "open_clip", "open_clip_pairs", "static")
        if text.inside("tokenizer").choice("kind", kinds) != "wordpiece" and text.inside("tokenizer").has("fill"):
            text.inside("tokenizer").choice("fill", ("left", "right"))


def _check_encoder(config: Fields) -> None:
    library = config.choice("library", ("scratch", "transformers", "open_clip", "dinotxt", "static"))
    if library in ("scratch", "dinotxt"):
        config.integer("num_layers", least=1, most=_MOST_LAYERS)
        sizes = ["vocab_size", "width", "context_length"] + ["num_heads"] * (library == "scratch")
        for key in sizes + ["mlp_width"] * (library == "dinotxt" or config.has("mlp_width")):
            config.integer(key, least=1, most=_MOST)
    elif library == "static":
        for key in ("vocab_size", "width"):
            config.integer(key, least=1, most=_MOST)
    elif library == "transformers":
        settings = config.inside("config")
        settings.text("model_type")
        for key in filter(settings.has, _LAYERS):
            settings.integer(key, most=_MOST_LAYERS)
