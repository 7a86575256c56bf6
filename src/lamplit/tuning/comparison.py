"""Compare image towers, text towers and lock modes: a grid of runs on the same pairs, with its spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError
from lamplit.files import write_text
from lamplit.locations.paths import require_local
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store, as_store
from lamplit.tuning.curves import new_figure
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

METRICS = ("image_to_text/recall@1", "image_to_text/recall@5", "text_to_image/recall@1", "text_to_image/recall@5")


@dataclass
class Cell:
    """One choice of towers and mode: held-out metrics after the last step, one value for each seed.

    Attributes:
        image_tower: what made the vectors, such as `demo:efficientnet-lite0`.
        text_tower: what was tuned, such as `demo:minilm`.
        mode: the two letters of the lock mode.
        metrics: the values of each metric, such as `image_to_text/recall@1`, one for each seed.
        seconds: how long each run took.
    """

    image_tower: str
    text_tower: str
    mode: str
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A short name of the choice."""
        return f"{self.mode}  {_short(self.image_tower)}  {_short(self.text_tower)}"

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the seeds."""
        return statistics.fmean(self.metrics[metric])

    def spread(self, metric: str) -> float:
        """Return the standard deviation of a metric over the seeds; 0 for one seed."""
        values = self.metrics[metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass
class Comparison:
    """The results of a grid of runs.

    Attributes:
        out: folder of the comparison.
        seeds: number of runs of each choice.
        captions: number of distinct captions that are held out, in the run of the first seed.
        cells: one for each choice of towers and mode.
        impossible: choices that cannot be run, and why.
    """

    out: str
    seeds: int
    captions: int
    cells: list[Cell] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)


def compare(
    source: str | Path | Store,
    out: str | Path,
    *,
    image_towers: Sequence[str] = (),
    text_towers: Sequence[str],
    modes: Sequence[str],
    seeds: int = 3,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Comparison:
    """Tune every choice of image tower, text tower and lock mode, and measure the recall of each.

    Every seed has its own split into training and held-out pairs, the same for all choices. Run again, it goes on
    where it was. The folder `out` keeps the stores, the runs, `comparison.json` and `comparison.png`.

    On the command line: `lamplit compare`.

    Args:
        source: pairs, which are embedded with each tower; or a store, whose own tower is the only one.
        out: folder of the comparison.
        image_towers: specs, as `open_image_tower` takes them; empty for a store.
        text_towers: specs, as `open_text_tower` takes them.
        modes: lock modes, two letters of the paper each, such as `Lu`, `LU`, `UU`, `uu`.
        seeds: runs of each choice.
        settings: other settings by the names of `TuneSettings`, the same for all runs.
        device: torch device; by default the accelerator, if there is one.
        workers: processes that decode images.
        progress: show bars on stderr.

    Returns:
        A cell for each choice with its metrics, and the choices that cannot be run.

    Raises:
        UsageError: the grid is empty, a setting is unknown, or image towers are named and the source is a store.

    Example:
        >>> found = lamplit.compare("stamps.lance", "grid", text_towers=["demo:minilm"], modes=["LU", "LL"], seeds=2)
        >>> found.cells[0].mean("image_to_text/recall@1")
    """
    require_local(out, "a comparison")
    out = Path(out)
    settings = settings or {}
    unknown = settings.keys() - TuneSettings.__dataclass_fields__.keys()
    if unknown:
        raise UsageError(f"unknown settings {', '.join(sorted(unknown))}; TuneSettings lists the known ones")
    if not (text_towers and modes and seeds >= 1 and settings.get("val_fraction") != 0):
        raise UsageError("nothing to compare: give at least one text tower, one mode, one seed, and captions held out")
    stores = _stores(source, out, image_towers, device, workers, progress)
    comparison = Comparison(str(out), seeds, 0)
    for tower, store in stores.items():
        for text in text_towers:
            for mode in modes:
                cell = Cell(tower, text, mode, {metric: [] for metric in METRICS})
                try:
                    runs = [_settings(text, mode, seed, settings) for seed in range(seeds)]
                except UsageError as error:
                    comparison.impossible.append(f"{cell.name}: {error}")
                    continue
                for run in runs:
                    folder = out / "runs" / f"{_file(tower)}-{_file(text)}-{mode}-{run.seed}"
                    report = tune(store, folder, run, device=device, workers=workers, progress=progress)
                    comparison.captions = comparison.captions or report.held_out_captions
                    cell.seconds.append(report.seconds)
                    for metric in METRICS:
                        cell.metrics[metric].append(report.last[metric])
                comparison.cells.append(cell)
                write_text(out / "comparison.json", json.dumps(asdict(comparison), indent=2) + "\n")
    if not comparison.cells:
        raise UsageError(f"nothing could be compared: {'; '.join(comparison.impossible)}")
    draw_comparison(comparison, out / "comparison.png")
    return comparison


def draw_comparison(comparison: Comparison, image: Path) -> None:
    """Draw recall@1 both ways for every choice, with the spread over seeds, as a PNG, if matplotlib is installed."""
    cells = sorted(comparison.cells, key=lambda cell: cell.mean(METRICS[0]))
    figure = new_figure(9, 1.2 + 0.42 * len(cells))
    if figure is None:
        return
    axis = figure.subplots()
    for offset, metric, color in ((0.2, METRICS[0], "tab:blue"), (-0.2, METRICS[2], "tab:orange")):
        heights = [row + offset for row in range(len(cells))]
        means, spreads = ([getattr(cell, kind)(metric) for cell in cells] for kind in ("mean", "spread"))
        axis.barh(heights, means, height=0.38, xerr=spreads, color=color, label=metric, error_kw={"capsize": 2})
    axis.set_yticks(range(len(cells)), [cell.name for cell in cells])
    axis.axvline(1 / comparison.captions, color="grey", linestyle=":", label="chance")
    axis.set_xlabel(f"held-out recall, mean and deviation of {comparison.seeds} seeds")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(image, dpi=110)


def _stores(
    source: str | Path | Store, out: Path, towers: Sequence[str], device: str | None, workers: int, progress: bool
) -> dict[str, Store]:
    if isinstance(source, Store) or Store.exists(source):
        store = as_store(source)
        if towers:
            raise UsageError(
                f"{store.path} has vectors of {store.tower.spec} alone; to compare other towers, give pairs"
            )
        return {store.tower.spec: store}
    if not towers:
        raise UsageError(f"{source} are pairs: give the towers to embed them with, --image-towers A,B")
    stores = {}
    for tower in towers:
        path = out / "stores" / f"{_file(tower)}.lance"
        path.parent.mkdir(parents=True, exist_ok=True)
        embed(source, path, image_tower=tower, device=device, workers=workers, progress=progress)
        stores[tower] = Store(path)
    return stores


def _settings(text: str, mode: str, seed: int, others: Mapping[str, Any]) -> TuneSettings:
    return TuneSettings(**{**others, "text_tower": text, "mode": mode, "seed": seed})


def _short(spec: str) -> str:
    return spec.rpartition("/")[2] if "/" in spec else spec.partition(":")[2] or spec


def _file(spec: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in spec)
