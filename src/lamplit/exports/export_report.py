"""The report of an export: its files, and how far its vectors are from the model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ExportReport:
    """The outcome of one export. Vectors are unit vectors of the joint space.

    Attributes:
        to: the other library.
        folder: what was written.
        sample: the inputs that were compared, in words.
        differences: largest difference of any coordinate of a vector, by tower.
        preprocessing_cosine: lowest cosine of image vectors if the other library prepares the images itself; None if it
            does not.
        int8: int8 files and their agreement with float32, of each input `alone` and of all `in_batch`, because dynamic
            quantisation makes a vector depend on its batch; None if none were asked for.
        notes: differences that the comparison cannot see, in words.
        files: size in bytes of each file, by name.
    """

    to: str
    folder: str
    sample: str
    differences: dict[str, float] = field(default_factory=dict)
    preprocessing_cosine: float | None = None
    int8: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
