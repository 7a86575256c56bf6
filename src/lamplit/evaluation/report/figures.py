"""Published figures: what the paper and its authors' model cards print, each with its source (`figures.csv`).

The first version of the paper and its third differ, since the largest model was loaded wrongly at first; both are
kept, as revisions `v1` and `v3`. The rows that Papers with Code listed have their place there in `leaderboard`:
task, dataset and metric as that site wrote them. Nothing here was measured by lamplit.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from io import StringIO
from pathlib import Path

from lamplit.errors import UsageError
from lamplit.metrics.results import Result

SUPERVISED = "supervised classification"  # a figure of a model that learned from the labels; lamplit has no such task
_PUBLISHED = files("lamplit") / "evaluation" / "report" / "figures.csv"


@dataclass(frozen=True)
class Figure:
    """One figure that somebody published, or that another folder of results holds."""

    benchmark: str  # lamplit's name: imagenet-v2
    task: str  # of `Result`, or "supervised classification"
    metric: str  # accuracy@1, image_to_text/recall@1
    value: float  # between 0 and 1; a rank from 1
    model: str
    data: str = ""  # what it was tuned on
    revision: str = ""  # of the paper, v1 or v3
    checkpoint: str = ""  # the released model that it is, such as L16L
    source: str = ""
    leaderboard: str = ""  # Zero-Shot Transfer Image Classification | ImageNet V2 | Accuracy (Private)
    language: str = "en"
    subject: str = ""  # `Result.subject` of a result in another folder; published figures are of whole benchmarks
    way: str = ""  # `Result.way` of the same

    def is_of(self, model: str) -> bool:
        """Whether it is a figure of the model that a result calls `model`."""
        if self.checkpoint == "":
            return model == self.model
        names = {self.model, *(f"{prefix}{self.checkpoint}" for prefix in ("", "lit:", "LiT-"))}
        return model in names or (model.startswith("lit:") and Path(model[4:]).name == f"LiT-{self.checkpoint}.npz")


def read_figures(file: str | Path | None = None) -> list[Figure]:
    """Read figures from a CSV file with the columns of `Figure`; by default the published ones.

    Their order counts: of several of a benchmark, a result of another model is compared with the first.

    Args:
        file: needs the columns benchmark, task, metric, value and model; the others may be left out.

    Raises:
        UsageError: it is not such a file.
    """
    path = _PUBLISHED if file is None else Path(file)
    try:
        rows = list(csv.DictReader(StringIO(path.read_text(encoding="utf-8-sig")), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file} cannot be read as a CSV file of figures: {error}") from error
    known = [column.name for column in fields(Figure) if column.name not in ("subject", "way")]
    needed = {column.name for column in fields(Figure) if column.default is MISSING}
    if not rows or not needed <= set(rows[0]):
        raise UsageError(f"{file} has no figures; expected a CSV file with the columns {', '.join(known)}")
    return [
        _figure({name: row[name] for name in known if row.get(name)}, f"line {line} of {file}")
        for line, row in enumerate(rows, start=2)
    ]


def figures_of(results: Sequence[Result], source: str) -> list[Figure]:
    """Take the results of another folder as figures."""
    return [
        Figure(
            result.benchmark, result.task, metric, measure.value, result.model["name"],
            source=source, language=result.language, subject=result.subject, way=result.way,
        )
        for result in results
        for metric, measure in result.metrics.items()
    ]  # fmt: skip


def is_rank(metric: str) -> bool:
    """Whether a metric counts places, from 1, and is no share."""
    return metric.endswith("rank")


def format_value(metric: str, value: float | None) -> str:
    """Write a value as papers do: a share in percent with one decimal, a rank as it is; "" for None."""
    if value is None:
        return ""
    return f"{value:g}" if is_rank(metric) else f"{100 * value:.1f}"


def _figure(row: dict[str, str], where: str) -> Figure:
    try:
        value = float(row.pop("value"))
        figure = Figure(value=value, **row)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{where} is no figure: it needs benchmark, task, metric, value and model") from error
    if not (value >= 1 if is_rank(figure.metric) else 0 <= value <= 1):
        raise UsageError(f"{where} says {value}; figures are between 0 and 1: write 75.7 % as 0.757")
    return figure
