"""Kill `tune` at random moments, again and again: a model's folder is whole or not there, and the run goes on exactly.

    python tests/campaigns/kill_tune.py --trials 100

Each trial tunes in one of several ways, and is killed (SIGKILL) some times at random moments. After each kill the
folder must hold a model that loads whole, of a step at which the undisturbed run saved one, or none (`config.json` is
missing). The run that is left alone at last has to end in the same bytes as one that nobody disturbed: weights,
checkpoint, log and report. Linux and macOS: it forks, so that no trial has to import torch.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_model
from trials import child, end, finished, require, run_trials

import lamplit
from lamplit.errors import UsageError
from lamplit.store.embed.embedding import embed
from lamplit.towers.images.image_tower import open_image_tower
from lamplit.tuning import loop
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

IMAGES = 96
MOST_KILLS = 4
PARTS = ("text_tower.safetensors", "image_head.safetensors", "image_tower.safetensors", "split.safetensors")
# Each way writes other files: with a test split, without held-out captions, with a head for images, and from pixels.
WAYS: dict[str, dict[str, Any]] = {
    "Lu": {"mode": "Lu"},
    "Lu with a test split": {"mode": "Lu", "test_fraction": 0.2},
    "Lu, nothing held out": {"mode": "Lu", "val_fraction": 0.0},
    "Lu, image head, sigmoid, adafactor": {
        "mode": "Lu", "image_head": True, "loss": "sigmoid", "optimizer": "adafactor",
    },
    "uu": {"mode": "uu", "image_lr": 1e-3, "augment": "inception"},
}  # fmt: skip


class Campaign:
    """A store, and for each way the folder of a run that nobody disturbed, and how long it took."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance, self.killed = folder, chance, 0
        self.store = folder / "store.lance"
        self.seconds: dict[str, float] = {}
        require(finished(child(write_store, folder / "images", self.store)), "the images could not be embedded")

    def trial(self, number: int) -> bool:
        """Tune, kill, look, again and again; go on, compare; tell whether all was right."""
        way = list(WAYS)[number % len(WAYS)]
        whole, out = self.folder / way, self.folder / "run"
        if way not in self.seconds:
            began = time.monotonic()
            require(finished(child(run, self.store, whole, way)), f"{way} could not be tuned")
            self.seconds[way] = time.monotonic() - began
        right, waits = True, []
        for _ in range(self.chance.randint(1, MOST_KILLS)):
            process = child(run, self.store, out, way)
            waits.append(self.chance.random() * self.seconds[way])
            time.sleep(waits[-1])
            self.killed += os.waitpid(process, os.WNOHANG) == (0, 0) and end(process)
            right = right and finished(child(look, out))
        right = right and finished(child(run, self.store, out, way)) and finished(child(compare, out, whole))
        moments = ", ".join(f"{wait:.2f}" for wait in waits)
        print(f"trial {number}: {way}: killed after {moments} s: {'right' if right else 'WRONG'}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        return right


def write_store(images: Path, out: Path) -> None:
    """Embed made-up images, each with a caption of its own, by a tower that can be opened again."""
    images.mkdir()
    for place in range(IMAGES):
        pixels = np.random.default_rng(place).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{place:03}.png")
        (images / f"{place:03}.txt").write_text(f"caption {place} of {place % 7} and {place % 5}")
    torch.manual_seed(0)
    weights = images.with_name("tower.safetensors")
    save_model(open_image_tower("timm:test_vit", weights="random").backbone, str(weights))
    embed(images, out, image_tower="timm:test_vit", image_tower_weights=weights, backend="torch")


def run(store: Path, out: Path, way: str) -> None:
    """Tune, with many evaluations, and with a checkpoint after every step."""
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = 0.0
    given = {"steps": 8, "num_evals": 4, "batch_size": 16, "lr": 3e-3, "warmup_ratio": 0.0} | WAYS[way]
    tune(store, out, TuneSettings("scratch:tiny", **given), device="cpu")


def look(out: Path) -> None:
    """Check what a killed process left: a model that loads whole, or none."""
    if not (out / "config.json").exists():
        try:
            lamplit.load(out, device="cpu")
        except UsageError:
            return
        require(False, "a folder without config.json loads")
    model = lamplit.load(out, device="cpu", towers="text")
    require(bool(torch.isfinite(model.encode_texts(["a caption"])).all()), "a model is not whole")


def compare(out: Path, whole: Path) -> None:
    """Check a run that was finished: it is the undisturbed one, to the byte."""
    for name in ("config.json", *PARTS, "checkpoints/last.safetensors"):
        found, true = (file.read_bytes() if file.exists() else b"" for file in (out / name, whole / name))
        # A tower that trains is named after its folder.
        require(found == true.replace(str(whole.resolve()).encode(), str(out.resolve()).encode()), f"{name} differs")
    require(told(out / "log.jsonl") == told(whole / "log.jsonl"), "log.jsonl differs")
    reports = [json.loads((folder / "report.json").read_text()) | {"out": "", "seconds": 0} for folder in (out, whole)]
    require(reports[0] == reports[1], f"report.json differs: {reports}")
    require(not list(out.rglob("*.partial")), "partial files are left")


def told(log: Path) -> list[dict[str, Any]]:
    """Read a log without its times."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("seconds", "pairs_per_second")} for line in lines]


if __name__ == "__main__":
    run_trials(Campaign, 100)
