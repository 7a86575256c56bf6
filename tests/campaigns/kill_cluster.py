"""Kill the driver of a local Ray cluster, or one of its workers, at random moments: nothing may be lost or doubled.

    python tests/campaigns/kill_cluster.py --trials 30

Each trial embeds 240 images in units of four with three workers. A driver that was killed must take all of Ray's
processes with it, and a process that goes on alone has to end with the store that nobody disturbed. A run of which one
or two workers were killed has to end so itself.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from kill_embed import compare, look
from PIL import Image
from trials import require

from lamplit.store.embed.embedding import embed
from lamplit.towers.images.image_tower import open_image_tower

IMAGES, UNIT = 240, 4
PATIENCE = 180.0  # seconds for Ray's processes to notice that their driver is gone; its agents look once a minute


def main() -> None:
    """Run the trials; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder))
        failed = 0
        for number in range(options.trials):
            try:
                said = campaign.trial(number, kills_driver=number % 2 == 1, chance=chance)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failed += 1
                said = f"WRONG: {error}"
            print(f"trial {number}: {said}", flush=True)
        _, left = psutil.wait_procs(campaign.orphans, PATIENCE)
    print(f"{failed} of {options.trials} trials failed; {len(left)} processes of Ray outlived their driver")
    sys.exit(failed > 0 or len(left) > 0)


class Campaign:
    """The images, the weights of a tower, and a store that nobody disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source, self.whole = folder, folder / "images", folder / "whole.lance"
        self.orphans: list[psutil.Process] = []
        self.source.mkdir()
        for number in range(IMAGES):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.source / f"{number:03}.png")
            (self.source / f"{number:03}.txt").write_text(f"caption {number}")
        torch.manual_seed(0)
        self.weights = folder / "tower.pth"
        torch.save(open_image_tower("timm:test_vit", weights="random").backbone.state_dict(), self.weights)
        self.embed(self.whole)

    def embed(self, out: Path, **options: object) -> None:
        """Embed in this process."""
        torch.set_num_threads(1)
        given = {"image_tower": "timm:test_vit", "image_tower_weights": self.weights, "backend": "torch"}
        embed(self.source, out, batch_size=UNIT, **given, **options)  # type: ignore[arg-type]

    def trial(self, number: int, *, kills_driver: bool, chance: random.Random) -> str:
        """Start, kill, go on, compare; say what was killed.

        Raises:
            RuntimeError: what was found is wrong.
        """
        out, log = self.folder / f"{number}.lance", self.folder / f"{number}.log"
        command = [
            sys.executable, "-m", "lamplit", "embed", self.source, "--out", out, "--image-tower", "timm:test_vit",
            "--image-tower-weights", self.weights, "--backend", "torch", "--batch-size", UNIT, "--workers", "0",
            "--cluster", "ray", "--cluster-workers", "3", "--unit-rows", UNIT,
        ]  # fmt: skip
        moment = chance.randrange(IMAGES // UNIT)
        with log.open("w") as said:
            driver = psutil.Popen(list(map(str, command)), stdout=said, stderr=said)
        done = wait_for(driver, out, moment)
        processes = driver.children(recursive=True) if driver.is_running() else []
        if kills_driver:
            driver.kill()
            driver.wait()
            self.orphans += processes
            if out.exists():
                look(out, self.whole)
            self.embed(out, shard=(0, 1), unit_rows=UNIT)
            killed = "the driver"
        else:
            workers = [each for each in processes if is_worker(each)]
            chosen = chance.sample(workers, min(len(workers), chance.choice((1, 2))))
            for worker in chosen:
                worker.kill()
            killed = f"{len(chosen)} of {len(workers)} workers"
            require(driver.wait(timeout=300) == 0, log.read_text())
        compare(out, self.whole)
        shutil.rmtree(out)
        return f"killed {killed} when {done} units were embedded: right"


def wait_for(driver: psutil.Popen, out: Path, moment: int) -> int:
    """Wait until so many units are embedded, or the driver has ended; return how many are."""
    while driver.poll() is None:
        folder = out / "_units"
        done = sum(name.endswith(".json") for name in os.listdir(folder)) if folder.is_dir() else -1
        if done >= moment:
            return done
        time.sleep(0.01)
    return IMAGES // UNIT


def is_worker(process: psutil.Process) -> bool:
    """Tell whether a process embeds units."""
    try:
        return "UnitWorker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
