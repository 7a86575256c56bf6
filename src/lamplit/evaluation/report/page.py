"""The report as one page: no script, nothing fetched, light and dark, for a desk, a phone and paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lamplit._version import __version__
from lamplit.evaluation.report import documents, plots
from lamplit.evaluation.report.figures import Figure, format_value, is_rank
from lamplit.evaluation.report.report_rows import ReportRow, beside, result_key
from lamplit.metrics.results import Result

_FOLDER = files("lamplit") / "evaluation" / "report"
_WORST = 10  # classes that are named
_MAX_IMAGES = 100  # of a page, at 2 to 4 KB each
_IMAGE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]{1,40000}")


@dataclass(frozen=True)
class Bar:
    """A class and how often it was right, in percent."""

    name: str
    accuracy: float
    images: int


@dataclass(frozen=True)
class Confusion:
    """What a class was mistaken for, with examples as data: URIs; None for an image that is missing."""

    right: str
    predicted: str
    images: int
    examples: Sequence[str | None]


@dataclass(frozen=True)
class ModelSection:
    """One model in a section."""

    place: int  # of the model in the report, which chooses its colour and mark
    model: str
    worst: Sequence[Bar]
    confusions: Sequence[Confusion]
    protocol: Sequence[tuple[str, str]]
    calibration: str  # expected calibration error, in percent


@dataclass(frozen=True)
class Section:
    """Everything about one data set, task and language."""

    key: str  # safe in ids
    name: str
    task: str
    classes: int
    metrics: Sequence[tuple[str, Sequence[ReportRow | None]]]  # of each metric, the row of each part
    parts: Sequence[ModelSection]
    published: Sequence[Figure]
    classes_plot: Markup | None
    recall_plot: Markup | None
    reliability_plot: Markup | None


def render(results: Sequence[Result], rows: Sequence[ReportRow], figures: Sequence[Figure], against: str | None) -> str:
    """Render the page.

    Args:
        results: what was measured.
        rows: the same, beside the figures.
        figures: all published figures.
        against: whose figures these are, in words.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    lines = _lines(rows, figures, models)
    leaderboard = documents.leaderboard(rows, figures)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string((_FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - lamplit's own file
        version=__version__,
        models=models,
        marks=plots.MARKS,
        colors=plots.COLORS,
        compared=any(row.reference is not None for row in rows),
        listed=any("".join(line[5:]) for line in leaderboard),
        against=against,
        summary=_summary(rows, models),
        accuracy_plot=plots.accuracy_plot(lines),
        difference_plot=plots.difference_plot(lines) if any(line.same_model for line in lines) else None,
        leaderboard=leaderboard,
        sections=_sections(results, rows, figures, models),
        format_value=format_value,
        times=sorted(result.time for result in results if result.time),
    )


def _summary(rows: Sequence[ReportRow], models: Sequence[str]) -> list[tuple[ReportRow, list[ReportRow | None]]]:
    """Lines of the table of all results: one row of the line for its names, then that of each model."""
    lines: dict[tuple[str, ...], dict[str, ReportRow]] = {}
    for row in rows:
        if row.in_summary:
            lines.setdefault((*row.key, row.metric), {})[row.model] = row
    return [(next(iter(line.values())), [line.get(model) for model in models]) for line in lines.values()]


def _lines(rows: Sequence[ReportRow], figures: Sequence[Figure], models: Sequence[str]) -> list[plots.Line]:
    made = []
    for first, line in _summary(rows, models):
        if is_rank(first.metric):
            continue
        there = [(place, row) for place, row in enumerate(line) if row is not None]
        measured = [(place, 100 * row.value, 100 * row.low, 100 * row.high) for place, row in there]
        reference = {place: 100 * row.reference.value for place, row in there if row.reference is not None}
        same = {place for place, row in there if row.same_model}
        published = sorted({round(100 * figure.value, 2) for figure in beside(first, figures)})
        made.append(plots.Line(_label(first), measured, reference, same, published))
    return made


def _label(row: ReportRow) -> str:
    """Name a data set in few words, with its metric unless this is the plain accuracy."""
    metric = {"image_to_text/recall@1": "image → text", "text_to_image/recall@1": "text → image"}.get(
        row.metric, row.metric
    )
    return row.name + ("" if row.metric == "accuracy@1" else f", {metric}")


def _sections(
    results: Sequence[Result], rows: Sequence[ReportRow], figures: Sequence[Figure], models: Sequence[str]
) -> list[Section]:
    groups: dict[tuple[str, ...], list[Result]] = {row.key: [] for row in rows}  # in their order
    for result in sorted(results, key=lambda result: models.index(result.model["name"])):
        groups[result_key(result)].append(result)
    num_pairs = sum(len(result.confusions) for result in results)
    pairs = max(2, min(12, _MAX_IMAGES // max(1, sum(bool(result.confusions) for result in results))))
    made: list[Section] = []
    for group_key, group in groups.items():
        inside = [row for row in rows if row.key == group_key]
        key = f"s{len(made)}-" + re.sub(r"[^a-z0-9]+", "-", inside[0].benchmark.lower()).strip("-")
        made.append(
            _section(
                key,
                group,
                inside,
                figures,
                models,
                _Examples(pairs, max(1, min(4, _MAX_IMAGES // max(1, num_pairs)))),
            )
        )
    return made


@dataclass(frozen=True)
class _Examples:
    pairs: int  # confusions of one result that there is room for
    of_each: int


def _section(
    key: str,
    group: Sequence[Result],
    rows: Sequence[ReportRow],
    figures: Sequence[Figure],
    models: Sequence[str],
    examples: _Examples,
) -> Section:
    places = {id(result): models.index(result.model["name"]) for result in group}
    by_metric = {row.metric: [_find(rows, row.metric, result) for result in group] for row in rows}
    published = {id(figure): figure for row in rows for figure in beside(row, figures)}
    classes = {places[id(r)]: sorted(float(each["accuracy"]) for each in r.per_class) for r in group if r.per_class}
    curves = {places[id(result)]: result.recall_curve for result in group if any(result.recall_curve.values())}
    bins = {
        places[id(r)]: r.reliability["bins"] for r in group if any(b["images"] for b in r.reliability.get("bins", ()))
    }
    return Section(
        key=key,
        name=rows[0].name,
        task=rows[0].task,
        classes=max(result.classes for result in group),
        metrics=list(by_metric.items()),
        parts=[_part(places[id(result)], result, examples) for result in group],
        published=sorted(published.values(), key=lambda figure: (figure.metric, is_rank(figure.metric), -figure.value)),
        classes_plot=plots.classes_plot(key, classes) if max(map(len, classes.values()), default=0) > _WORST else None,
        recall_plot=plots.recall_plot(key, curves) if curves else None,
        reliability_plot=plots.reliability_plot(key, bins) if bins else None,
    )


def _part(place: int, result: Result, examples: _Examples) -> ModelSection:
    worst = sorted(result.per_class, key=lambda each: (float(each["accuracy"]), -each["images"], each["name"]))
    error = result.reliability.get("error")
    return ModelSection(
        place,
        result.model["name"],
        [Bar(str(each["name"]), 100 * float(each["accuracy"]), each["images"]) for each in worst[:_WORST]],
        [_confusion(each, examples) for each in result.confusions[: examples.pairs]],
        documents.protocol(result),
        "" if error is None else f"{100 * error:.1f}",
    )


def _confusion(values: Mapping[str, Any], examples: _Examples) -> Confusion:
    names = list(values.get("examples", ()))[: examples.of_each]
    # Anybody can have written a result's file, so only small images come into the page.
    images = [str(name) if _IMAGE.fullmatch(str(name)) else None for name in names]
    return Confusion(str(values["class"]), str(values["predicted"]), values["images"], images)


def _find(rows: Sequence[ReportRow], metric: str, result: Result) -> ReportRow | None:
    return next((row for row in rows if row.metric == metric and row.model == result.model["name"]), None)
