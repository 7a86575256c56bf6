"""Held-out recall of the quickstart's run over five splits of the stamps' captions.

A fifth of the distinct captions (125) is never seen. Chance is 0.008 at 1 and 0.04 at 5. "Last" is the model
after the last step; "best" is the checkpoint kept by recall on these same captions, so it is a little too good.

    python benchmarks/stamps.py [--quick]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from timing import arguments, console, finish

import lamplit

METRICS = ("image_to_text/recall@1", "image_to_text/recall@5", "text_to_image/recall@1", "text_to_image/recall@5")


def main() -> None:
    options = arguments(__doc__ or "")
    seeds = range(100, 102) if options.quick else range(100, 105)
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "stamps.lance"
        lamplit.embed(lamplit.fetch("stamps"), store, tower="demo:efficientnet-lite0", progress=True)
        for seed in seeds:
            settings = lamplit.TuneSettings(text="demo:minilm", seed=seed, epochs=1 if options.quick else 20)
            reports.append(lamplit.tune(store, Path(folder) / str(seed), settings, progress=True))
    table = Table("held-out recall", "head start", "last step", "best checkpoint", title=f"{len(reports)} splits")
    figures: dict[str, Any] = {"title": "stamps", "seeds": list(seeds), "metrics": {}}
    for metric in METRICS:
        rows = {when: [getattr(report, when)[metric] for report in reports] for when in ("start", "last", "best")}
        figures["metrics"][metric] = rows
        table.add_row(metric, *(f"{mean(values):.3f} ± {stdev(values):.3f}" for values in rows.values()))
    console.print(table)
    options.turns = len(reports)
    finish(options, [figures])


if __name__ == "__main__":
    main()
