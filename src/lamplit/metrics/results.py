"""Results: one JSON file per model, data set and task, to be read again, cited and compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lamplit.errors import UsageError
from lamplit.files import write_text

FORMAT = 2
TaskName = Literal["zero-shot classification", "few-shot classification", "image-text retrieval"]


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % bootstrap interval.

    Attributes:
        value: the figure: a fraction between 0 and 1, or a rank, from 1.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Result:
    """Everything about one measurement; `metrics[main_metric]` is what papers print.

    Attributes:
        task: zero-shot classification, few-shot classification, or image-text retrieval.
        benchmark: name on the command line, such as imagenet-v2; for a store or pairs, the file's name.
        dataset: name as papers write it, such as ImageNet V2; for a store or pairs, the path.
        language: code of the language of the texts; "own" for a store or pairs.
        main_metric: key of `metrics`, such as `accuracy@1` or `image_to_text/recall@1`.
        metrics: every figure by its name.
        model: `name`, `fingerprint`, `image_tower`, `image_tower_fingerprint` and `text_tower`.
        protocol: how it was measured: preprocessing, resize_mode, templates, canonicalized, split, notes.
        images: number of images that were measured.
        source: path of the data set.
        split: of a store: held_out (by which the run chose its best checkpoint), test (kept for its end), unseen (what
            the model was not tuned on, of pairs that it was), or all.
        column: of a store: the column with the texts or the labels.
        variant: in a report: what tells it from others of the same model and data set; not in the file.
        skipped: number of images of the data set that could not be used.
        captions: number of distinct captions; 0 for classification.
        classes: number of classes; 0 for retrieval.
        per_class: `name`, `images` and `accuracy` of each class.
        confusions: `class`, `predicted`, `images` (their number) and `examples` (small JPEGs as data URIs) of the most
            common mistakes.
        reliability: `error`, the expected calibration error, and `bins`, each with `confidence`, `accuracy` and
            `images`.
        recall_curve: recall@1, recall@2, ... of each direction, `image_to_text` and `text_to_image`.
        versions: of the libraries, by name.
        time: when it was measured, ISO 8601 in UTC.
        seconds: how long it took.
    """

    task: TaskName
    benchmark: str
    dataset: str
    language: str
    main_metric: str
    metrics: Mapping[str, Measure]
    model: Mapping[str, str]
    protocol: Mapping[str, Any]
    images: int
    source: str = ""
    split: str = ""
    column: str = ""
    variant: str = ""
    skipped: int = 0
    captions: int = 0
    classes: int = 0
    per_class: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    confusions: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    reliability: Mapping[str, Any] = field(default_factory=dict)
    recall_curve: Mapping[str, Sequence[float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    time: str = ""
    seconds: float = 0.0

    def __repr__(self) -> str:
        subject = " ".join(filter(None, (self.benchmark or self.source, self.split)))
        figure = self.metrics.get(self.main_metric)
        interval = f" {figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]" if figure else ""
        return f"<Result {subject}: {self.main_metric}{interval}>"

    @property
    def subject(self) -> str:
        """What was measured, wherever it lies: data set, column and split."""
        return " | ".join((Path(self.dataset).name, self.column, self.split))

    @property
    def way(self) -> str:
        """How it was measured, in 8 digits: preprocessing, prompts, class names and all else but notes."""
        asked = [self.main_metric, self.classes]
        protocol = {name: value for name, value in self.protocol.items() if name != "notes"}
        return _digest([asked, protocol])

    @property
    def file_name(self) -> str:
        """Name of the result's file: `imagenet-v2.en.zero-shot.MODEL-1a2b3c4d.5e6f7a8b.json`.

        The digits after the model's name are the first of its fingerprint; the others cover what was measured and how.
        So only a second run of the same measurement of the same model has the same name.
        """
        fingerprint = self.model.get("fingerprint", "")
        digest = _digest([self.source, self.dataset, self.column, self.split, self.task, self.way, fingerprint])
        model = "-".join(filter(None, (_part(self.model["name"]), fingerprint[:8])))
        name = Path(self.dataset).name
        known = _letters(name) in (_letters(self.benchmark), _letters(f"{self.benchmark}.lance"))
        parts = [self.benchmark, "" if known else name, self.column, self.split, self.language, self.task.split()[0]]
        return ".".join([*(_part(part) for part in parts if part), model, digest]) + ".json"

    def write(self, folder: str | Path) -> Path:
        """Write the result into `folder`, and return its file."""
        file = Path(folder) / self.file_name
        values = {name: value for name, value in asdict(self).items() if name != "variant"}
        write_text(file, json.dumps({"format": FORMAT, **values}, indent=1, ensure_ascii=False) + "\n")
        return file


def read_results(folder: str | Path) -> list[Result]:
    """Read all results of a folder, in the order of their file names; also those of older formats.

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
        format_number = values.pop("format")
        if format_number > FORMAT:
            raise UsageError(f"{file} was written by a newer lamplit; upgrade to read it")
        if format_number == 1:
            _upgrade(values)
        values["metrics"] = {name: Measure(**measure) for name, measure in values["metrics"].items()}
        return Result(**values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is not a result that lamplit evaluate wrote: {error}") from error


def _upgrade(values: dict[str, Any]) -> None:
    """Rename the fields of format 1 in place."""
    _rename(values, "pictures", "images")
    _rename(values["model"], "fingerprint", "image_tower_fingerprint")
    _rename(values["protocol"], "show", "resize_mode")
    for row in (*values["per_class"], *values["confusions"], *values["reliability"].get("bins", ())):
        _rename(row, "pictures", "images")
    split, _, column = str(values["protocol"].get("split", "")).rpartition("column ")
    if values["language"] == "own" and column:
        values["column"] = column
        if "captions" in split:
            values["split"] = "held_out" if split.startswith("captions held out") else "all"


def _rename(values: dict[str, Any], old: str, new: str) -> None:
    if old in values:
        values[new] = values.pop(old)


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()


def _part(text: str) -> str:
    """Make a part of a file's name: letters, digits, hyphens; short, since systems count its bytes."""
    return re.sub(r"[^\w-]+", "_", text).encode()[:40].decode(errors="ignore")


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()
