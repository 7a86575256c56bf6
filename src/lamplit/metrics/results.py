"""What was measured: one JSON file per model, data set and language, to be read again, cited and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamplit.errors import UsageError

FORMAT = 1
RESAMPLES = 1000
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
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
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


def measure(values: ArrayLike, *, statistic: Literal["mean", "median"] = "mean", seed: int = 0) -> Measure:
    """Mean or median of one value per image or query, with its 95 % percentile bootstrap interval.

    Of 1,000 resamples only how often each distinct value comes is drawn, which is multinomial: right or wrong answers
    have two, whatever their number.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    total = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, RESAMPLES)
    summary = _means if statistic == "mean" else _medians
    low, high = np.percentile(summary(distinct, drawn), [2.5, 97.5])
    return Measure(float(summary(distinct, counts[None])[0]), float(low), float(high))


def _means(distinct: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of each row of counts (R, U) of the sorted values (U,)."""
    means: NDArray[np.float64] = counts @ distinct / counts.sum(1)
    return means


def _medians(distinct: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Median of each row, the mean of the two middle values where there are two."""
    reached, total = counts.cumsum(1), counts.sum(1, keepdims=True)
    middle = [(reached > place).argmax(1) for place in ((total - 1) // 2, total // 2)]
    medians: NDArray[np.float64] = (distinct[middle[0]] + distinct[middle[1]]) / 2
    return medians
