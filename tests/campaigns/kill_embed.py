"""Kill `embed` at random moments, again and again: what is in the store must be whole, and the next run must go on.

    python tests/campaigns/kill_embed.py --trials 200

Each trial starts one or two writers, with 0 or 2 worker processes, on a new store or on one that has a part of the
images already, and kills them all (SIGKILL) at a random moment. A run that is left alone then has to end with the
same store as one that nobody disturbed, bit for bit. In the temporary folder nothing of the workers may stay. Linux
and macOS: it forks, so that no trial has to import torch.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from trials import child, end, finished, require, run_trials

from lamplit.store.embed import store_writer
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import open_image_tower

IMAGES = 96
PART = 32  # images of a store that is there before
PATIENCE = 120.0  # seconds for the workers of killed processes to notice, and to end


def main() -> None:
    """Run the trials; nothing of the workers may be left in the temporary folder."""

    def make(folder: Path, chance: random.Random) -> Campaign:
        tempfile.tempdir = str(folder / "tmp")
        Path(tempfile.tempdir).mkdir()
        return Campaign(folder, chance)

    run_trials(make, 200, lambda: left_behind(PATIENCE))


class Campaign:
    """The images, a store that nobody disturbed, and how long it took."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance, self.killed = folder, chance, 0
        self.whole, self.part = folder / "whole.lance", folder / "part.lance"
        for name, number in (("all", IMAGES), ("some", PART)):
            (folder / name).mkdir()
            for place in range(number):
                pixels = np.random.default_rng(place).integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{place:03}.png")
                (folder / name / f"{place:03}.txt").write_text(f"caption {place}")
        began = time.monotonic()
        require(finished(child(write, folder / "all", self.whole, 0)))
        self.seconds = time.monotonic() - began
        require(finished(child(write, folder / "some", self.part, 0)))

    def trial(self, number: int) -> bool:
        """Start, kill, look, go on, compare; tell whether all was right."""
        out = self.folder / f"{number}.lance"
        is_new, writers, workers = self.chance.random() < 0.5, self.chance.choice((1, 2)), self.chance.choice((0, 2))
        if not is_new:
            shutil.copytree(self.part, out)
        started = [child(write, self.folder / "all", out, workers) for _ in range(writers)]
        wait = self.chance.random() * (self.seconds + 2 * (workers > 0))
        time.sleep(wait)
        for process in started:
            self.killed += os.waitpid(process, os.WNOHANG) == (0, 0) and end(process)
        right = finished(child(look, out, self.whole))
        right = right and finished(child(write, self.folder / "all", out, 0))
        right = right and finished(child(compare, out, self.whole))
        kind = f"{'new' if is_new else 'old'} store, writers {writers}, workers {workers}, killed after {wait:.2f} s"
        print(f"trial {number}: {kind}: {'right' if right else 'WRONG'}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        return right


def left_behind(patience: float) -> list[str]:
    """Wait until all processes that were left alone have ended; list what their folders of sockets hold then."""
    ends = time.monotonic() + patience
    while (left := sorted(Path(tempfile.gettempdir()).glob("pymp-*"))) and time.monotonic() < ends:
        time.sleep(0.1)
    return [f"{folder.name} ({', '.join(file.name for file in folder.glob('*'))})" for folder in left]


def write(source: Path, out: Path, workers: int) -> None:
    """Embed the images, with a commit for every batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store_writer.COMMIT_ROWS = 4
    tower = open_image_tower("timm:test_vit", weights="random")
    embed(source, out, image_tower=tower, backend="torch", batch_size=4, workers=workers)


def look(out: Path, whole: Path) -> None:
    """Check a store that was left by killed processes: every row is whole and there once."""
    if not Store.exists(out):
        return
    found = Store(out)
    ids = found.column("id")
    require(len(ids) == len(set(ids)), "an id is there twice")
    true = {row["id"]: row for row in Store(whole).rows()}
    require(all(row["hash"] == true[row["id"]]["hash"] for row in found.rows()), "a row is not whole")
    require(bool(torch.isfinite(found.vectors()).all()), "a vector is not whole")


def compare(out: Path, whole: Path) -> None:
    """Check a store that was finished: it is the undisturbed one."""
    found, true = Store(out), Store(whole)
    names = ("id", "hash", "texts")
    require(all(found.column(name) == true.column(name) for name in names), "rows differ")
    every = range(len(true))
    require(torch.equal(found.vectors_at(every), true.vectors_at(every)), "vectors differ")


if __name__ == "__main__":
    main()
