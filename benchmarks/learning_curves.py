"""How recall grows with the number of captioned images, at the defaults: is your data enough?

    python benchmarks/learning_curves.py [--folder runs/learning] [--turns SEEDS] [--quick] [--plot learning.png]

From the icons in colour, 2,000 captions with all their images are kept for the test. Of the other images, 100 to all
are tuned on, drawn by one more seed for each turn. "Start" is the closed form alone, "both" what `lamplit tune` makes
of it, "tuned" five passes from a linear head that is random, at the rate that a head from scratch needs.
The folder keeps what is done.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from recall import IMAGE_TOWER, START, TEXT_TOWER, Bench, retrieval
from rich.table import Table
from timing import console, filled, parser

import lamplit
from lamplit.tuning.curves import new_figure
from lamplit.tuning.split import Split, split_store

SIZES = (100, 300, 1000, 3000, 10_000, 30_000)
TEST_CAPTIONS = 2000
MANY = 10_000  # from so many images on, one seed says it
MEASURE = "image_to_text/recall@5"
# Of the runs from a random head: the rate and the passes of a kernel head that trains, from 10,000 pairs on.
ALONE = {"closed_form": False, "lr": 3e-4, "epochs": 5.0}
WAYS: dict[str, dict[str, Any]] = {"start": START, "tuned": ALONE, "both": {}}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, default=Path("runs/learning"), help="stores, runs and figures")
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images")
    options.add_argument("--plot", type=Path, help="draw the curves here")
    options = filled(options.parse_args())
    curves = Curves(options.folder, quick=options.quick)
    sizes = [100] if options.quick else options.sizes
    points = [{"images": size} | curves.point(size, options.turns) for size in sizes]
    captions = len(curves.split.held_out.texts)
    figures = {
        "data": curves.data, "image_tower": IMAGE_TOWER, "text_tower": TEXT_TOWER, "measure": MEASURE,
        "captions": captions, "chance": 5 / captions, "points": points,
    }  # fmt: skip
    show(figures)
    if options.plot:
        draw(figures, options.plot)
    if options.json:
        options.json.write_text(json.dumps({"figures": [figures]}, indent=1) + "\n")


class Curves(Bench):
    """Stores of different sizes, the runs on them, and the images that all are measured on."""

    @property
    def data(self) -> str:
        return "stamps" if self.quick else "icons"

    @cached_property
    def split(self) -> Split:
        """Captions to tune on, and those that are kept for the test, by the rule of `lamplit tune`."""
        store = lamplit.Store(self.store(self.data))
        distinct = len({text.casefold() for texts in store.column("texts") for text in texts})
        return split_store(store, "texts", (100 if self.quick else TEST_CAPTIONS) / distinct, seed=0)

    def parts(self) -> tuple[Path, Path]:
        """Return the store that is tuned on, and the one that is measured on: no caption is in both."""
        store = self.store(self.data)
        ids = lamplit.Store(store).column("id")
        test = {ids[row] for row in set(self.split.held_out.image_index.tolist())}
        train = {ids[row] for row in set(self.split.train.image_index.tolist())}
        return (
            self.part(store, "learning-train", lambda row: row["id"] in train),
            self.part(store, "learning-test", lambda row: row["id"] in test),
        )

    def point(self, size: int, seeds: int) -> dict[str, list[float]]:
        """Return the recall of each way, one value a seed; large sizes have one seed, they vary little."""
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(seeds if size < MANY else 1):
            file = self.folder / f"learning-{size}-{seed}.json"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(self.measured(size, seed), indent=1) + "\n")
            for way, value in json.loads(file.read_text()).items():
                found[way].append(value)
        return found

    def measured(self, size: int, seed: int) -> dict[str, float]:
        """Tune on so many images in each way, and return the recall on the test's images."""
        train, test = self.parts()
        ids = lamplit.Store(train).column("id")
        drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:size]
        kept = {ids[row] for row in drawn.tolist()}
        name = f"learning-{size}-{seed}"
        store = self.part(train, name, lambda row: row["id"] in kept)
        found = {}
        for way, given in WAYS.items():
            self.tune(store, f"{name}-{way}", **given)
            found[way] = retrieval(test)(str(self.folder / f"{name}-{way}-0"))[MEASURE]
        return found


def show(figures: dict[str, Any]) -> None:
    table = Table("images", *WAYS, title=f"{MEASURE} among {figures['captions']:,} captions that none was tuned on")
    for point in figures["points"]:
        table.add_row(f"{point['images']:,}", *(with_spread(point[way]) for way in WAYS))
    console.print(table)


def with_spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def draw(figures: dict[str, Any], image: Path) -> None:
    """Draw recall against the number of images."""
    figure = new_figure(7, 4.2)
    if figure is None:
        return
    axis = figure.subplots()
    sizes = [point["images"] for point in figures["points"]]
    labels = {"start": "closed form alone", "tuned": "tuned from a random head", "both": "lamplit tune: both"}
    for way, label in labels.items():
        values = [point[way] for point in figures["points"]]
        spreads = [stdev(each) if len(each) > 1 else 0 for each in values]
        axis.errorbar(sizes, [mean(each) for each in values], spreads, marker="o", capsize=3, label=label)
    axis.axhline(figures["chance"], color="grey", linestyle=":", label="chance")
    axis.set_xscale("log")
    axis.set_xlabel("captioned images")
    axis.set_ylabel(f"{MEASURE}, {figures['captions']:,} captions")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(image, dpi=110)


if __name__ == "__main__":
    main()
