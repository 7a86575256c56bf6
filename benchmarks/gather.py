"""Rows of a batch from a large file: anywhere in one that is in memory, and in windows of one that is not.

    python benchmarks/gather.py [STORE] [--quick] [--turns 5]

A store has more than 50,000 images, or it has no such file; without one, 1,000,000 x 512 made-up vectors are imported.
Linux only: before each turn the system is asked to forget the file, and the speed of the disk is that of reading as
many bytes of it from beginning to end.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import scale
import timing
import torch

import lamplit
from lamplit.store.arrays.row_vectors import RowVectors
from lamplit.tuning.batches import Batches
from lamplit.tuning.permutation import WINDOW
from lamplit.tuning.split import Links

BATCH, MOST = 32_768, 8 * WINDOW  # rows of a batch, and of a turn
AT_ONCE = 2**23  # bytes


def main() -> None:
    parser = timing.parser(__doc__ or "")
    parser.add_argument("store", nargs="?", type=Path)
    options = timing.filled(parser.parse_args())
    with tempfile.TemporaryDirectory() as temporary:
        timing.finish(options, measure(options.store or made(Path(temporary), options.quick), options.turns))


def made(folder: Path, quick: bool) -> Path:
    scale.write_pairs(folder / "pairs.parquet", 60_000 if quick else 1_000_000, 32 if quick else 512)
    scale.python(scale.IMPORT, folder / "pairs.parquet", folder / "pairs.lance")
    return folder / "pairs.lance"


def measure(store: Path, turns: int) -> list[dict[str, object]]:
    scale.python(scale.DERIVE, store)
    file = max(store.glob("_search/*-vectors/vectors.npy"), key=lambda file: file.stat().st_size)  # of the largest part
    size, width = np.load(file, mmap_mode="r").shape
    some = min(size, MOST)
    steps = max(1, some // BATCH)
    batches = Batches(
        Links([], torch.arange(size), torch.arange(size)),
        lamplit.TuneSettings("scratch:tiny", batch_size=BATCH, steps=steps),
    )
    rows = min(BATCH, size) * steps

    def gather(in_windows: bool) -> None:
        batches.in_windows = in_windows
        halves = np.load(file, mmap_mode="c")
        vectors = RowVectors(halves, "")
        for step in range(steps):
            for first, last in batches.coming(step, is_first=step == 0):
                vectors.expect(first, last)
            asked = batches.rows(step).numpy()
            asked.sort()
            halves[asked]

    def cold() -> None:
        forget(file)
        gather(in_windows=True)

    def from_beginning_to_end() -> None:
        forget(file)
        left = rows * width * 2
        with file.open("rb", buffering=0) as opened:
            while left > 0 and (read := len(opened.read(min(left, AT_ONCE)))):
                left -= read

    seconds = timing.in_turn(
        {"lamplit: batches in windows": cold, "the disk": from_beginning_to_end}, turns, warm_up=False
    )
    figures = [
        timing.compare(
            "a file that is not in memory, by the row", seconds, ours="lamplit: batches in windows", unit=rows
        )
    ]
    read_all(file)
    seconds = timing.in_turn({"lamplit: batches anywhere": lambda: gather(in_windows=False)}, turns)
    figures.append(
        timing.compare("a file that is in memory, by the row", seconds, ours="lamplit: batches anywhere", unit=rows)
    )
    for figure in figures:
        for name, side in figure["sides"].items():
            rate = 1 / side["median"]
            timing.console.print(f"{name}: {rate:,.0f} rows/s, {rate * width * 2 / 1e6:,.0f} MB/s")
    return figures


def forget(file: Path) -> None:
    """Let the system forget what it holds of a file."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        while opened.read(AT_ONCE):
            pass


if __name__ == "__main__":
    main()
