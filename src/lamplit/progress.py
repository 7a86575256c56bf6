"""Progress bars on stderr, shown only if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, str], None]
_MOMENT = 1.0  # seconds


@contextmanager
def progress_bar(name: str, total: int | None, *, shown: bool) -> Iterator[Advance]:
    """Open a bar. Call what it yields with how much more is done, and a short note to show behind the bar.

    What took no more than a moment leaves no bar behind: a command of many short stages says what matters.
    """
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(name, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            progress.update(task, advance=done, note=note)

        yield advance
        progress.live.transient = (progress.tasks[task].elapsed or 0) < _MOMENT
