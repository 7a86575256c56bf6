"""Open both towers of a model that others made, by the library that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamplit.errors import TowerError, UsageError
from lamplit.towers.dinotxt_models import open_dinotxt
from lamplit.towers.images.image_tower import (
    ImageTower,
    dinotxt_image_tower,
    open_clip_image_tower,
    open_image_tower,
    open_published_image_tower,
)
from lamplit.towers.open_clip_models import open_open_clip
from lamplit.towers.published.big_vision import Published
from lamplit.towers.texts.dinotxt_texts import take_dinotxt_text
from lamplit.towers.texts.open_clip_texts import take_text
from lamplit.towers.texts.text_sides import open_text_side
from lamplit.towers.texts.text_tower import TextTower, open_published_text_tower
from lamplit.towers.whole_models import name_in_sentence_transformers, read_whole_config


@dataclass(frozen=True)
class OpenedModel:
    """Both towers of a model and its scalars; if no text tower was asked for, the scalars mean nothing."""

    name: str  # to show
    image: ImageTower
    text: TextTower | None
    logit_multiplier: float = 10.0
    logit_bias: float | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.text.width != self.image.width:
            raise TowerError(
                f"{self.image.spec} gives vectors of {self.image.width} numbers for images and {self.text.width} for "
                "texts; a model has one width"
            )


def open_model(spec: str, *, text: bool = True) -> OpenedModel:
    """Open a model of another library, on the CPU.

    Args:
        spec: `lit:NAME_OR_FILE`, `hf:NAME_OR_FOLDER`, `open_clip:NAME/PRETRAINED`, `open_clip:FOLDER`,
            `st:NAME_OR_FOLDER` or `dinotxt:FOLDER`.
        text: whether the text tower is wanted too.

    Raises:
        UsageError: there is no such library, or it has no such model.
        MissingExtraError: its library is not installed.
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
    if library == "open_clip" and name:
        opened = open_open_clip(spec)
        return OpenedModel(
            Path(name).name,
            open_clip_image_tower(spec, opened),
            take_text(spec, opened) if text else None,
            opened.logit_multiplier,
            opened.logit_bias,
        )
    if library == "dinotxt" and name:
        dino = open_dinotxt(spec)
        return OpenedModel(
            Path(name).name,
            dinotxt_image_tower(spec, dino),
            take_dinotxt_text(spec, dino) if text else None,
            dino.logit_multiplier,
        )
    if library == "st" and name:
        whole = name_in_sentence_transformers(spec)
    elif library == "hf" and name:
        whole = name
    else:
        raise UsageError(
            f"{spec!r} is not a model; expected hf:NAME_OR_FOLDER, open_clip:NAME_OR_FOLDER, st:NAME_OR_FOLDER, "
            "dinotxt:FOLDER or lit:NAME"
        )
    read_whole_config(spec, whole)  # which says so if it is one tower alone
    image = open_image_tower(spec)
    if not text:
        return OpenedModel(Path(name).name, image, None)
    side = open_text_side(spec, whole)
    return OpenedModel(Path(name).name, image, side.tower, side.logit_multiplier, side.logit_bias)
