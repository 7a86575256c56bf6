"""Open both towers of a model that others made, by the library that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamplit.errors import UsageError
from lamplit.towers.images.image_tower import ImageTower, open_image_tower, open_published_image_tower
from lamplit.towers.published.big_vision import Published
from lamplit.towers.texts.text_sides import open_text_side
from lamplit.towers.texts.text_tower import TextTower, open_published_text_tower
from lamplit.towers.whole_models import read_whole_config


@dataclass(frozen=True)
class OpenedModel:
    """Both towers of a model and its scalars; if no text tower was asked for, the scalars mean nothing."""

    name: str  # to show
    image: ImageTower
    text: TextTower | None
    logit_multiplier: float = 10.0
    logit_bias: float | None = None


def open_model(spec: str, *, text: bool = True) -> OpenedModel:
    """Open a model of another library, on the CPU.

    Args:
        spec: `lit:NAME_OR_FILE` or `hf:NAME_OR_FOLDER`.
        text: whether the text tower is wanted too.

    Raises:
        UsageError: there is no such library, or it has no such model.
        TowerError: the model cannot be opened, lacks weights, or does what lamplit does not know.
    """
    library, _, name = spec.partition(":")
    if library == "lit":
        published = Published(spec)
        return OpenedModel(
            Path(name).stem,
            open_published_image_tower(published),
            open_published_text_tower(published) if text else None,
            published.logit_multiplier,
        )
    if library != "hf" or not name:
        raise UsageError(f"{spec!r} is not a model; expected lit:NAME or hf:NAME_OR_FOLDER")
    read_whole_config(spec, name)  # which says so if it is one tower alone
    image = open_image_tower(spec)
    if not text:
        return OpenedModel(Path(name).name, image, None)
    side = open_text_side(spec, name)
    return OpenedModel(Path(name).name, image, side.tower, side.logit_multiplier, side.logit_bias)
