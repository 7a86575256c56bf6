"""Write a report of a folder of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamplit.errors import UsageError, require
from lamplit.evaluation.report.documents import as_csv, as_markdown, as_tables, flat
from lamplit.evaluation.report.figures import Figure, figures_of, read_figures
from lamplit.evaluation.report.report_rows import ReportRow, compare, with_means
from lamplit.evaluation.report.variants import distinguish
from lamplit.metrics.results import Result, read_results

PAPER = "paper"


@dataclass
class Report:
    """What a report says, and its files."""

    folder: str
    against: str | None  # whose figures the results stand beside, in words
    rows: list[ReportRow] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def write_report(folder: str | Path, *, against: str | Path | None = PAPER, out: str | Path | None = None) -> Report:
    """Write `report.md`, `report.csv`, `report.json` and `report.html` of all results in a folder.

    Args:
        folder: what `lamplit evaluate --benchmark` wrote.
        against: `paper`, the figures that the paper and its authors published; another folder of results; a CSV file
            of figures (see `lamplit.evaluation.report.figures`); or None, to compare with nothing.
        out: folder for the four files; by default `report` inside the results' folder.

    Raises:
        UsageError: there are no results, or `against` is nothing of the kind, or `out` is a folder of results, where
            `report.json` would be taken for one.
        MissingExtraError: jinja2, markupsafe or matplotlib is not installed.
    """
    for module in ("jinja2", "markupsafe", "matplotlib"):
        require(module, "report")
    from lamplit.evaluation.report.page import render

    folder = Path(folder)
    target = folder / "report" if out is None else Path(out)
    if target.resolve() == folder.resolve() or (against and target.resolve() == Path(against).resolve()):
        raise UsageError(f"{target} holds results, and report.json would be read as one; give another folder for it")
    results = with_means(distinguish(read_results(folder)))
    figures, whose = _figures(against)
    rows = compare(results, figures)
    lines = flat(rows, figures)
    texts = {
        "report.md": as_markdown(results, rows, figures, whose),
        "report.csv": as_csv(lines),
        "report.json": json.dumps(as_tables(lines), indent=1, ensure_ascii=False) + "\n",
        "report.html": render(results, rows, figures, whose),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8", newline="\n")
    return Report(str(target), whose, rows, [str(target / name) for name in texts])


def _figures(against: str | Path | None) -> tuple[Sequence[Figure], str | None]:
    if against is None:
        return [], None
    if against == PAPER:
        return read_figures(), "the figures of the paper (arXiv 2111.07991) and its authors' model cards"
    path = Path(against)
    if path.is_dir():
        others: list[Result] = with_means(distinguish(read_results(path)))
        return figures_of(others, str(path)), f"the results in {path}"
    if not path.is_file():
        raise UsageError(f"there is no {path}; expected 'paper', a folder of results or a CSV file of figures")
    return read_figures(path), f"the figures of {path}"
