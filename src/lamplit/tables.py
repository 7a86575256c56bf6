"""Results as tables for people; the same results go to machines as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from lamplit.embedding import EmbedReport
    from lamplit.evaluation import Evaluation
    from lamplit.retrieval import Hit
    from lamplit.tuning import TuneReport
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
    table = Table("part", "", "parameters", "MB in training", title="what trains")
    for name, part in parts.items():
        table.add_row(name, str(part["state"]), f"{part['parameters']:,}", f"{part['megabytes']:,}")
    return table


def recall_table(report: TuneReport) -> Table:
    """Held-out recall before the first step, at the best checkpoint and after the last step."""
    title = f"held-out recall: {report.held_out_pairs} pairs, {report.held_out_captions} captions never seen"
    table = Table("metric", "head start", f"best (step {report.best_step})", f"last (step {report.steps})", title=title)
    for name in report.start:
        values = (report.start, report.best, report.last)
        table.add_row(name, *(f"{value[name]:.3f}" if name in value else "" for value in values))
    return table


def predictions(results: list[Prediction]) -> list[Table]:
    """The best classes of each picture."""
    table = Table("picture", "class", "probability")
    for result in results:
        for place, (name, probability) in enumerate(zip(result.classes, result.probabilities, strict=True)):
            table.add_row("" if place else result.path, name, f"{probability:.3f}")
    return [table]


def hits(results: list[Hit]) -> list[Table]:
    """Pictures that were found, best first."""
    table = Table("score", "path", "texts")
    for hit in results:
        table.add_row(f"{hit.score:.3f}", hit.path, "; ".join(hit.texts[:3]))
    return [table]


def evaluation(result: Evaluation) -> list[Table]:
    """Retrieval and zero-shot figures; the classes from worst to best."""
    made = []
    if result.retrieval:
        seen = "held-out captions only" if result.held_out_only else "all captions"
        table = Table("metric", "value", title=f"retrieval: {result.pictures} pictures, {result.captions} {seen}")
        for name, value in result.retrieval.items():
            table.add_row(name, f"{value:.3f}")
        made.append(table)
    if result.zero_shot:
        table = Table("class", "accuracy", "pictures", title=f"zero-shot: {result.classes} classes")
        for name, value in result.zero_shot.items():
            table.add_row(name, f"{value:.3f}", "all")
        for name, row in sorted(result.per_class.items(), key=lambda item: item[1]["accuracy"]):
            table.add_row(name, f"{row['accuracy']:.3f}", f"{row['pictures']:.0f}")
        made.append(table)
    return made


def info(values: dict[str, Any]) -> list[Table]:
    """Names and values."""
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, str(value))
    return [table]
