"""Which tower made a vector, without the tower."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.fields import Fields


@dataclass(frozen=True)
class TowerIdentity:
    """Which tower made a vector: all that is known about it without its weights.

    Attributes:
        spec: what `open_image_tower` opened, such as `timm:vit_base_patch16_224`.
        fingerprint: digest of weights, preprocessing and architecture.
        width: of its vectors.
        preprocessing: how it wants its images; None if its vectors were imported.
        config: how to build the backbone again without its weights.
        weights: the file that its weights were read from; None if its library has its own.
    """

    spec: str
    fingerprint: str
    width: int
    preprocessing: Preprocessing | None
    config: dict[str, Any]
    weights: str | None = None

    @property
    def pool(self) -> str | None:
        """How tokens are pooled; None for the library's own way."""
        pool: str | None = self.config.get("pool")
        return pool

    @classmethod
    def of_imported(cls, spec: str, width: int) -> Self:
        """Identify a tower by its name and width alone, for vectors that were made elsewhere.

        Its fingerprint begins with `vectors-`, so that it is never taken for a fingerprint of weights.
        """
        digest = hashlib.blake2b(json.dumps([spec, width]).encode(), digest_size=16).hexdigest()
        return cls(spec, f"vectors-{digest}", width, None, {"library": "vectors"})

    @property
    def imported(self) -> bool:
        """Whether the vectors were imported, so that only the tower's name and width are known."""
        return bool(self.config.get("library") == "vectors")

    def space(self, behind: Sequence[NDArray[np.float32]] = ()) -> str:
        """Return the fingerprint of the joint space: the tower's own, or a digest of it and of what follows it.

        Args:
            behind: arrays of what follows the tower, in order: a centre, weight and bias of an image head.
        """
        if not behind:
            return self.fingerprint
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
        for part in behind:
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo `to_dict` after a trip through JSON.

        Raises:
            FieldError: a value is missing, unknown, or cannot be meant; the text names its key.
        """
        return cls.from_fields(Fields(values))

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Do what `from_dict` does with an object inside a file; errors name the whole key."""
        fields.require_known([field.name for field in dataclasses.fields(cls)])
        config = fields.inside("config")
        config.text("library")
        if config.has("pool"):
            config.text("pool")
        preprocessing = (
            Preprocessing.from_fields(fields.inside("preprocessing")) if fields.has("preprocessing") else None
        )
        weights = fields.text("weights") if fields.has("weights") else None
        width = fields.integer("width", least=1)
        return cls(fields.text("spec"), fields.text("fingerprint"), width, preprocessing, dict(config.values), weights)
