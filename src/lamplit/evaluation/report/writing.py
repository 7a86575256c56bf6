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
from lamplit.files import write_text
from lamplit.metrics.results import Result, read_results

PAPER = "paper"


@dataclass
class Report:
    """The rows of a report, and its files.

    Attributes:
        folder: where the files are.
        against: whose figures the results stand beside, in words; None if nobody's.
        rows: one for each figure that was measured.
        files: paths of the files that were written.
    """

    folder: str
    against: str | None
    rows: list[ReportRow] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def write_report(
    results: str | Path | Sequence[Result], *, against: str | Path | None = PAPER, out: str | Path | None = None
) -> Report:
    """Write `report.md`, `report.csv`, `report.json` and `report.html` of results.

    On the command line: `lamplit report`.

    Args:
        results: the folder that `evaluate` or `run_benchmarks` wrote, or the results themselves.
        against: `paper`, the figures that the paper and its authors published; another folder of results; a CSV file
            of figures, with the columns benchmark, task, metric, value and model; or None, to compare with nothing.
        out: folder for the four files; by default `report` inside the results' folder.

    Returns:
        The rows of the report and the paths of its files.

    Raises:
        UsageError: there are no results; `against` is none of the above; `out` is missing for results that have no
            folder; or it is a folder of results, where `report.json` would be read as one.
        MissingExtraError: jinja2, markupsafe or matplotlib is not installed.

    Example:
        >>> lamplit.write_report("results/", against=None).files
        ['results/report/report.md', ...]
    """
    for module in ("jinja2", "markupsafe", "matplotlib"):
        require(module, "report")
    from lamplit.evaluation.report.page import render

    folder = Path(results) if isinstance(results, str | Path) else None
    target = _target(folder, against, out)
    found = list(results) if not isinstance(results, str | Path) else read_results(results)
    if not found:
        raise UsageError("there are no results to report")
    measured = with_means(distinguish(found))
    figures, whose = _figures(against)
    rows = compare(measured, figures)
    lines = flat(rows, figures)
    texts = {
        "report.md": as_markdown(measured, rows, figures, whose),
        "report.csv": as_csv(lines),
        "report.json": json.dumps(as_tables(lines), indent=1, ensure_ascii=False) + "\n",
        "report.html": render(measured, rows, figures, whose),
    }
    for name, text in texts.items():
        write_text(target / name, text)
    return Report(str(target), whose, rows, [str(target / name) for name in texts])


def _target(folder: Path | None, against: str | Path | None, out: str | Path | None) -> Path:
    if out is None and folder is None:
        raise UsageError("give the folder for the report: out=")
    target = Path(out) if out is not None else Path(folder or "") / "report"
    held = [Path(path).resolve() for path in (folder, against) if path]
    if target.resolve() in held:
        raise UsageError(f"{target} holds results, and report.json would be read as one; give another folder for it")
    return target


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
