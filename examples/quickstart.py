"""The main job on real data: embed images once, tune a text tower on their captions, search with new words.

Run with: make quickstart
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

import lamplit

OUT = Path("runs/quickstart")
QUERIES = ("a musical instrument", "poultry", "a marine mammal")  # words that no caption has
VENV = ".venv/bin/"  # where `make` installs
console, notes = Console(), Console(stderr=True)


def main() -> None:
    """Run the four stages; leave the model, results and a contact sheet in `runs/quickstart`."""
    handler = RichHandler(console=notes, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lamplit").setLevel(logging.INFO)
    OUT.mkdir(parents=True, exist_ok=True)
    store, model = OUT / "stamps.lance", OUT / "model"
    with stage("1/4  fetch 700 captioned images (Debian's tuxpaint-stamps)"):
        pairs = lamplit.fetch("stamps")
    with stage("2/4  embed each image once with a locked ImageNet tower"):
        tower = "demo:efficientnet-lite0"
        embedded = lamplit.embed(pairs, store, image_tower=tower, workers=1, progress=True)
        counts = {"embedded": embedded.embedded, "copied": embedded.copies, "unchanged": embedded.unchanged}
        console.print(", ".join(f"{count} {what}" for what, count in counts.items()), highlight=False)
    with stage("3/4  tune a text tower to read the vectors; a fifth of the captions is never seen"):
        report = lamplit.tune(store, model, lamplit.TuneSettings(text_tower="demo:minilm"), progress=True)
        for part, state in report.trains.items():
            console.print(f"  {part}: {state['state']}, {state['parameters']:,} parameters", highlight=False)
        console.print(recall_table(report))
    with stage("4/4  search with words that no caption has"):
        searcher = lamplit.Searcher(lamplit.load(model, towers="text"), lamplit.Store(store))
        found = {query: searcher.search(query, k=6) for query in QUERIES}
        lamplit.contact_sheet(found, OUT / "searches.png")
        for query, hits in found.items():
            console.print(f"  {query}: {', '.join(hit.texts[0] for hit in hits[:4])}", highlight=False)
    results = report.best | {"closed_form": report.start, "last": report.last, "embed": asdict(embedded)}
    (OUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"\nimages found: {OUT / 'searches.png'}; figures: {OUT / 'results.json'}")
    console.print("\nNext, on your own data:", style="bold")
    for command in (
        "lamplit embed my_images/ --image-tower timm:vit_base_patch14_dinov2.lvd142m --out mine.lance",
        "lamplit tune mine.lance --text-tower hf:sentence-transformers/all-MiniLM-L6-v2 --out runs/mine",
        'lamplit search runs/mine mine.lance "a red bicycle"',
    ):
        console.print(f"  {VENV}{command}", soft_wrap=True, highlight=False)


def recall_table(report: lamplit.TuneReport) -> Table:
    """Recall on held-out captions: at the start, at the best step, and what a guess would get."""
    table = Table(
        title=f"held-out recall: {report.held_out_pairs} pairs, {report.held_out_captions} captions never seen"
    )
    for name in ("metric", "at the start", "best", "chance"):
        table.add_column(name)
    for name in (f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)):
        chance = int(name[-1]) / report.held_out_captions
        table.add_row(name, f"{report.start[name]:.3f}", f"{report.best[name]:.3f}", f"{chance:.3f}")
    return table


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
        main()
    except lamplit.LamplitError as error:
        sys.exit(f"error: {error}")
