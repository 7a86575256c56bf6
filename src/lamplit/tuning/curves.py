"""Curves of a run as an image: loss, learning rate, logit scale and held-out recall over the steps."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lamplit.errors import MissingExtraError, require
from lamplit.tuning.checkpoint import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
_RECALLS = (
    "image_to_text/recall@1",
    "image_to_text/recall@5",
    "text_to_image/recall@1",
    "text_to_image/recall@5",
)


def draw_curves(log: Path, image: Path) -> None:
    """Draw a run's `log.jsonl` as a PNG, if matplotlib is installed."""
    figure = new_figure(10, 6)
    if figure is None:
        return
    lines = read_log(log)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if line.get("held_out")]
    axes = figure.subplots(2, 2)
    for axis, key, title in zip(
        axes.flat, ("loss", "lr", "logit_scale"), ("loss", "learning rate", "logit scale"), strict=False
    ):
        axis.plot([line["step"] for line in steps], [line[key] for line in steps], color="tab:blue", linewidth=1.2)
        axis.set_title(title)
    recall = axes[1, 1]
    for name in _RECALLS if evaluations else ():
        values = [line["held_out"][name] for line in evaluations]
        recall.plot([line["step"] for line in evaluations], values, marker="o", markersize=3, label=name)
    recall.set_title("held-out recall" if evaluations else "nothing held out")
    if evaluations:
        recall.legend(fontsize=7)
        recall.set_ylim(0, 1)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(image, dpi=110)


def new_figure(width: float, height: float) -> Figure | None:
    """Make an empty figure of so many inches; None, and one line in the log, if matplotlib is not installed."""
    if not _has_matplotlib():
        return None
    figure: Figure = require("matplotlib.figure", "plots").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", "plots").FigureCanvasAgg(figure)
    return figure


@cache  # so that it is logged once, however many runs a comparison has
def _has_matplotlib() -> bool:
    try:
        require("matplotlib", "plots")
    except MissingExtraError as error:
        logger.warning("no curves are drawn: %s", error)
        return False
    return True
