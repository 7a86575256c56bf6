"""Plots as SVG inside a page. They have no background and take their colours from the page's variables."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Marks of the models, in the page and in the plots; with one colour fewer, 42 models differ in one or the other
MARKS, _MARKERS = "●■▲◆▼★✚", "os^Dv*P"
COLORS = 6
# Colours that stand for variables of the page until the SVG is written
_INK, _FAINT, _LINES, _GROUND = "#00000a", "#00000b", "#00000c", "#00000d"
_VARIABLES = {_INK: "ink", _FAINT: "faint", _LINES: "lines", _GROUND: "ground"}
_VARIABLES |= {f"#0000{0x10 + place:02x}": f"model{place}" for place in range(COLORS)}
_NAME, _ROW = 23.0, 10.0  # pixels above the first row of a line, and between rows
_WIDTH = 400.0  # pixels of a plot as it is drawn: near a phone's, so that its letters stay readable there


@dataclass(frozen=True)
class Line:
    """One line of the plot of all results: values in percent."""

    label: str
    measured: Sequence[tuple[int, float, float, float]]  # place of the model, value, low, high
    reference: Mapping[int, float]  # what each of these models is compared with
    same_model: Collection[int]  # models whose reference is a published figure of their own
    published: Sequence[float]  # all figures of the data set


def accuracy_plot(lines: Sequence[Line]) -> Markup:
    """Draw every value with its interval, the figure it is compared with, and all other published ones."""
    figure, axis, rows = _figure_of_lines(lines, 0, 100)
    for line, places in zip(lines, rows, strict=True):
        _draw_published(axis, line.published, places)
        marked: set[float] = set()
        for place, (model, value, low, high) in zip(places, line.measured, strict=True):
            if model in line.reference and line.reference[model] not in marked:
                marked.add(line.reference[model])
                axis.plot(
                    line.reference[model], place, "D", color="none", markeredgecolor=_INK, markersize=7.5,
                    markeredgewidth=1.2, zorder=4,
                )  # fmt: skip
            _draw_value(axis, model, value, low, high, place)
    axis.set_xlabel("percent")
    return _svg(figure, "accuracy", "Every value with its 95 % interval beside the published figures")


def difference_plot(lines: Sequence[Line]) -> Markup:
    """Draw how far every value is from the figure of its own model; zero is the figure."""
    lines = [
        replace(line, measured=[each for each in line.measured if each[0] in line.same_model])
        for line in lines
        if line.same_model
    ]
    far = max(
        1.0,
        *(abs(end - line.reference[model]) for line in lines for model, _, *ends in line.measured for end in ends),
    )
    figure, axis, rows = _figure_of_lines(lines, -1.08 * far, 1.08 * far)
    axis.axvline(0, color=_INK, linewidth=1)
    for line, places in zip(lines, rows, strict=True):
        for place, (model, value, low, high) in zip(places, line.measured, strict=True):
            zero = line.reference[model]
            _draw_value(axis, model, value - zero, low - zero, high - zero, place)
    axis.set_xlabel("percentage points from the published figure")
    return _svg(figure, "difference", "Difference of every value from its published figure, with its 95 % interval")


def classes_plot(key: str, accuracies: Mapping[int, Sequence[float]]) -> Markup:
    """Draw the accuracies of all classes of each model, worst first."""
    figure, axis = _figure(230)
    for model, values in accuracies.items():
        # A thousand classes are drawn at 100 places: more are not seen, and make the page heavy.
        places = np.linspace(0, 1, min(100, len(values)))
        heights = 100 * np.quantile(np.asarray(values), places)
        axis.plot(100 * places, heights, color=_color(model), linewidth=1.8)
        if len(accuracies) == 1:
            axis.fill_between(100 * places, 0, heights, color=_color(model), alpha=0.14, linewidth=0)
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 102)
    axis.set_xlabel("percent of the classes, worst first")
    axis.set_ylabel("accuracy, percent")
    return _svg(figure, f"{key}-classes", "Accuracy of every class, sorted from worst to best")


def recall_plot(key: str, curves: Mapping[int, Mapping[str, Sequence[float]]]) -> Markup:
    """Draw recall against the number of answers: a full line from image to text, a dashed one back."""
    figure, axis = _figure(230)
    for model, directions in curves.items():
        for direction, values in directions.items():
            style = "-" if direction == "image_to_text" else (0, (4, 2))
            axis.plot(range(1, len(values) + 1), 100 * np.asarray(values), color=_color(model), linestyle=style)
    longest = max(len(values) for directions in curves.values() for values in directions.values())
    axis.set_xscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= max(2, longest)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(1, max(2, longest))
    axis.set_ylim(0, 102)
    axis.set_xlabel("answers looked at, k")
    axis.set_ylabel("recall@k, percent")
    return _svg(figure, f"{key}-recall", "Recall in both directions against the number of answers looked at")


def reliability_plot(key: str, bins: Mapping[int, Sequence[Mapping[str, float]]]) -> Markup:
    """Draw accuracy against confidence; the larger a mark, the more images."""
    figure, axis = _figure(230)
    axis.plot([0, 100], [0, 100], color=_FAINT, linewidth=1, linestyle=(0, (2, 2)))
    for model, filled in bins.items():
        filled = [each for each in filled if each["images"]]
        total = sum(each["images"] for each in filled)
        confidence, accuracy = ([100 * each[name] for each in filled] for name in ("confidence", "accuracy"))
        axis.plot(confidence, accuracy, color=_color(model), linewidth=1.2)
        for x, y, each in zip(confidence, accuracy, filled, strict=True):
            size = 4 + 2 * round(4 * math.sqrt(each["images"] / total))  # five sizes: each is drawn once in the page
            _draw_mark(axis, model, x, y, size)
    axis.set_xlim(0, 102)
    axis.set_ylim(0, 102)
    axis.set_xlabel("confidence, percent")
    axis.set_ylabel("accuracy, percent")
    return _svg(figure, f"{key}-reliability", "Accuracy against confidence")


def _figure(height: float, left: float = 46) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axis: Axes = figure.add_axes((left / _WIDTH, 40 / height, 1 - (left + 10) / _WIDTH, 1 - 50 / height))
    axis.patch.set_visible(False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT)
    axis.tick_params(colors=_INK, labelsize=11, length=0)
    axis.grid(color=_LINES, linewidth=0.7, clip_on=False)
    axis.set_axisbelow(True)
    axis.xaxis.label.set(color=_INK, size=11)
    axis.yaxis.label.set(color=_INK, size=11)
    return figure, axis


def _figure_of_lines(lines: Sequence[Line], left: float, right: float) -> tuple[Figure, Axes, list[list[float]]]:
    """Make a figure with a row of pixels for every model of every line, and say where these rows are.

    The names stand above their rows, inside the plot: beside them they would take half of a phone.
    """
    rows: list[list[float]] = []
    bottom = 0.0
    for line in lines:
        rows.append([bottom + _NAME + _ROW * place for place in range(len(line.measured))])
        bottom = rows[-1][-1] + _ROW
    figure, axis = _figure(bottom + 50, left=10)
    for line, places in zip(lines, rows, strict=True):
        axis.hlines(places, left, right, color=_LINES, linewidth=0.6, zorder=0)
        axis.annotate(
            line.label, (left, places[0]), (2, 6), textcoords="offset points", color=_INK, fontsize=10.5, va="bottom",
            parse_math=False, annotation_clip=False,
        )  # fmt: skip
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, 0)
    axis.set_yticks([])
    return figure, axis, rows


def _draw_value(axis: Axes, model: int, value: float, low: float, high: float, row: float) -> None:
    axis.plot([low, high], [row, row], color=_color(model), linewidth=2.2, solid_capstyle="butt", zorder=5)
    _draw_mark(axis, model, value, row, 5.5)


def _draw_mark(axis: Axes, model: int, x: float, y: float, size: float) -> None:
    marker = _MARKERS[model % len(_MARKERS)]
    axis.plot(
        x, y, marker, color=_color(model), markersize=size, markeredgecolor=_GROUND, markeredgewidth=0.7,
        clip_on=False, zorder=6,
    )  # fmt: skip


def _draw_published(axis: Axes, values: Sequence[float], places: Sequence[float]) -> None:
    """Draw strokes across the rows of a line, as one path: as marks of their own they would be half of the page."""
    across = [places[0] - 4, places[-1] + 4, np.nan]
    axis.plot(np.repeat(values, 3), across * len(values), color=_FAINT, linewidth=1, alpha=0.5, zorder=1)


def _color(model: int) -> str:
    return f"#0000{0x10 + model % COLORS:02x}"


def _svg(figure: Figure, key: str, title: str) -> Markup:
    """Write a figure as an element of a page: ids of its own, colours by variables, the page's letters."""
    file = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}), warnings.catch_warnings():
        # The browser writes the letters; matplotlib only has to guess how wide they are.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(file, format="svg", metadata=nothing)
    width, height = (72 * side for side in figure.get_size_inches())
    inside = file.getvalue().partition("</style>\n </defs>")[2]
    inside = re.sub(r' id="(?!m[0-9a-f]{10}|p[0-9a-f]{10})[^"]*"', "", inside)  # only what is referred to keeps its id
    inside = re.sub(r'((?: id="|href="#|url\(#))(?=[mp][0-9a-f]{10})', rf"\g<1>{key}-", inside)
    inside = re.sub(r" ?font-family: [^;\"]*;?", "", inside).replace("xlink:href", "href")
    for color, name in _VARIABLES.items():
        inside = inside.replace(color, f"var(--{name})")
    inside = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), inside)
    inside = re.sub(r' transform="rotate\(-0 [^"]*"|<g/>|stroke-linecap: square', "", inside)  # they do nothing
    inside = re.sub(r"\s*\n\s*", " ", inside)
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(head + inside)  # noqa: S704 - matplotlib has escaped the texts in it
