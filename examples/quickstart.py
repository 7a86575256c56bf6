"""The main job on real data: embed images once, tune a text tower on their captions, search with new words.

Run with: make quickstart (or python examples/quickstart.py SET ... for other sets of icons)

First with 700 stamps, where the start in closed form does all of the work; then with ten thousand icons, which are
enough for tuning to add to it. The icons come from npm's registry. Out of its reach the stamps are all.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

import lamplit

OUT = Path("runs/quickstart")
IMAGE_TOWER, TEXT_TOWER = "demo:efficientnet-lite0", "demo:minilm"
SETS = ("flat-color-icons", "fxemoji", "glyphs-poly", "icon-park", "openmoji", "streamline-kameleon-color")
QUERIES = ("a musical instrument", "poultry", "a marine mammal")  # words that no caption has
ICON_QUERIES = ("something to sit on", "a place to sleep", "stormy weather", "a reptile")  # no icon's name
RECALLS = tuple(f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5))
VENV = ".venv/bin/"  # where `make` installs
console, notes = Console(), Console(stderr=True)


def main(sets: Sequence[str]) -> None:
    """Leave stores, models, figures, plots and contact sheets in `runs/quickstart`."""
    handler = RichHandler(console=notes, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lamplit").setLevel(logging.INFO)
    OUT.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    stamps(OUT / "stamps.lance", OUT / "model")
    try:
        with stage(f"5/7  draw the icons of {len(sets)} sets (Iconify, from npm's registry)"):
            pairs = lamplit.fetch("icons", sets=sets, workers=2, progress=True)
    except lamplit.PairsError as error:
        console.print(f"The stamps are all there is here: {error}")
    else:
        icons(pairs, OUT / "icons.lance", OUT / "icons-model")
    console.print(f"\n{time.monotonic() - began:.0f} s in all. Next, on your own data:", style="bold")
    for command in (
        "lamplit embed my_images/ --image-tower timm:vit_base_patch14_dinov2.lvd142m --out mine.lance",
        "lamplit tune mine.lance --text-tower hf:sentence-transformers/all-MiniLM-L6-v2 --out runs/mine",
        'lamplit search runs/mine mine.lance "a red bicycle"',
    ):
        console.print(f"  {VENV}{command}", soft_wrap=True, highlight=False)


def stamps(store: Path, model: Path) -> None:
    """Fetch, embed, tune and search, with few pairs."""
    with stage("1/7  fetch 700 captioned images (Debian's tuxpaint-stamps)"):
        pairs = lamplit.fetch("stamps")
    with stage("2/7  embed each image once with a locked ImageNet tower"):
        embedded = lamplit.embed(pairs, store, image_tower=IMAGE_TOWER, workers=1, progress=True)
        counts = {"embedded": embedded.embedded, "copied": embedded.copies, "unchanged": embedded.unchanged}
        console.print(", ".join(f"{count} {what}" for what, count in counts.items()), highlight=False)
    with stage("3/7  tune a text tower to read the vectors; a fifth of the captions is never seen"):
        report = lamplit.tune(store, model, lamplit.TuneSettings(text_tower=TEXT_TOWER), progress=True)
        for part, state in report.trains.items():
            console.print(f"  {part}: {state['state']}, {state['parameters']:,} parameters", highlight=False)
        console.print(recall_table(report))
    with stage("4/7  search with words that no caption has"):
        found = searched(model, store, QUERIES)
        lamplit.contact_sheet(found, OUT / "searches.png")
        for query, hits in found.items():
            console.print(f"  {query}: {', '.join(hit.texts[0] for hit in hits[:4])}", highlight=False)
    results = report.best | {"closed_form": report.start, "last": report.last, "embed": asdict(embedded)}
    (OUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"images found: {OUT / 'searches.png'}; figures: {OUT / 'results.json'}")


def icons(pairs: Path, store: Path, model: Path) -> None:
    """Embed, tune, and compare with the start, with more pairs."""
    with stage("6/7  embed them"):
        lamplit.embed(pairs, store, image_tower=IMAGE_TOWER, workers=1, progress=True)
    with stage("7/7  tune on their names, and search before and after"):
        start = OUT / "icons-start"  # the closed form alone; the run after it reads it, and begins there
        lamplit.tune(store, start, lamplit.TuneSettings(text_tower=TEXT_TOWER, steps=0), progress=True)
        report = lamplit.tune(store, model, lamplit.TuneSettings(text_tower=TEXT_TOWER), progress=True)
        console.print(recall_table(report))
        before, after = (searched(each, store, ICON_QUERIES) for each in (start, model))
        both = {
            f"{query}: {when}": found[query]
            for query in ICON_QUERIES
            for when, found in (("before tuning", before), ("after", after))
        }
        lamplit.contact_sheet(both, OUT / "before_and_after.png")
        plot(report, OUT / "gain.png")
    console.print(f"before and after: {OUT / 'before_and_after.png'}, {OUT / 'gain.png'}")


def searched(model: Path, store: Path, queries: Sequence[str]) -> dict[str, list[lamplit.Hit]]:
    """Find the six likeliest images of each query."""
    searcher = lamplit.Searcher(lamplit.load(model, towers="text"), lamplit.Store(store))
    return {query: searcher.search(query, k=6) for query in queries}


def recall_table(report: lamplit.TuneReport) -> Table:
    """Recall on held-out captions: at the start, at the best step, and what a guess would get."""
    table = Table(
        title=f"held-out recall: {report.held_out_pairs} pairs, {report.held_out_captions} captions never seen"
    )
    for name in ("metric", "at the start", "best", "chance"):
        table.add_column(name)
    for name in RECALLS:
        chance = int(name[-1]) / report.held_out_captions
        table.add_row(name, f"{report.start[name]:.3f}", f"{report.best[name]:.3f}", f"{chance:.3f}")
    return table


def plot(report: lamplit.TuneReport, image: Path) -> None:
    """Draw recall on held-out captions at the start beside that of the tuned model."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axis = figure.subplots()
    for place, (label, metrics) in enumerate((("start, in closed form", report.start), ("tuned", report.best))):
        bars = [number + 0.4 * place for number in range(len(RECALLS))]
        axis.bar_label(axis.bar(bars, [metrics[name] for name in RECALLS], 0.38, label=label), fmt="%.3f")
    axis.set_xticks([number + 0.2 for number in range(len(RECALLS))], RECALLS)
    axis.set_title(f"recall on {report.held_out_captions:,} captions that were never seen")
    axis.margins(y=0.25)  # room for the figures and the legend
    axis.legend(loc="upper left", ncols=2)
    figure.savefig(image, dpi=110)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print a heading, and at the end how long the stage took."""
    console.rule(name, align="left")
    started = time.monotonic()
    yield
    console.print(f"[dim]{time.monotonic() - started:.1f} s[/dim]")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        main(sys.argv[1:] or SETS)
    except lamplit.LamplitError as error:
        sys.exit(f"error: {error}")
