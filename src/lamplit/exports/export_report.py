"""What an export wrote, and how far its vectors are from the model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ExportReport:
    """The outcome of one export; vectors are unit vectors of the joint space."""

    to: str
    folder: str
    sample: str  # what was compared, in words
    differences: dict[str, float] = field(default_factory=dict)  # largest of any coordinate, by what was compared
    preprocessing_cosine: float | None = None  # lowest, where the other library prepares the same images itself
    int8: dict[str, Any] | None = None  # files, and their agreement with float32
    notes: list[str] = field(default_factory=list)  # what is not the same, in words
    files: dict[str, int] = field(default_factory=dict)  # bytes
