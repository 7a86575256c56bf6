"""Which tower made a vector, without the tower."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lamplit.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class TowerIdentity:
    """Which tower made a vector: all there is to know of it without its weights."""

    spec: str
    fingerprint: str
    width: int
    preprocessing: Preprocessing | None  # unknown of a tower whose vectors were imported
    config: dict[str, Any]
    weights: str | None = None  # the file they were read from, where it was not the library's own

    @property
    def pool(self) -> str | None:
        """How tokens are pooled, where it is not the library's own way."""
        pool: str | None = self.config.get("pool")
        return pool

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

    def space(self, behind: Sequence[NDArray[np.float32]] = ()) -> str:
        """Fingerprint of the joint space: that of the tower, and of what comes behind it if anything does.

        `behind` are the arrays of that, in order: a centre, the weight and the bias of an image head.
        """
        if not behind:
            return self.fingerprint
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
        for part in behind:
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo `to_dict` after a trip through JSON."""
        preprocessing = values["preprocessing"]
        return cls(**values | {"preprocessing": preprocessing and Preprocessing.from_dict(preprocessing)})
