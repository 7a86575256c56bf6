"""Memory of the page in one process and in several, over the same store of a million images.

    python benchmarks/page_memory.py [--rows 1000000] [--folder runs/page-memory] [--quick]

The store has made-up vectors of width 512. The model's text tower is MiniLM, which the page runs in ONNX Runtime. The
same words are asked for each time, so many that all processes answer some, and that the same part of the file of
vectors is in memory. Then their proportional set sizes are added up: a page of a file that several of them map counts
once. What is of no file is shown apart. Goal: that of one process, and 400 MB for each further one. Linux alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from rich.table import Table
from scale import write_pairs
from timing import console, filled, finish, parser

import lamplit

MB = 1e6
MORE = 400 * MB  # for each further process
WIDTH, WORDS, CLIENTS = 512, 160, 16


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=1_000_000, help="images of the store")
    options.add_argument("--folder", type=Path, default=Path("runs/page-memory"), help="store and model")
    options = filled(options.parse_args())
    options.turns = 1
    rows = 3000 if options.quick else options.rows
    model, store = made(options.folder, rows)
    found = {
        count: measured(model, store, count, 40 if options.quick else WORDS)
        for count in ((1, 2) if options.quick else (1, 2, 4))
    }
    table = Table(
        "processes", "MB", "a further one", "of no file, MB", "a further one", title=f"the page over {rows:,} images"
    )
    for count, sizes in found.items():
        cells = []
        for size, first in zip(sizes, found[1], strict=True):
            cells += [f"{size / MB:.0f}", f"{(size - first) / (count - 1) / MB:.0f}" if count > 1 else ""]
        table.add_row(str(count), *cells)
    console.print(table)
    whole, own = ({count: sizes[place] for count, sizes in found.items()} for place in range(2))
    finish(options, [{"title": "page memory", "rows": rows, "bytes": whole, "of_no_file": own, "goal": MORE}])


def made(folder: Path, rows: int) -> tuple[Path, Path]:
    """Make a store of so many rows, and a model that reads its space after a fashion."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, store, model = folder / f"{rows}.parquet", folder / f"{rows}.lance", folder / f"{rows}-model"
    if not store.exists():
        write_pairs(pairs, rows, WIDTH)
        lamplit.import_vectors(pairs, store, image_tower="made:up", progress=True)
        pairs.unlink()
    settings = lamplit.TuneSettings(
        "demo:minilm", steps=1, num_evals=1, batch_size=64, head="linear", closed_form=False
    )
    lamplit.tune(store, model, settings, progress=True)
    return model, store


def measured(model: Path, store: Path, processes: int, words: int) -> tuple[int, int]:
    """Start the page, ask it, and return the bytes that its processes take together, and those of no file."""
    command = [sys.executable, "-m", "lamplit", "app", model, store, "--port", "0", "--json", "--processes", processes]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda number: ask(address, f"words {number}"), range(words)))
        time.sleep(2)
        parent = psutil.Process(server.pid)
        sizes = [proportional(process.pid) for process in [parent, *parent.children(recursive=True)]]
        server.terminate()
        server.wait(timeout=60)
    whole, own = map(sum, zip(*sizes, strict=True))
    return whole, own


def proportional(pid: int) -> tuple[int, int]:
    """Return the proportional set size of a process in bytes, and the part of it that is of no file."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines[1:])}
    return 1024 * kilobytes["Pss"], 1024 * kilobytes["Pss_Anon"]


def ask(address: str, words: str) -> None:
    answer = httpx.post(f"{address}search", json={"query": words, "k": 24}, timeout=600)
    answer.raise_for_status()


if __name__ == "__main__":
    main()
