"""The report of an export: its files, and how far its vectors are from the model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ExportReport:
    """The outcome of one export. Vectors are unit vectors of the joint space."""

    to: str
    folder: str
    sample: str  # the inputs that were compared, in words
    differences: dict[str, float] = field(default_factory=dict)  # largest difference of any coordinate, by tower
    # lowest cosine of image vectors if the other library prepares the images itself; None if it does not
    preprocessing_cosine: float | None = None
    int8: dict[str, Any] | None = None  # int8 files and their agreement with float32; None if none were asked for
    notes: list[str] = field(default_factory=list)  # differences that the comparison cannot see, in words
    files: dict[str, int] = field(default_factory=dict)  # size in bytes, by name
