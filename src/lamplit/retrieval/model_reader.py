"""What search needs of a model, and how a model is opened for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lamplit.towers.identity import TowerIdentity
from lamplit.towers.model_folder import saved_folder
from lamplit.towers.texts.word_reader import WordReader, open_words
from lamplit.unit_vectors import as_array

if TYPE_CHECKING:  # a search by words does without torch, which a model brings
    import torch

    from lamplit.model import LiT


class Reader(Protocol):
    """A model as search sees it: arrays of float32 unit vectors in the joint space, (N, E).

    A `WordReader` is one, and so is every open model (see `as_reader`).
    """

    identity: TowerIdentity

    @property
    def space(self) -> str:
        """Fingerprint of the joint space."""

    def tokenize(self, texts: Sequence[str], /) -> list[list[int]]:
        """Return the token ids of each text."""

    def encode_texts(self, texts: Sequence[str], /) -> NDArray[np.float32]:
        """Embed N texts."""

    def encode_images(self, images: Sequence[Any], /) -> NDArray[np.float32]:
        """Embed N images."""

    def project_rows(self, zimg: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Bring (N, D) unit vectors of the image tower into the joint space."""


class ModelReader:
    """An open model as a `Reader`."""

    def __init__(self, model: LiT) -> None:
        self.model = model
        self.identity = model.identity

    @property
    def space(self) -> str:
        """Fingerprint of the joint space."""
        return self.model.space

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; none if the model is open without its text tower."""
        tower = self.model.text_tower
        return [[] for _ in texts] if tower is None else tower.tokenize(texts)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts: N strings in, (N, E) unit vectors out."""
        return as_array(self.model.encode_texts(texts))

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Embed images: N images in, (N, E) unit vectors out."""
        return as_array(self.model.encode_images(images))

    def project_rows(self, zimg: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bring (N, D) unit vectors of the image tower into the joint space, (N, E)."""
        return self.model.project_rows(zimg)


def as_reader(
    model: LiT | Reader | str | Path,
    *,
    texts: bool = True,
    images: bool = True,
    device: str | torch.device | None = None,
) -> Reader:
    """Open a model for search.

    A saved model that is asked for texts alone is read without torch, if its folder has a `text_tower.onnx` and no
    device is given.

    Args:
        model: an open model, the folder of a saved one, or `lit:NAME`.
        texts: whether texts are to be encoded.
        images: whether images are to be encoded.
        device: torch device for a model that is opened here; by default the accelerator, if there is one.

    Raises:
        UsageError: there is no model, or a device is given for a model that is open on another one.
        TowerError: its weights do not fit, or are missing.
    """
    if isinstance(model, str | Path):
        folder = saved_folder(model) if texts and not images and device is None else None
        words = None if folder is None else open_words(folder)
        if words is not None:
            return words
    elif isinstance(model, WordReader | ModelReader):
        return model
    from lamplit.model import LiT, as_model

    if not isinstance(model, LiT | str | Path):
        return model
    towers: Literal["both", "text", "image"] = "both" if texts == images else "text" if texts else "image"
    return ModelReader(as_model(model, device=device, towers=towers))
