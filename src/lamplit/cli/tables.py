"""Results as tables for people; machines get the same results as JSON.

`record` makes a table of any dataclass by the names of its fields. Only results that are more than names and values
have a function of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from lamplit.evaluation.report.writing import Report
    from lamplit.exports.export_report import ExportReport
    from lamplit.metrics.results import Result
    from lamplit.planning.plan_report import Plan
    from lamplit.publishing.pushing import PushReport
    from lamplit.retrieval.searcher import Hit
    from lamplit.store.duplicates import DuplicateGroup
    from lamplit.tuning.comparison import Comparison
    from lamplit.tuning.tune_report import TuneReport
    from lamplit.zeroshot.calibration_report import CalibrationReport
    from lamplit.zeroshot.classifier import Prediction

MAX_LISTED_CLASSES = 100  # more are in the JSON file
_LABELS = {  # of fields whose name alone does not tell
    "out": "model",
    "moved": "moved or copied",
    "probes": "partitions that a query looks at",
    "recall": "recall@10",
    "milliseconds": "milliseconds a query",
    "truncated_texts": "texts cut at the context length",
    "mistakes": "so many times",
}
_NOTES = {"missing": "their rows stay, --prune deletes them"}  # what follows a count above zero


def record(report: Any, labels: Mapping[str, str] | None = None) -> list[Table]:
    """Make a table of the names and values of a dataclass or a mapping.

    Fields that hold mappings or lists of records are left out, and so are values of None. Images that were skipped are
    counted, with the file of the reasons.

    Args:
        report: the dataclass or mapping.
        labels: names in plain English, by field; by default the field's own name.
    """
    values = {field.name: getattr(report, field.name) for field in fields(report)} if is_dataclass(report) else report
    table = _table("name", "value", show_header=False)
    reasons = values.get("skipped_file")
    for name, value in values.items():
        note = f"reasons in {reasons}" if name == "skipped" and reasons else _NOTES.get(name, "")
        shown = len(value) if name == "skipped" and not isinstance(value, int) else value
        if name == "skipped_file" or shown is None or isinstance(shown, list | tuple | dict):
            continue
        _add_row(table, _label(name, labels), f"{_value(shown)}; {note}" if note and shown else _value(shown))
    return [table]


def description(found: Mapping[str, Any]) -> list[Table]:
    """Show what a model or a store is, under the names that `describe` gives."""
    return record(found, {name: name for name in found})


def items(found: Sequence[Any], labels: Mapping[str, str] | None = None, title: str | None = None) -> Table:
    """Make a table of dataclasses of one kind: a row for each, a column for each field."""
    names = [field.name for field in fields(found[0])] if found else []
    table = _table(*(_label(name, labels) for name in names), title=title)
    for item in found:
        _add_row(table, *(_value(getattr(item, name)) for name in names))
    return table


def tune_report(report: TuneReport) -> list[Table]:
    """Show what trains, the held-out recall before, at its best and at the end, and the run."""
    return [what_trains(report.trains), recall_table(report), *_test_table(report), *record(report)]


def plan(found: Plan) -> list[Table]:
    """Show what embedding and tuning will cost: time by what it is spent on, and bytes by what they are."""
    tables = []
    for name, stage in (("embed", found.embed), ("tune", found.tune)):
        table = _table("", "cost", title=f"lamplit {name}")
        for part, seconds in stage.parts.items():
            _add_row(table, f"time: {part}", _duration(seconds))
        _add_row(table, "time in all", _duration(stage.seconds))
        for file, size in stage.disk.items():
            _add_row(table, f"disk: {file}", _size(size))
        _add_row(table, "memory: weights and what trains them", _size(stage.memory))
        tables.append(table)
    reached = dict(found.recall)
    title = f"what {reached.pop('icons'):,.0f} icons reached; yours will differ"  # no more were tried
    recall = _table("", "image_to_text/recall@5", title=title)
    for when, value in reached.items():
        _add_row(recall, when, f"{value:.3f}")
    counted = {name: getattr(found, name) for name in ("images", "pairs", "captions", "backend", "steps", "dollars")}
    return [*record(counted), *tables, recall, *([_noted(found.notes)] if found.notes else [])]


def _noted(notes: Sequence[str]) -> Table:
    table = _table("not measured")
    for note in notes:
        _add_row(table, note)
    return table


def _duration(seconds: float) -> str:
    """Write a time in the unit that a person would take."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    """Write a number of bytes as it is, and in the unit that a person would take."""
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count:,} bytes" + (f" ({count / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]})" if power else "")


def what_trains(parts: dict[str, dict[str, float | str]]) -> Table:
    """Show parameters and memory of each part of a model."""
    table = _table("part", "", "parameters", "MB in training", title="what trains")
    for name, part in parts.items():
        _add_row(table, name, part["state"], f"{part['parameters']:,}", f"{part['megabytes']:,}")
    return table


def recall_table(report: TuneReport) -> Table:
    """Show the held-out recall before the first step, at the best checkpoint and after the last step."""
    title = f"held-out recall: {report.held_out_pairs} pairs, {report.held_out_captions} captions never seen"
    title += "; they chose the best checkpoint" if report.best else ""
    table = _table(
        "metric", "at the start", f"best (step {report.best_step})", f"last (step {report.steps})", title=title
    )
    for name in report.start:
        values = (report.start, report.best, report.last)
        _add_row(table, name, *(f"{value[name]:.3f}" if name in value else "" for value in values))
    return table


def _test_table(report: TuneReport) -> list[Table]:
    if not report.test:
        return []
    title = f"test of the best checkpoint: {report.test_pairs} pairs, {report.test_captions} captions never seen"
    table = _table("metric", "test", title=title)
    for name, value in report.test.items():
        _add_row(table, name, f"{value:.3f}")
    return [table]


def comparison(result: Comparison) -> list[Table]:
    """Show the recall of every choice, mean and deviation over the seeds, best first."""
    title = f"held-out recall after the last step, {result.seeds} seeds"
    metrics = list(result.cells[0].metrics)
    table = _table("mode", "image tower", "text tower", *metrics, "seconds", title=title)
    for cell in sorted(result.cells, key=lambda cell: -cell.mean(metrics[0])):
        values = (f"{cell.mean(metric):.3f} ± {cell.spread(metric):.3f}" for metric in metrics)
        seconds = f"{sum(cell.seconds) / len(cell.seconds):.0f}"
        _add_row(table, cell.mode, cell.image_tower, cell.text_tower, *values, seconds)
    rows = {"chance": f"{1 / result.captions:.4f}"}
    if (plot := Path(result.out, "comparison.png")).is_file():
        rows["plot"] = str(plot)
    rows["left out"] = "\n".join(result.impossible) or "none"
    return [table, *record(rows)]


def predictions(results: list[Prediction]) -> list[Table]:
    """Show the best classes of each image; with thresholds, also which of them are given, or that none is."""
    has_thresholds = any(result.given is not None for result in results)
    table = _table("image", "class", "probability", *(["given"] if has_thresholds else []))
    for result in results:
        rows = [
            (name, f"{probability:.3f}", *(["yes" if name in (result.given or []) else "no"] if has_thresholds else []))
            for name, probability in zip(result.classes, result.probabilities, strict=True)
        ]
        if result.given == []:
            rows.insert(0, ("none of these", "", "yes"))
        for i, row in enumerate(rows):
            _add_row(table, "" if i else result.path, *row)
    return [table]


def calibration(report: CalibrationReport) -> list[Table]:
    """Show what a labelled sample says of a class list: templates, calibration, thresholds, and each class."""
    made = []
    if report.template_sets:
        title = "templates: the best is taken, and its figure flatters (it was chosen on these images)"
        made.append(_table("set", "on the sample", title=title))
        for name, value in report.template_sets.items():
            _add_row(made[0], name, _value(value))
    accuracy = "F1 of the labels" if report.multi_label else "accuracy, nearest class"
    classes = sorted(report.per_class, key=lambda score: (score.recall is None, score.recall))
    title = "answers, each half of the sample by what was fitted to the other half"
    return [*made, *record(report, {"accuracy": accuracy}), items(classes, title=title)]


def hits(results: Sequence[Hit], thumbnails: Sequence[RenderableType] = ()) -> list[Table]:
    """Show images that were found, best first; each beside its thumbnail, if there are any."""
    have_copies = any(hit.copies for hit in results)
    table = _table(*([""] if thumbnails else []), "score", "path", "texts", *(["copies"] if have_copies else []))
    for i, hit in enumerate(results):
        cells = [f"{hit.score:.3f}", hit.path, "; ".join(hit.texts[:3])]
        cells += [str(len(hit.copies) or "")] if have_copies else []
        table.add_row(*thumbnails[i : i + 1], *map(_text, cells))
    table.show_lines = bool(thumbnails)  # or they would touch
    return [table]


def duplicates(groups: list[DuplicateGroup]) -> list[Table]:
    """Show groups of images that are the same or nearly so, biggest first."""
    images = sum(len(group.images) for group in groups)
    table = _table("group", "nearest", "path", "same content as", title=f"{images} images in {len(groups)} groups")
    for number, group in enumerate(groups, 1):
        for i, image in enumerate(group.images):
            _add_row(table, "" if i else number, f"{image.cosine:.3f}", image.path, image.copy_of or "")
    return [table]


def results(measured: list[Result]) -> list[Table]:
    """Show the figures of all results in one table, then the classes of each classification from worst to best."""
    several = len({result.model["name"] for result in measured}) > 1
    headers = ("benchmark", "language", "metric", "value", "95 % interval", "images")
    table = _table(*(("model", *headers) if several else headers))
    for result in measured:
        first: tuple[str, ...] = (result.benchmark, result.language)
        first = (result.model["name"], *first) if several else first
        for name, found in result.metrics.items():
            interval = f"{found.low:.3f} to {found.high:.3f}" if found.low < found.high else ""
            _add_row(table, *first, name, f"{found.value:.3f}", interval, result.images)
            first = ("",) * len(first)
    made = [table]
    for result in measured:
        protocol = {name: _listed(value) for name, value in result.protocol.items() if value not in ([], None)}
        counts = {"captions": result.captions, "classes": result.classes, "skipped images": result.skipped}
        rows = {**protocol, **{name: count for name, count in counts.items() if count}}
        made += _titled(record(rows), f"{result.benchmark}: {result.task} by {result.model['name']}")
        if 0 < len(result.per_class) <= MAX_LISTED_CLASSES:
            made.append(_classes(result))
    return made


def _classes(result: Result) -> Table:
    table = _table("class", "accuracy", "images", title=f"{result.benchmark}: {result.classes} classes")
    for row in sorted(result.per_class, key=lambda row: float(row["accuracy"])):
        _add_row(table, row["name"], f"{row['accuracy']:.3f}", row["images"])
    return table


def _titled(tables: list[Table], title: str) -> list[Table]:
    for table in tables:
        table.title = title
    return tables


def results_report(report: Report) -> list[Table]:
    """Show the main results beside the figures they are compared with, and the files of the report."""
    headers = ("data set", "metric", "model", "value", "95 % interval", "published", "of", "difference", "interval")
    table = _table(*headers, title=f"beside {report.against}" if report.against else "results")
    for row in report.rows:
        if row.in_summary:
            _add_row(table, *row.words())
    return [table, *record({Path(file).suffix.removeprefix("."): file for file in report.files})]


def export_report(report: ExportReport) -> list[Table]:
    """Show what was written, and how far its vectors are from the model's."""
    files = _table("file", "MB", title=f"{report.to}: {report.folder}")
    for name, size in report.files.items():
        _add_row(files, name, f"{size / 1e6:,.2f}")
    checks = _table("compared with the model", "", title=f"checked on {report.sample}")
    for name, difference in report.differences.items():
        _add_row(checks, name, f"largest difference {difference:.1e}")
    if report.preprocessing_cosine is not None:
        _add_row(checks, "image vectors, its own preprocessing", f"lowest cosine {report.preprocessing_cosine:.5f}")
    for name, value in (report.int8 or {}).items():
        _add_row(checks, f"int8: {name}", value.get("reason") or _int8_words(value))
    for note in report.notes:
        _add_row(checks, "note", note)
    return [files, checks]


def push_report(report: PushReport) -> list[Table]:
    """Show what was pushed, and where it is."""
    files = _table("file", "MB", title=f"{report.kind} {report.repository}: {report.url or report.folder}")
    for name, size in report.files.items():
        _add_row(files, name, f"{size / 1e6:,.2f}")
    notes = _table("", "", show_header=False)
    for note in report.notes:
        _add_row(notes, "note", note)
    return [files, notes] if report.notes else [files]


def _int8_words(measured: dict[str, Any]) -> str:
    """What an int8 file loses where inputs come one by one, and where they come together."""
    words = []
    together = f"in a batch of {measured['batch']}" if "batch" in measured else "in one batch"
    for way, called in (("alone", "one by one"), ("in_batch", together)):
        figures = measured[way]
        if isinstance(figures, float):
            words.append(f"{called} {figures:.3f}")
        else:
            words.append(f"{called}: cosine {figures['mean_cosine']:.4f}, lowest {figures['lowest_cosine']:.4f}")
    return "\n".join(words)


def _label(name: str, labels: Mapping[str, str] | None) -> str:
    return (labels or {}).get(name) or _LABELS.get(name) or name.replace("_", " ")


def _value(value: Any) -> str:
    """Write a value of a record: three decimals for small figures, one for others."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def _listed(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _table(*headers: str, title: str | None = None, show_header: bool = True) -> Table:
    # Folded, never cut: a path that ends in an ellipsis is useless.
    return Table(*(Column(header, overflow="fold") for header in headers), title=title, show_header=show_header)


def _add_row(table: Table, *cells: object) -> None:
    table.add_row(*map(_text, cells))


def _text(cell: object) -> Text:
    """Make a cell without markup: a file may be called `[bold].jpg`."""
    return Text(str(cell), overflow="fold")
