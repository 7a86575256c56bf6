"""Results beside the figures that belong to them: of the same data set, task, metric and language."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lamplit.evaluation.report.figures import SUPERVISED, Figure, is_rank, shown
from lamplit.metrics.results import Measure, Result

# The seven data sets whose mean accuracy the paper calls VTAB natural (section 4 and appendix I.2)
VTAB_NATURAL = ("caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn")
TASKS = ("zero-shot classification", "few-shot classification", "image-text retrieval")


@dataclass(frozen=True)
class ReportRow:
    """One metric of one result, and the figure it is compared with, if there is one."""

    task: str
    benchmark: str
    dataset: str
    language: str
    metric: str
    main: bool  # the metric that papers print for this benchmark
    model: str
    value: float
    low: float
    high: float
    images: int
    reference: Figure | None = None
    same_model: bool = False  # the reference is a figure of this very model
    difference: float | None = None  # how far the value is above the reference
    verdict: str = ""  # the 95 % interval has the reference `inside`, or is wholly `above` or `below` it

    @property
    def title(self) -> str:
        """The data set, and its language where this is not English."""
        return self.dataset if self.language == "en" else f"{self.dataset} ({self.language})"

    @property
    def name(self) -> str:
        """The data set among the results of other tasks."""
        return f"{self.title}, few-shot" if self.task == "few-shot classification" else self.title

    @property
    def shown(self) -> bool:
        """Whether it belongs into the table of all results: the main metrics do, and those with a figure."""
        return self.main or self.reference is not None

    @property
    def interval(self) -> str:
        """The 95 % interval in words."""
        return f"{shown(self.metric, self.low)} to {shown(self.metric, self.high)}"

    @property
    def distance(self) -> str:
        """The difference in percentage points (in places, of a rank), with its sign."""
        if self.difference is None:
            return ""
        points = self.difference if is_rank(self.metric) else 100 * self.difference
        return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")

    def words(self) -> tuple[str, ...]:
        """Data set, metric, model, value, interval, published value, of which model, difference, verdict."""
        of = self.reference
        published = ("", "") if of is None else (shown(self.metric, of.value), of.model)
        value = shown(self.metric, self.value)
        return (self.name, self.metric, self.model, value, self.interval, *published, self.distance, self.verdict)


def with_means(results: Sequence[Result]) -> list[Result]:
    """Add VTAB natural for every model that has all of its seven data sets.

    The interval is of a mean of independent data sets: half widths add up as squares.
    """
    by_name = {(result.model["name"], result.benchmark): result for result in results if _counts_for_vtab(result)}
    added = []
    for model in dict.fromkeys(result.model["name"] for result in results):
        parts = [by_name[model, name] for name in VTAB_NATURAL if (model, name) in by_name]
        if len(parts) == len(VTAB_NATURAL) and (model, "vtab-natural") not in by_name:
            added.append(_mean(parts))
    return [*results, *added]


def compare(results: Iterable[Result], figures: Sequence[Figure]) -> list[ReportRow]:
    """Put every metric of every result beside its figure, in the order of the figures' benchmarks.

    A result is compared with the first figure of its own model, otherwise with the first of the benchmark.
    """
    tasks = {name: place for place, name in enumerate(TASKS)}
    places = {name: place for place, name in enumerate(dict.fromkeys(figure.benchmark for figure in figures))}

    def place(result: Result) -> tuple[int, int, str, str, str]:
        order = places.get(result.benchmark, len(places))
        language = "" if result.language == "en" else result.language
        return tasks.get(result.task, len(tasks)), order, result.benchmark, language, result.model["name"]

    return [_row(result, metric, figures) for result in sorted(results, key=place) for metric in result.metrics]


def beside(row: ReportRow, figures: Sequence[Figure]) -> list[Figure]:
    """All figures that a row can be read beside; those of supervised models too, as in the paper's Table 1."""
    tasks = (row.task, SUPERVISED) if row.task == TASKS[0] else (row.task,)
    wanted = (row.benchmark, row.metric, row.language)
    return [f for f in figures if (f.benchmark, f.metric, f.language) == wanted and f.task in tasks]


def _row(result: Result, metric: str, figures: Sequence[Figure]) -> ReportRow:
    measure, model = result.metrics[metric], result.model["name"]
    row = ReportRow(
        result.task, result.benchmark, result.dataset, result.language, metric, metric == result.main_metric, model,
        measure.value, measure.low, measure.high, result.images,
    )  # fmt: skip
    candidates = [figure for figure in beside(row, figures) if figure.task == row.task]
    own = [figure for figure in candidates if figure.is_of(model)]
    if not candidates:
        return row
    reference = (own or candidates)[0]
    verdict = "inside" if row.low <= reference.value <= row.high else "above" if row.low > reference.value else "below"
    return replace(
        row, reference=reference, same_model=bool(own), difference=row.value - reference.value, verdict=verdict
    )


def _counts_for_vtab(result: Result) -> bool:
    return result.task == TASKS[0] and result.language == "en" and "accuracy@1" in result.metrics


def _mean(parts: Sequence[Result]) -> Result:
    measures = [part.metrics["accuracy@1"] for part in parts]
    value = math.fsum(measure.value for measure in measures) / len(parts)
    below = math.hypot(*(measure.value - measure.low for measure in measures)) / len(parts)
    above = math.hypot(*(measure.high - measure.value for measure in measures)) / len(parts)
    return Result(
        task="zero-shot classification",
        benchmark="vtab-natural",
        dataset="VTAB natural",
        language="en",
        main_metric="accuracy@1",
        metrics={"accuracy@1": Measure(value, value - below, value + above)},
        model=parts[0].model,
        protocol={"notes": ["mean of " + ", ".join(part.dataset for part in parts)]},
        images=sum(part.images for part in parts),
        skipped=sum(part.skipped for part in parts),
        versions=parts[0].versions,
        time=max(part.time for part in parts),
        seconds=sum(part.seconds for part in parts),
    )
