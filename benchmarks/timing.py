"""Both sides of a comparison in turn, so that a machine that slows down slows both."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

console = Console(width=120)


def arguments(description: str) -> argparse.Namespace:
    """Options that every benchmark has."""
    return filled(parser(description).parse_args())


def parser(description: str) -> argparse.ArgumentParser:
    """Parser of them, for a benchmark that has more."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one turn: shows the shape, not the speed")
    parser.add_argument("--turns", type=int, help="turns of each side; 5, with --quick 1")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser


def filled(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was not given."""
    options.turns = options.turns or (1 if options.quick else 5)
    return options


def in_turn(sides: dict[str, Callable[[], Any]], turns: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Run every side once to warm up, then all of them in turn; return the seconds of each."""
    for run in sides.values() if warm_up else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, run in sides.items():
            gc.collect()
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(title: str, seconds: dict[str, list[float]], *, ours: str, unit: float = 1.0) -> dict[str, Any]:
    """Print medians, spread and each side's ratio to ours; return them. `unit` is how many things a run does."""
    medians = {name: statistics.median(times) / unit for name, times in seconds.items()}
    table = Table("", "median s", "min to max", "against lamplit", title=title)
    figures: dict[str, Any] = {"title": title, "sides": {}}
    for name, times in seconds.items():
        ratio = medians[name] / medians[ours]
        low, high = min(times) / unit, max(times) / unit
        table.add_row(name, f"{medians[name]:.4g}", f"{low:.4g} to {high:.4g}", f"{ratio:.2f}x")
        figures["sides"][name] = {"median": medians[name], "min": low, "max": high, "ratio": ratio}
    console.print(table)
    return figures


@cache
def product_rate() -> float:
    """Measure the operations a second of a large product of matrices: what bounds a tower, and a loss."""
    square, size = torch.randn(2048, 2048), 2048
    return 2 * size**3 / statistics.median(in_turn({"product": lambda: square @ square}, 9)["product"])


def finish(options: argparse.Namespace, figures: list[dict[str, Any]]) -> None:
    """Say what machine this was, and write the JSON that was asked for."""
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    console.print(f"{machine}; medians of {options.turns} turns")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "turns": options.turns, "figures": figures}, indent=2) + "\n"
        )
