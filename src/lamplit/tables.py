"""Results as tables for people; the same results go to machines as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from lamplit.comparison import Comparison
    from lamplit.embedding import EmbedReport
    from lamplit.evaluation import Evaluation
    from lamplit.exchange import ImportReport, VectorsReport
    from lamplit.exports.report import ExportReport
    from lamplit.indexing import IndexReport
    from lamplit.retrieval import Hit
    from lamplit.tuning.report import TuneReport
    from lamplit.zeroshot import Prediction


def embed_report(report: EmbedReport) -> list[Table]:
    """What one run of `lamplit embed` did."""
    rate = report.embedded / report.seconds if report.seconds else 0.0
    rows = {
        "store": report.store,
        "tower": report.tower,
        "engine": report.engine,
        "embedded": f"{report.embedded} ({rate:.1f} a second)",
        "updated": report.updated,
        "unchanged": report.unchanged,
        "skipped": f"{len(report.skipped)}; reasons in {report.skipped_file}" if report.skipped else 0,
    }
    return info(rows)


def import_report(report: ImportReport) -> list[Table]:
    """What one run of `lamplit import` did."""
    rows = {
        "store": report.store,
        "tower": f"{report.tower}, {report.width} wide",
        "imported": report.imported,
        "texts": report.texts,
        "skipped": f"{len(report.skipped)}; reasons in {report.skipped_file}" if report.skipped else 0,
    }
    return info(rows)


def vectors_report(report: VectorsReport) -> list[Table]:
    """What `lamplit export --to clip-retrieval` wrote."""
    rows = {
        "folder": report.folder,
        "tower": f"{report.tower}, {report.width} wide",
        "pictures": report.pictures,
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
        _add_row(table, cell.mode, cell.tower, cell.text, *values, seconds)
    rows = {"chance": f"{1 / result.captions:.4f}"}
    rows |= {"plot": f"{result.out}/comparison.png", "left out": "\n".join(result.impossible) or "nothing"}
    return [table, *info(rows)]


def predictions(results: list[Prediction]) -> list[Table]:
    """The best classes of each picture."""
    table = _table("picture", "class", "probability")
    for result in results:
        for place, (name, probability) in enumerate(zip(result.classes, result.probabilities, strict=True)):
            _add_row(table, "" if place else result.path, name, f"{probability:.3f}")
    return [table]


def hits(results: list[Hit]) -> list[Table]:
    """Pictures that were found, best first."""
    table = _table("score", "path", "texts")
    for hit in results:
        _add_row(table, f"{hit.score:.3f}", hit.path, "; ".join(hit.texts[:3]))
    return [table]


def index_report(report: IndexReport) -> list[Table]:
    """An index, as it was measured."""
    rows = {
        "pictures": f"{report.pictures:,}",
        "partitions": f"{report.partitions}, of which a query looks at {report.probes}",
        "recall@10": f"{report.recall:.3f}",
        "a query": f"{report.milliseconds:.1f} ms",
        "built in": f"{report.seconds:.0f} s",
    }
    return info(rows)


def evaluation(result: Evaluation) -> list[Table]:
    """Retrieval and zero-shot figures; the classes from worst to best."""
    made = []
    if result.retrieval:
        seen = ", held out" if result.held_out_only else ""
        title = f"retrieval: {result.captioned_pictures} pictures, {result.captions} captions{seen}"
        table = _table("metric", "value", title=title)
        for name, value in result.retrieval.items():
            _add_row(table, name, f"{value:.3f}")
        made.append(table)
    if result.zero_shot:
        table = _table("class", "accuracy", "pictures", title=f"zero-shot: {result.classes} classes")
        for name, value in result.zero_shot.items():
            _add_row(table, name, f"{value:.3f}", "all")
        for name, row in sorted(result.per_class.items(), key=lambda item: item[1]["accuracy"]):
            _add_row(table, name, f"{row['accuracy']:.3f}", f"{row['pictures']:.0f}")
        made.append(table)
    return made


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
    """Add cells as they are: a file may be called `[bold].jpg`."""
    table.add_row(*(Text(str(cell), overflow="fold") for cell in cells))
