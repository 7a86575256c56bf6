"""Two runs of `lamplit tune` at once on one machine, against one alone: pairs a second of all together.

Threads of a matrix product that wait keep their cores busy for a while. Two processes with a thread for each core then
hold each other up. lamplit's command tells its threads to sleep; the third side undoes that.

    python benchmarks/together.py [--quick]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from timing import arguments, console, finish
from torch.nn import functional as F

import lamplit
from lamplit.store.table.rows import Row
from lamplit.towers.identity import TowerIdentity

WIDTH = 512
AS_TORCH_WAITS = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own count, which goes before OMP_WAIT_POLICY


def main() -> None:
    options = arguments(__doc__ or "")
    steps, batch = (4, 8) if options.quick else (40, 64)
    pairs_per_second: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        store = make_store(Path(temporary), 200)
        sides = [
            ("one", 1, {}),
            ("two at once", 2, {}),
            ("two at once, threads that do not sleep", 2, AS_TORCH_WAITS),
        ]
        for turn in range(min(options.turns, 3)):
            for name, count, environment in sides[:2] if options.quick else sides:
                folder = Path(temporary) / f"{turn}-{name}"
                pairs_per_second.setdefault(name, []).append(tune(store, folder, count, steps, batch, environment))
    found = {name: median(values) for name, values in pairs_per_second.items()}
    for name, value in found.items():
        console.print(f"{name}: {value:.1f} pairs a second together, {value / found['one']:.2f} of one alone")
    finish(options, [{"title": "runs at once", "pairs_per_second": pairs_per_second, "threads": os.cpu_count()}])


def make_store(folder: Path, images: int) -> Path:
    """A store of made-up vectors and captions: what they say does not matter for time."""
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(images, WIDTH), dim=1)
    caption = "a drawing of number {} with a few words more"
    rows = [Row(f"{i:06}", f"{i}.png", f"h{i}", [caption.format(i)], vector) for i, vector in enumerate(vectors)]
    lamplit.Store.create(
        folder / "some.lance", TowerIdentity.of_imported("made up", WIDTH), rows, backend="imported"
    ).finish()
    return folder / "some.lance"


def tune(store: Path, folder: Path, count: int, steps: int, batch: int, environment: dict[str, str]) -> float:
    """Run `lamplit tune` `count` times at once, a thread for each core; return their pairs a second together."""
    outs = [folder / str(number) for number in range(count)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | environment
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "lamplit", "tune", str(store), "--text-tower", "demo:minilm", "--out", str(out),
             "--steps", str(steps), "--batch-size", str(batch), "--val-fraction", "0"],
            env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for out in outs
    ]  # fmt: skip
    assert all(process.wait() == 0 for process in begun), "a run failed; start it by hand"
    return sum(rate(out / "log.jsonl") for out in outs)


def rate(log: Path) -> float:
    """Pairs a second of a run's middle half, when the others are at work, too."""
    values = [line["pairs_per_second"] for line in map(json.loads, log.open()) if "pairs_per_second" in line]
    return median(values[len(values) // 4 : -(len(values) // 4) or None])


if __name__ == "__main__":
    main()
