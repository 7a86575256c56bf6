"""Results as tables for people; the same results go to machines as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from lamplit.evaluation.report.writing import Report
    from lamplit.exports.export_report import ExportReport
    from lamplit.metrics.results import Result
    from lamplit.retrieval.indexing import IndexReport
    from lamplit.retrieval.searcher import Hit
    from lamplit.store.duplicates import DuplicateGroup
    from lamplit.store.embedding import EmbedReport
    from lamplit.store.exchange import ImportReport, VectorsReport
    from lamplit.tuning.comparison import Comparison
    from lamplit.tuning.tune_report import TuneReport
    from lamplit.zeroshot.calibration_report import CalibrationReport
    from lamplit.zeroshot.classifier import Prediction

SHOWN_CLASSES = 100  # more are in the JSON file


def embed_report(report: EmbedReport) -> list[Table]:
    """What one run of `lamplit embed` did."""
    rate = report.embedded / report.seconds if report.seconds else 0.0
    rows = {
        "store": report.store,
        "image tower": report.image_tower,
        "backend": report.backend,
        "embedded": f"{report.embedded} ({rate:.1f} a second)",
        "updated": report.updated,
        "unchanged": report.unchanged,
        "moved or copied": report.moved,
        "missing": f"{report.missing}; their rows stay, --prune deletes them" if report.missing else 0,
        "pruned": report.pruned,
        "skipped": f"{len(report.skipped)}; reasons in {report.skipped_file}" if report.skipped else 0,
    }
    return info(rows)


def import_report(report: ImportReport) -> list[Table]:
    """What one run of `lamplit import` did."""
    rows = {
        "store": report.store,
        "image tower": f"{report.image_tower}, {report.width} wide",
        "imported": report.imported,
        "texts": report.texts,
        "skipped": f"{len(report.skipped)}; reasons in {report.skipped_file}" if report.skipped else 0,
    }
    return info(rows)


def vectors_report(report: VectorsReport) -> list[Table]:
    """What `lamplit export --to clip-retrieval` wrote."""
    rows = {
        "folder": report.folder,
        "image tower": f"{report.image_tower}, {report.width} wide",
        "images": report.images,
        "parts": report.parts,
    }
    return info(rows)


def tune_report(report: TuneReport) -> list[Table]:
    """What trained, and the held-out recall before, at its best and at the end."""
    return [what_trains(report.trains), recall_table(report), *info(_run_rows(report))]


def _run_rows(report: TuneReport) -> dict[str, Any]:
    same = report.fingerprint_before == report.fingerprint_after
    proof = f"{report.fingerprint_after} before and after" if same and report.fingerprint_after else "not opened"
    return {
        "model": report.out,
        "mode": report.mode,
        "locked tower": f"{report.image_tower}, fingerprint {proof}",
        "pairs": f"{report.training_pairs} tuned on, {report.held_out_pairs} held out",
        "texts cut at the context length": report.truncated_texts,
        "best step": f"{report.best_step} of {report.steps}, in {report.seconds:.0f} s",
    }


def what_trains(parts: dict[str, dict[str, float | str]]) -> Table:
    """Parameters and memory of each part of a model."""
    table = _table("part", "", "parameters", "MB in training", title="what trains")
    for name, part in parts.items():
        _add_row(table, name, part["state"], f"{part['parameters']:,}", f"{part['megabytes']:,}")
    return table


def recall_table(report: TuneReport) -> Table:
    """Held-out recall before the first step, at the best checkpoint and after the last step."""
    title = f"held-out recall: {report.held_out_pairs} pairs, {report.held_out_captions} captions never seen"
    table = _table(
        "metric", "at the start", f"best (step {report.best_step})", f"last (step {report.steps})", title=title
    )
    for name in report.start:
        values = (report.start, report.best, report.last)
        _add_row(table, name, *(f"{value[name]:.3f}" if name in value else "" for value in values))
    return table


def comparison(result: Comparison) -> list[Table]:
    """Recall of every choice, mean and deviation over the seeds, best first."""
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
    rows["left out"] = "\n".join(result.impossible) or "nothing"
    return [table, *info(rows)]


def predictions(results: list[Prediction]) -> list[Table]:
    """The best classes of each image; where they have thresholds, which are given, or that none is."""
    judged = any(result.given is not None for result in results)
    table = _table("image", "class", "probability", *(["given"] if judged else []))
    for result in results:
        rows = [
            (name, f"{probability:.3f}", *(["yes" if name in (result.given or []) else "no"] if judged else []))
            for name, probability in zip(result.classes, result.probabilities, strict=True)
        ]
        if result.given == []:
            rows.insert(0, ("none of these", "", "yes"))
        for place, row in enumerate(rows):
            _add_row(table, "" if place else result.path, *row)
    return [table]


def calibration(report: CalibrationReport) -> list[Table]:
    """What a labelled sample says of a class list: templates, calibration, thresholds, and each class."""
    made = []
    if report.template_sets:
        title = "templates: the best is taken, and its figure flatters (it was chosen on these images)"
        made.append(_table("set", "on the sample", title=title))
        for name, value in report.template_sets.items():
            _add_row(made[0], name, f"{value:.3f}")
    others = f"{report.out_of_class} of none of the classes, {report.unlabelled} without a label"
    rows = {
        "sample": report.sample,
        "images": f"{report.images} of the classes, {others}",
        "skipped": len(report.skipped),
        "F1 of the labels" if report.multi_label else "accuracy, nearest class": f"{report.accuracy:.3f}",
        "logit scale": f"{report.scale_before:.1f} before, {report.scale_after:.1f} after",
        "calibration error": f"{_share(report.error_before) or 'unknown'} before, {_share(report.error_after)} after",
        "threshold": "one for each class" if report.threshold is None else f"cosine {report.threshold:.4f}",
        "labels that are there, given" if report.multi_label else "right answers that stay": _share(report.kept),
        "labels that are not, not given" if report.multi_label else "out-of-class images refused": _share(
            report.rejected
        ),
    }
    table = _table(
        "class", "images", "precision", "recall", "mostly mistaken for", title="answers, each half by the other"
    )
    for score in sorted(report.per_class, key=lambda score: (score.recall is None, score.recall)):
        mistake = f"{score.mistaken_for} ({score.mistakes})" if score.mistaken_for else ""
        _add_row(table, score.name, score.images, _share(score.precision), _share(score.recall), mistake)
    return [*made, *info(rows), table]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def hits(results: Sequence[Hit], thumbnails: Sequence[RenderableType] = ()) -> list[Table]:
    """Images that were found, best first; each beside its thumbnail, where there are any."""
    table = _table(*([""] if thumbnails else []), "score", "path", "texts")
    for place, hit in enumerate(results):
        cells = (f"{hit.score:.3f}", hit.path, "; ".join(hit.texts[:3]))
        table.add_row(*thumbnails[place : place + 1], *map(_text, cells))
    table.show_lines = bool(thumbnails)  # or they would touch
    return [table]


def index_report(report: IndexReport) -> list[Table]:
    """An index, as it was measured."""
    rows = {
        "images": f"{report.images:,}",
        "partitions": f"{report.partitions}, of which a query looks at {report.probes}",
        "recall@10": f"{report.recall:.3f}",
        "a query": f"{report.milliseconds:.1f} ms",
        "built in": f"{report.seconds:.0f} s",
    }
    return info(rows)


def duplicates(groups: list[DuplicateGroup]) -> list[Table]:
    """Groups of images that are the same or nearly so, biggest first."""
    images = sum(len(group.images) for group in groups)
    table = _table("group", "nearest", "path", "same content as", title=f"{images} images in {len(groups)} groups")
    for number, group in enumerate(groups, 1):
        for place, image in enumerate(group.images):
            _add_row(table, "" if place else number, f"{image.cosine:.3f}", image.path, image.copy_of or "")
    return [table]


def results(measured: list[Result]) -> list[Table]:
    """The figures of all results in one table, then each classification's classes from worst to best."""
    table = _table("benchmark", "language", "metric", "value", "95 % interval", "images")
    for result in measured:
        first = (result.benchmark, result.language)
        for name, found in result.metrics.items():
            interval = f"{found.low:.3f} to {found.high:.3f}" if found.low < found.high else ""
            _add_row(table, *first, name, f"{found.value:.3f}", interval, result.images)
            first = ("", "")
    made = [table]
    for result in measured:
        said = {name: value for name, value in result.protocol.items() if value not in ([], None)}
        counts = {"captions": result.captions, "classes": result.classes, "skipped images": result.skipped}
        rows = {**said, **{name: count for name, count in counts.items() if count}}
        made += _titled(info(rows), f"{result.benchmark}: {result.task} by {result.model['name']}")
        if 0 < len(result.per_class) <= SHOWN_CLASSES:
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
    """Main results beside the figures they are compared with, and the files of the report."""
    headers = ("data set", "metric", "model", "value", "95 % interval", "published", "of", "difference", "interval")
    table = _table(*headers, title=f"beside {report.against}" if report.against else "results")
    for row in report.rows:
        if row.in_summary:
            _add_row(table, *row.words())
    return [table, *info({Path(file).suffix.removeprefix("."): file for file in report.files})]


def export_report(report: ExportReport) -> list[Table]:
    """What was written, and how far its vectors are from the model's."""
    files = _table("file", "MB", title=f"{report.to}: {report.folder}")
    for name, size in report.files.items():
        _add_row(files, name, f"{size / 1e6:,.2f}")
    checks = _table("compared with the model", "", title=f"checked on {report.sample}")
    for name, difference in report.differences.items():
        _add_row(checks, name, f"largest difference {difference:.1e}")
    if report.preprocessing_cosine is not None:
        _add_row(checks, "image vectors, its own preprocessing", f"lowest cosine {report.preprocessing_cosine:.5f}")
    for name, value in (report.int8 or {}).items():
        _add_row(checks, f"int8: {name}", value if isinstance(value, dict) else f"{value:.3f}")
    for note in report.notes:
        _add_row(checks, "note", note)
    return [files, checks]


def info(values: dict[str, Any]) -> list[Table]:
    """Names and values."""
    table = _table("name", "value", show_header=False)
    for name, value in values.items():
        _add_row(table, name, value)
    return [table]


def plain(table: Table) -> str:
    """A table as lines of cells between tabs."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = ["\t".join(str(cell).replace("\n", "; ") for cell in row) for row in rows]
    headers = ["\t".join(str(column.header) for column in table.columns)] if table.show_header else []
    return "\n".join([*([str(table.title)] if table.title else []), *headers, *lines])


def _table(*headers: str, title: str | None = None, show_header: bool = True) -> Table:
    # Folded, never cut: a path that ends in an ellipsis is no use.
    return Table(*(Column(header, overflow="fold") for header in headers), title=title, show_header=show_header)


def _add_row(table: Table, *cells: object) -> None:
    table.add_row(*map(_text, cells))


def _text(cell: object) -> Text:
    """Make a cell as it is: a file may be called `[bold].jpg`."""
    return Text(str(cell), overflow="fold")
