"""Captions in scripts that a text tower cannot write: held-out recall with and without `--train-tokenizer`.

    python benchmarks/new_scripts.py STORE [COLUMNS] [--quick]

STORE is the quickstart's stamps.lance, with its columns of translations. COLUMNS are separated by commas.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import lamplit
from lamplit.towers.texts.more_tokens import unknown_share
from lamplit.towers.texts.text_tower import open_text_tower

TOWER = "demo:minilm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("columns", nargs="?", default="text_ml,text_am,text_km,text_ka")
    parser.add_argument("--quick", action="store_true", help="one step")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    store = lamplit.Store(options.store)
    tower = open_text_tower(TOWER, width=store.tower.width)
    table = Table("column", "unknown", "image to text", "with pieces", "text to image", "with pieces", "chance",
                  title=f"held-out recall@5, {TOWER}")  # fmt: skip
    figures = []
    for column in options.columns.split(","):
        texts = [text for row in store.texts(column) for text in row]
        share = unknown_share(tower.tokenizer, texts)
        without, given = (tune(store, column, options.quick, train_tokenizer=given) for given in (False, True))
        keys = [f"{way}/recall@5" for way in ("image_to_text", "text_to_image")]
        recalls = [f"{report.best[key]:.3f}" for key in keys for report in (without, given)]
        table.add_row(column, f"{share:.0%}", *recalls, f"{5 / without.held_out_captions:.3f}")
        figures.append({"column": column, "unknown": share, "without": without.best, "with": given.best})
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}) + "\n")


def tune(store: lamplit.Store, column: str, quick: bool, **settings: Any) -> lamplit.TuneReport:
    """Tune on a column."""
    chosen = lamplit.TuneSettings(
        TOWER, text_column=column, epochs=4, batch_size=64, lr=2e-4, steps=1 if quick else None, **settings
    )
    with tempfile.TemporaryDirectory() as folder:
        return lamplit.tune(store, Path(folder) / "run", chosen, device="cpu")


if __name__ == "__main__":
    main()
