"""The report as Markdown, as CSV and as JSON in the shape of Papers with Code's evaluation tables.

Shares are written in percent, as papers do; the results' own files keep them unrounded. The JSON has the shape that
https://github.com/paperswithcode/sota-extractor describes (Task, Dataset, Sota, SotaRow), which is that of the site's
`evaluation-tables.json`; beside `sota` every data set has `results`, the same figures one by one.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

from lamplit.evaluation.report.figures import Figure, format_value, is_rank
from lamplit.evaluation.report.report_rows import ReportRow, beside, title_of
from lamplit.metrics.results import Result

# How Papers with Code called them
_TASKS = {
    "zero-shot classification": "Zero-Shot Transfer Image Classification",
    "few-shot classification": "Few-Shot Image Classification",
    "image-text retrieval": "Zero-Shot Cross-Modal Retrieval",
    "supervised classification": "Image Classification",
}
_METRICS = {"accuracy@1": "Accuracy", "accuracy@5": "Top 5 Accuracy"} | {
    f"{direction}/recall@{k}": f"{title} R@{k}"
    for direction, title in (("image_to_text", "Image-to-text"), ("text_to_image", "Text-to-image"))
    for k in (1, 5, 10)
}
_PAPER = {
    "paper_title": "LiT: Zero-Shot Transfer with Locked-image text Tuning",
    "paper_url": "https://arxiv.org/abs/2111.07991",
    "paper_date": "2021-11-15",
    "code_links": [
        {"title": "google-research/vision_transformer", "url": "https://github.com/google-research/vision_transformer"},
        {"title": "google-research/big_vision", "url": "https://github.com/google-research/big_vision"},
    ],
}
_NO_PAPER: dict[str, Any] = {"paper_title": "", "paper_url": "", "paper_date": None, "code_links": []}


def flat(rows: Sequence[ReportRow], figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """One line per figure: what was measured, then what was published of the same, then the leaderboards' rest.

    The first five columns are those of a paper's page at Papers with Code.
    """
    lines: dict[int, dict[str, Any]] = {}  # of each published figure, once
    for row in rows:
        lines |= {id(figure): _published_line(figure, row.title) for figure in beside(row, figures)}
    lines |= {id(f): _published_line(f, f.benchmark) for f in figures if f.leaderboard and id(f) not in lines}
    return [*(_measured_line(row) for row in rows), *lines.values()]


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write what `flat` made; measured lines come first and have an interval."""
    file = StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_tables(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Build Papers with Code's evaluation tables of what `flat` made: tasks, their data sets, and rows by model."""
    tasks: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        tasks.setdefault(line["task"], {}).setdefault(line["dataset"], []).append(line)
    return [
        {
            "task": task,
            "description": "",
            "subtasks": [],
            "datasets": [_dataset(name, inside) for name, inside in datasets.items()],
            "source_link": None,
        }
        for task, datasets in tasks.items()
    ]


def as_markdown(
    results: Sequence[Result], rows: Sequence[ReportRow], figures: Sequence[Figure], against: str | None
) -> str:
    """Write the results beside their figures, the leaderboards' rows and the protocol of every result."""
    models = dict.fromkeys(row.model for row in rows)
    parts = ["# Results of " + ", ".join(map(_cell, models)), ""]
    parts += [
        "In percent, with 95 % bootstrap intervals over images or queries."
        + (f" Compared with {_cell(against)}." if against else "")
        + " A difference is in percentage points; `inside` means that the interval contains the published figure.",
        "",
    ]
    parts += _markdown_table(
        ("data set", "metric", "model", "value", "95 % interval", "published", "of", "difference", "interval"),
        [row.words() for row in rows if row.in_summary],
    )
    if any(figure.leaderboard for figure in figures):
        parts += ["", "## Rows of Papers with Code", ""]
        header = ("task", "dataset", "metric", "value", "model", *(f"measured: {model}" for model in models))
        parts += _markdown_table(header, leaderboard(rows, figures))
    parts += ["", "## Protocol", ""]
    for result in results:
        lines = "; ".join(f"{name}: {_cell(value)}" for name, value in protocol(result))
        parts.append(f"- **{_cell(title_of(result))}**, {_cell(result.model['name'])}: {lines}")
    return "\n".join([*parts, ""])


def leaderboard(rows: Sequence[ReportRow], figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """Task, dataset, metric, value and model of every row of Papers with Code, then the value of every model here."""
    measured: dict[tuple[str, ...], float] = {}
    for row in rows:
        if row.language == "en":  # of several measurements the first
            measured.setdefault((row.task, row.benchmark, row.metric, row.model), row.value)
    models = dict.fromkeys(row.model for row in rows)
    lines = []
    for figure in figures:
        if figure.leaderboard:
            ours = (measured.get((figure.task, figure.benchmark, figure.metric, model)) for model in models)
            values = (
                format_value(figure.metric, figure.value),
                figure.model,
                *(format_value(figure.metric, v) for v in ours),
            )
            lines.append((*figure.leaderboard.split(" | "), *values))
    return lines


def protocol(result: Result) -> list[tuple[str, str]]:
    """How a result was measured, as names and words."""
    lines = [(name, _words(value)) for name, value in result.protocol.items() if value not in (None, "", [], {})]
    skipped = f", {result.skipped:,} skipped" if result.skipped else ""
    lines.append(("images", f"{result.images:,}{skipped}"))
    lines += [
        (name, f"{count:,}") for name, count in (("captions", result.captions), ("classes", result.classes)) if count
    ]
    lines += [(name, str(value)) for name, value in result.model.items() if name != "name" and value]
    lines += [("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items()))]
    lines += [("measured", f"{result.time} in {result.seconds:,.0f} s" if result.seconds else result.time)]
    return [(name.replace("_", " "), value) for name, value in lines if value]


def _measured_line(row: ReportRow) -> dict[str, Any]:
    line = _line(_TASKS.get(row.task, row.task), row.title, _METRICS.get(row.metric, row.metric), row.metric, row.value)
    of = row.reference
    return line | {
        "model": row.model,
        "low": _number(row.metric, row.low),
        "high": _number(row.metric, row.high),
        "images": row.images,
        "language": row.language,
        "benchmark": row.benchmark,
        "published": "" if of is None else _number(row.metric, of.value),
        "published_model": "" if of is None else of.model,
        "difference": "" if of is None else round(_number(row.metric, row.value) - _number(row.metric, of.value), 2),
        "interval": row.verdict,
    }


def _published_line(figure: Figure, title: str) -> dict[str, Any]:
    task, dataset, metric = _TASKS.get(figure.task, figure.task), title, _METRICS.get(figure.metric, figure.metric)
    if figure.leaderboard:
        task, dataset, metric = figure.leaderboard.split(" | ")
    return _line(task, dataset, metric, figure.metric, figure.value) | {
        "model": figure.model,
        "language": figure.language,
        "benchmark": figure.benchmark,
        "data": figure.data,
        "revision": figure.revision,
        "source": figure.source,
    }


def _line(task: str, dataset: str, metric: str, measure: str, value: float) -> dict[str, Any]:
    first = {"task": task, "dataset": dataset, "metric": metric, "value": _number(measure, value)}
    others = ("model", "low", "high", "images", "language", "benchmark", "published", "published_model", "difference")
    return first | dict.fromkeys((*others, "interval", "data", "revision", "source"), "")


def _number(metric: str, value: float) -> float:
    return round(value, 2) if is_rank(metric) else round(100 * value, 2)


def _dataset(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    models: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines:  # a model with private and public data had one row there
        key = (line["model"], line["source"], "" if "Papers with Code" in line["source"] else line["data"])
        paper = _PAPER if "2111.07991" in line["source"] else _NO_PAPER
        empty = {"model_name": line["model"], **paper, "model_links": [], "metrics": {}, "source": line["source"]}
        models.setdefault(key, empty)["metrics"][line["metric"]] = f"{line['value']:g}"
    flat_fields = ("task", "dataset", "metric", "value", "model")
    return {
        "dataset": name,
        "description": "",
        "subdatasets": [],
        "dataset_links": [],
        "dataset_citations": [],
        "sota": {"metrics": list(dict.fromkeys(line["metric"] for line in lines)), "rows": list(models.values())},
        "results": [{field: line[field] for field in flat_fields} for line in lines],
    }


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    made = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in made]


def _cell(text: str) -> str:
    # A name must not end its cell, nor become a tag, a link or emphasis in any renderer of Markdown.
    return re.sub(r"([\\`*|\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(inside)}" for name, inside in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_words(inside) for inside in value)
    return str(value)
