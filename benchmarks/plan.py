"""What `lamplit plan` says, beside what embedding and tuning take: time, and the bytes of vectors and weights.

    python benchmarks/plan.py [--quick] [--turns N]

The pairs are the stamps, and 10,000 icons. In each turn the plan is made, then both commands run from nothing.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from pyarrow import parquet
from rich.table import Table
from timing import arguments, console, finish

import lamplit

ICONS = 10_000


def main() -> None:
    options = arguments(__doc__ or "")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        sources = {"stamps": lamplit.fetch("stamps")}
        if not options.quick:
            sources["icons"] = Path(folder) / "icons.parquet"
            pairs = parquet.read_table(lamplit.fetch("icons", workers=1, progress=True))
            parquet.write_table(pairs.take([*range(0, len(pairs), len(pairs) // ICONS)][:ICONS]), sources["icons"])
        for name, source in sources.items():
            settings = lamplit.TuneSettings("demo:minilm", steps=5 if options.quick else None)
            turns = [turn(source, settings, Path(folder) / f"{name}{number}") for number in range(options.turns)]
            figures.append({"title": name, "turns": turns})
            show(name, turns)
    finish(options, figures)


def turn(source: Path, settings: lamplit.TuneSettings, folder: Path) -> dict[str, dict[str, float]]:
    """Plan and run; return what was said and what was taken."""
    tower = "demo:efficientnet-lite0"
    began = time.perf_counter()
    said = lamplit.plan(source, settings, image_tower=tower, workers=1)
    planned = time.perf_counter()
    lamplit.embed(source, folder / "store.lance", image_tower=tower, workers=1)
    embedded = time.perf_counter()
    lamplit.tune(folder / "store.lance", folder / "run", settings)
    tuned = time.perf_counter()
    store = lamplit.Store(folder / "store.lance")
    return {
        "said": {
            "embed s": said.embed.seconds, "tune s": said.tune.seconds, "vectors": said.embed.disk["vectors"],
            "text tower": said.tune.disk["text tower"], **asdict(said)["tune"]["parts"],
        },
        "took": {
            "embed s": embedded - planned, "tune s": tuned - embedded,
            "vectors": sum(block.nbytes for block in store.half_blocks()),
            "text tower": (folder / "run" / "text_tower.safetensors").stat().st_size, "plan s": planned - began,
        },
    }  # fmt: skip


def show(name: str, turns: list[dict[str, dict[str, Any]]]) -> None:
    table = Table("", "said", "took", "said / took", title=f"{name}, median of {len(turns)}")
    for what in ("embed s", "tune s", "vectors", "text tower"):
        said, took = (median(turn[side][what] for turn in turns) for side in ("said", "took"))
        table.add_row(what, f"{said:,.1f}", f"{took:,.1f}", f"{said / took:.2f}")
    console.print(table)
    console.print(f"the plan itself took {median(turn['took']['plan s'] for turn in turns):.1f} s")


if __name__ == "__main__":
    main()
