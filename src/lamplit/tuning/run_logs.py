"""The numbers of a run's log, written for other programs: tables (CSV), TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError, require
from lamplit.files import write_text
from lamplit.tuning.checkpoint import read_log

Write = Callable[[int, dict[str, float]], None]  # the step, and its numbers by name
KINDS = ("csv", "tensorboard", "wandb")
_HELD_OUT = "held_out/"
_FLUSH_SECONDS = 5  # so old is what a chart shows; and so long an end may take that Ctrl-C hit inside the writer


def require_logs(kinds: Sequence[str]) -> None:
    """Raise if a run cannot be logged so, before it begins.

    Raises:
        UsageError: there is no such kind of log.
        MissingExtraError: the library of one is not installed.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"there is no log of the kind {kind!r}; expected one of: {', '.join(KINDS)}")
    if "tensorboard" in kinds:
        require("tensorboard", "tensorboard")
    if "wandb" in kinds:
        require("wandb", "wandb")


@contextmanager
def open_run_logs(
    folder: Path, kinds: Sequence[str], settings: dict[str, Any]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open logs of the kinds in a run's folder, and write into each what `log.jsonl` has and it has not.

    The function that this yields takes the lines of `log.jsonl` from then on. A run that goes on from an earlier step
    than it was logged to has each step once.
    """
    with ExitStack() as opened:
        before = [(line["step"], numbers_of(line)) for line in read_log(folder / "log.jsonl")]
        writers = []
        if "csv" in kinds:
            writers.append(opened.enter_context(_open_tables(folder, before)))
        if "tensorboard" in kinds:
            writers.append(opened.enter_context(_open_tensorboard(folder / "tensorboard", before)))
        if "wandb" in kinds:
            writers.append(opened.enter_context(_open_wandb(folder, before, settings)))

        def write(line: dict[str, Any]) -> None:
            for writer in writers:
                writer(line["step"], numbers_of(line))

        yield write


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of `log.jsonl` by name; those on held-out captions begin with `held_out/`."""
    named = {name: value for name, value in line.items() if name not in ("step", "held_out")}
    named |= {f"{_HELD_OUT}{name}": value for name, value in (line.get("held_out") or {}).items()}
    return {
        name: value for name, value in named.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextmanager
def _open_tables(folder: Path, before: Sequence[tuple[int, dict[str, float]]]) -> Iterator[Write]:
    """Open `steps.csv` and `held_out.csv`; both are written anew from what was logged before."""
    with ExitStack() as opened:
        tables: dict[str, tuple[Any, Any]] = {}

        def write(step: int, numbers: dict[str, float]) -> None:
            if not numbers:
                return
            name = "held_out" if next(iter(numbers)).startswith(_HELD_OUT) else "steps"
            if name not in tables:
                file = opened.enter_context((folder / f"{name}.csv").open("w", newline="", encoding="utf-8"))
                columns = ["step", *(each.removeprefix(_HELD_OUT) for each in numbers)]
                tables[name] = file, csv.DictWriter(file, columns, extrasaction="ignore")
                tables[name][1].writeheader()
            file, table = tables[name]
            table.writerow({"step": step} | {each.removeprefix(_HELD_OUT): value for each, value in numbers.items()})
            file.flush()

        for step, numbers in before:
            write(step, numbers)
        yield write


@contextmanager
def _open_tensorboard(folder: Path, before: Sequence[tuple[int, dict[str, float]]]) -> Iterator[Write]:
    tensorboard = require("torch.utils.tensorboard", "tensorboard")
    is_new = not folder.is_dir() or not any(folder.iterdir())
    # What was logged of steps that are taken again is no longer shown.
    last = before[-1][0] if before and not is_new else None
    _wait_for_a_name(folder)
    purged = None if last is None else last + 1
    writer = tensorboard.SummaryWriter(str(folder), purge_step=purged, flush_secs=_FLUSH_SECONDS)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    try:
        for step, numbers in before if is_new else ():
            write(step, numbers)
        yield write
    finally:
        writer.close()


def _wait_for_a_name(folder: Path) -> None:
    """Let the second of the last file pass: TensorBoard reads files in the order of names, which begin with it."""
    now = time.time()
    if any(folder.glob(f"events.out.tfevents.{int(now)}.*")):
        time.sleep(1 - now % 1)


@contextmanager
def _open_wandb(
    folder: Path, before: Sequence[tuple[int, dict[str, float]]], settings: dict[str, Any]
) -> Iterator[Write]:
    """Open the run on Weights & Biases that has this folder's id, or a new one."""
    wandb, noted = require("wandb", "wandb"), folder / "wandb.json"
    known = (
        json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {"id": secrets.token_hex(8), "step": -1}
    )
    write_text(noted, json.dumps(known) + "\n")
    run = wandb.init(
        project="lamplit", name=folder.resolve().name, id=known["id"], resume="allow", dir=str(folder), config=settings,
        settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    logged = max(known["step"], run.step - 1)  # the latter if the run was killed, and its numbers were sent
    last = logged

    def write(step: int, numbers: dict[str, float]) -> None:
        nonlocal last
        if step > logged:
            run.log(numbers, step=step)
            last = max(last, step)

    try:
        for step, numbers in before:
            write(step, numbers)
        yield write
    finally:
        run.finish()
        write_text(noted, json.dumps(known | {"step": last}) + "\n")
