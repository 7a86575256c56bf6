"""Results beside the figures that belong to them: of the same data set, task, metric and language."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lamplit.evaluation.report.figures import SUPERVISED, Figure, format_value, is_rank
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
    variant: str = ""  # see `Result`
    subject: str = ""  # see `Result`
    verdict: str = ""  # the 95 % interval has the reference `inside`, or is wholly `above` or `below` it

    @property
    def title(self) -> str:
        """The data set, its language if this is not English, and its variant."""
        return _title(self.dataset, self.language, self.variant)

    @property
    def key(self) -> tuple[str, ...]:
        """The fields that are equal in results of several models that belong together."""
        return self.task, self.benchmark, self.language, self.variant

    @property
    def name(self) -> str:
        """The data set among the results of other tasks."""
        return f"{self.title}, few-shot" if self.task == "few-shot classification" else self.title

    @property
    def in_summary(self) -> bool:
        """Whether it belongs in the table of all results: the main metrics do, and those with a published figure."""
        return self.main or self.reference is not None

    @property
    def interval(self) -> str:
        """The 95 % interval in words."""
        return f"{format_value(self.metric, self.low)} to {format_value(self.metric, self.high)}"

    @property
    def distance(self) -> str:
        """The difference in percentage points (in places, of a rank), with its sign."""
        if self.difference is None:
            return ""
        points = self.difference if is_rank(self.metric) else 100 * self.difference
        return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")

    def words(self) -> tuple[str, ...]:
        """Data set, metric, model, value, interval, published value, its model, difference, verdict."""
        of = self.reference
        published = ("", "") if of is None else (format_value(self.metric, of.value), of.model)
        value = format_value(self.metric, self.value)
        return (self.name, self.metric, self.model, value, self.interval, *published, self.distance, self.verdict)


def with_means(results: Sequence[Result]) -> list[Result]:
    """Add VTAB natural for every model that has all of its seven data sets.

    The interval is of a mean of independent data sets: half widths add up as squares.
    """
    by_name = {(r.model["name"], r.variant, r.benchmark): r for r in results if _counts_for_vtab(r)}
    added = []
    for model, variant in dict.fromkeys((result.model["name"], result.variant) for result in results):
        parts = [by_name[model, variant, name] for name in VTAB_NATURAL if (model, variant, name) in by_name]
        if len(parts) == len(VTAB_NATURAL) and (model, variant, "vtab-natural") not in by_name:
            added.append(_mean(parts))
    return [*results, *added]


def compare(results: Iterable[Result], figures: Sequence[Figure]) -> list[ReportRow]:
    """Put every metric of every result beside its figure, in the order of the figures' benchmarks.

    A result is compared with the first figure of its own model, otherwise with the first of the benchmark.
    """
    tasks = {name: i for i, name in enumerate(TASKS)}
    benchmarks = {name: i for i, name in enumerate(dict.fromkeys(figure.benchmark for figure in figures))}

    def order(result: Result) -> tuple[int, int, str, str, str, str]:
        benchmark = benchmarks.get(result.benchmark, len(benchmarks))
        language = "" if result.language == "en" else result.language
        task = tasks.get(result.task, len(tasks))
        return task, benchmark, result.benchmark, language, result.variant, result.model["name"]

    return [_row(result, metric, figures) for result in sorted(results, key=order) for metric in result.metrics]


def result_key(result: Result) -> tuple[str, ...]:
    """Return the `key` of a result's rows."""
    return result.task, result.benchmark, result.language, result.variant


def title_of(result: Result) -> str:
    """Return the `title` of a result's rows."""
    return _title(result.dataset, result.language, result.variant)


def _title(dataset: str, language: str, variant: str) -> str:
    named = dataset if language in ("en", "own") else f"{dataset} ({language})"
    return f"{named}, {variant}" if variant else named


def beside(row: ReportRow, figures: Sequence[Figure]) -> list[Figure]:
    """All figures that a row can be read beside; those of supervised models too, as in the paper's Table 1.

    Those of another folder's results are of the same data set, column and split.
    """
    tasks = (row.task, SUPERVISED) if row.task == TASKS[0] else (row.task,)
    wanted = (row.benchmark, row.metric, row.language)
    return [
        f
        for f in figures
        if (f.benchmark, f.metric, f.language) == wanted and f.task in tasks and f.subject in ("", row.subject)
    ]


def _row(result: Result, metric: str, figures: Sequence[Figure]) -> ReportRow:
    measure, model = result.metrics[metric], result.model["name"]
    row = ReportRow(
        result.task, result.benchmark, result.dataset, result.language, metric, metric == result.main_metric, model,
        measure.value, measure.low, measure.high, result.images, variant=result.variant, subject=result.subject,
    )  # fmt: skip
    candidates = [figure for figure in beside(row, figures) if figure.task == row.task]
    candidates.sort(key=lambda figure: figure.way != result.way)  # one that was measured alike comes first
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
        variant=parts[0].variant,
        protocol={"notes": ["mean of " + ", ".join(part.dataset for part in parts)]},
        images=sum(part.images for part in parts),
        skipped=sum(part.skipped for part in parts),
        versions=parts[0].versions,
        time=max(part.time for part in parts),
        seconds=sum(part.seconds for part in parts),
    )
