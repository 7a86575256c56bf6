"""What was measured: one JSON file per model, data set and language, to be read again, cited and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lamplit.errors import UsageError

FORMAT = 1
TaskName = Literal["zero-shot classification", "few-shot classification", "image-text retrieval"]


@dataclass(frozen=True)
class Measure:
    """A figure between 0 and 1 (a rank, from 1) with its 95 % bootstrap interval over images or queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """Everything about one measurement; `metrics[main_metric]` is what papers print."""

    task: TaskName
    benchmark: str  # imagenet-v2
    dataset: str  # ImageNet V2
    language: str
    main_metric: str  # accuracy@1, image_to_text/recall@1
    metrics: Mapping[str, Measure]
    model: Mapping[str, str]  # name, image_tower, fingerprint, text_tower
    protocol: Mapping[str, Any]  # preprocessing, templates, class_names, canonicalized, split, notes
    images: int
    skipped: int = 0  # images of the data set that could not be used
    captions: int = 0
    classes: int = 0
    per_class: Sequence[Mapping[str, Any]] = field(default_factory=tuple)  # name, images, accuracy
    # class, predicted, images, examples (small JPEGs as data URIs)
    confusions: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    reliability: Mapping[str, Any] = field(default_factory=dict)  # error (ECE), bins of confidence, accuracy, images
    recall_curve: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of each direction, recall@1, @2, ...
    versions: Mapping[str, str] = field(default_factory=dict)
    time: str = ""  # ISO 8601, UTC
    seconds: float = 0.0

    @property
    def file_name(self) -> str:
        """`imagenet-v2.en.zero-shot.MODEL.json`; a second run of the same overwrites it."""
        parts = (self.benchmark, self.language, self.task.split()[0], self.model["name"])
        return ".".join(re.sub(r"[^\w-]+", "_", part) for part in parts) + ".json"

    def write(self, folder: str | Path) -> Path:
        """Write the result into `folder`, and return its file."""
        file = Path(folder) / self.file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")
        return file


def read_results(folder: str | Path) -> list[Result]:
    """Read all results of a folder, in the order of their file names.

    Raises:
        UsageError: there are none, or a file is not one.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise UsageError(
            f"no results in {folder}; make some with: lamplit evaluate MODEL --benchmark NAME=PATH --out {folder}"
        )
    return [_read(file) for file in files]


def _read(file: Path) -> Result:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("format") > FORMAT:
            raise UsageError(f"{file} was written by a newer lamplit; upgrade to read it")
        values["metrics"] = {name: Measure(**measure) for name, measure in values["metrics"].items()}
        return Result(**values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is not a result that lamplit evaluate wrote: {error}") from error
