"""Does the paper's claim hold here? Lock modes on small data: recall and zero-shot accuracy on held-out captions.

    python benchmarks/science.py [--folder runs/science] [--turns SEEDS] [--done] [--plot science.png] [--json FILE]

Three data sets x three image towers (two of ImageNet, one of random weights) x the paper's lock modes x three seeds.
Every run sees the same number of pairs, with the paper's own start: a new linear head, no closed form. A fifth of the
captions is held out, by another seed for each turn. Classification tells the categories of the held-out images apart.
Hours on two cores; `--folder` keeps what is done, and the next call goes on. `--done` runs nothing, and shows that.
"""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import timm
from rich.table import Table
from timing import console, filled, parser

import lamplit
from lamplit.tuning.curves import new_figure

DATA = ("stamps", "openclipart", "emoji")
RANDOM = "random"  # the third image tower: EfficientNet-Lite0 with random weights
TOWERS = ("demo:efficientnet-lite0", "demo:efficientnet-lite1", RANDOM)
MODES = ("LU", "Lu", "UU", "uu", "Uu")
BATCH, STEPS = 128, 20  # so every run sees 2,560 pairs
# The paper's rate of a text tower; an image tower that is pre-trained gets a tenth, as in its appendix H.
RATES = {"lr": 1e-3}
IMAGE_RATES = {"LU": {}, "Lu": {}, "UU": {"image_lr": 1e-4}, "Uu": {"image_lr": 1e-4}, "uu": {"image_lr": 1e-3}}
MEASURES = ("accuracy@1", "image_to_text/recall@1", "text_to_image/recall@1")
# Zero-shot ImageNet accuracy, image to text, text to image, of B/32 models: table 2 (901 million private pairs) and
# figure 1 on the left (983 million pairs of YFCC).
PAPER = {
    "table 2": {"Lu": (0.701, 0.438, 0.286), "Uu": (0.572, 0.401, 0.270), "uu": (0.506, 0.389, 0.241)},
    "figure 1": {"LU": (0.636, 0.376, 0.221), "UU": (0.533, 0.376, 0.234), "uu": (0.421, 0.311, 0.179)},
}
Figures = dict[str, list[float]]  # a value for each seed, by measure


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, default=Path("runs/science"), help="stores, runs and figures")
    options.add_argument("--plot", type=Path, help="draw accuracy and recall here")
    options.add_argument("--done", action="store_true", help="show what is done, and run nothing")
    options = options.parse_args()
    options.turns = options.turns or (1 if options.quick else 3)
    science = Science(filled(options).folder, options.quick)
    grid = [*itertools.product(*([("stamps",), TOWERS[:1], ("LU", "Lu")] if options.quick else [DATA, TOWERS, MODES]))]
    if options.done:
        grid = [cell for cell in grid if all(science.file(*cell, seed).is_file() for seed in range(options.turns))]
    for data, tower in dict.fromkeys(choice[:2] for choice in grid if not options.done):
        science.store(data, tower)  # so that what is not installed is missed before hours have gone by
    cells = [
        {"data": data, "image_tower": tower, "mode": mode, "figures": science.cell(data, tower, mode, options.turns)}
        for data, tower, mode in grid
    ]
    show(cells, options.turns)
    if options.plot:
        draw(cells, options.plot)
    if options.json:
        options.json.write_text(json.dumps({"figures": cells}, indent=1) + "\n")


class Science:
    """A folder of stores, runs and figures; `quick` takes one step instead of all."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        folder.mkdir(parents=True, exist_ok=True)

    def cell(self, data: str, tower: str, mode: str, seeds: int) -> Figures:
        """Return the measures of one choice."""
        found = [self.figures(data, tower, mode, seed) for seed in range(seeds)]
        return {measure: [each[measure] for each in found] for measure in (*MEASURES, "captions", "classes")}

    def figures(self, data: str, tower: str, mode: str, seed: int) -> dict[str, float]:
        """Tune and measure one model, or read what was measured."""
        file = self.file(data, tower, mode, seed)
        if not file.is_file():
            run = self.folder / "runs" / file.stem
            file.write_text(json.dumps(self.measured(data, tower, mode, seed, run)) + "\n")
        found: dict[str, float] = json.loads(file.read_text())
        return found

    def file(self, data: str, tower: str, mode: str, seed: int) -> Path:
        """Return the file of one model's measures."""
        return self.folder / f"{data}-{tower.rpartition(':')[2]}-{mode}-{seed}.json"

    def measured(self, data: str, tower: str, mode: str, seed: int, run: Path) -> dict[str, float]:
        store = self.store(data, tower)
        settings = lamplit.TuneSettings(
            "demo:minilm", mode=mode, seed=seed, batch_size=BATCH, steps=1 if self.quick else STEPS, num_evals=1,
            closed_form=False, **RATES, **IMAGE_RATES[mode],
        )  # fmt: skip
        report = lamplit.tune(store, run, settings, workers=1, progress=True)
        source = store if mode[0] == "L" else lamplit.fetch(data)
        results = lamplit.evaluate(run, source, split="held_out", label_column="category", progress=True)
        accuracy = results[-1].metrics["accuracy@1"].value
        recalls = {measure: report.last[measure] for measure in MEASURES[1:]}
        return {MEASURES[0]: accuracy} | recalls | {
            "captions": report.held_out_captions, "classes": results[-1].classes
        }  # fmt: skip

    def store(self, data: str, tower: str) -> Path:
        store = self.folder / f"{data}-{tower.rpartition(':')[2]}.lance"
        spec = self.random_tower() if tower == RANDOM else tower
        lamplit.embed(lamplit.fetch(data), store, image_tower=spec, workers=1, progress=True)
        return store

    def random_tower(self) -> str:
        """Save EfficientNet-Lite0 with random weights, once."""
        folder = (self.folder / "random_tower").absolute()
        if not folder.exists():
            timm.models.save_for_hf(timm.create_model("tf_efficientnet_lite0", pretrained=False), folder)
        return f"timm:local-dir:{folder}"


def show(cells: list[dict[str, Any]], seeds: int) -> None:
    """Print mean and deviation over the seeds, and the paper's figures."""
    table = Table("data", "image tower", "mode", *MEASURES, title=f"mean and deviation of {seeds} seeds")
    for cell in cells:
        table.add_row(cell["data"], cell["image_tower"], cell["mode"], *(spread(cell["figures"][m]) for m in MEASURES))
    for where, modes in PAPER.items():
        for mode, values in modes.items():
            table.add_row(f"paper, {where}", "", mode, *(f"{value:.3f}" for value in values))
    console.print(table)
    for data, cell in {cell["data"]: cell["figures"] for cell in cells}.items():
        classes, captions = cell["classes"][0], cell["captions"][0]
        console.print(
            f"{data}: {captions:.0f} held-out captions, chance {1 / captions:.3f}; {classes:.0f} classes, chance "
            f"{1 / classes:.3f}; a share of so many has a standard error of at most {(0.25 / captions) ** 0.5:.3f}"
        )


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def draw(cells: list[dict[str, Any]], image: Path) -> None:
    """Draw accuracy and recall by mode: a row for each data set, the paper's beside them."""
    data = list(dict.fromkeys(cell["data"] for cell in cells))
    figure = new_figure(11, 2.6 * len(data))
    if figure is None:
        return
    axes = figure.subplots(len(data), 3, squeeze=False)
    for row, name in enumerate(data):
        for axis, measure in zip(axes[row], MEASURES, strict=True):
            for tower in dict.fromkeys(cell["image_tower"] for cell in cells):
                own = {
                    cell["mode"]: cell["figures"][measure]
                    for cell in cells
                    if (cell["data"], cell["image_tower"]) == (name, tower)
                }
                deviations = [statistics.stdev(values) if len(values) > 1 else 0 for values in own.values()]
                means = [statistics.fmean(values) for values in own.values()]
                axis.errorbar(
                    list(own), means, deviations, marker="o", linestyle="", capsize=3, label=tower.rpartition(":")[2]
                )
            for where, modes in PAPER.items():
                values = [modes[mode][MEASURES.index(measure)] for mode in modes]
                axis.plot(
                    list(modes),
                    values,
                    marker="x" if where == "table 2" else "+",
                    linestyle="",
                    color="grey",
                    label=f"paper, {where}",
                )
            axis.set_title(f"{name}: {measure}", fontsize=9)
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=6)
    figure.savefig(image, dpi=110)


if __name__ == "__main__":
    main()
