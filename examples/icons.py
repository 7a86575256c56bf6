"""Icons by what they mean: draw some of Iconify's sets, tune on their names, and search with words that no name has.

Run with: python examples/icons.py [SET ...] (it needs the extras `demo` and `svg`)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import lamplit

OUT = Path("runs/icons")
SETS = ("flat-color-icons", "fxemoji", "glyphs-poly", "icon-park", "streamline-kameleon-color")  # 5,284 pictures
QUERIES = ("something to eat", "a place to sleep", "bad weather", "an animal that lives in water")


def main(sets: Sequence[str]) -> None:
    """Leave the store, the model and a contact sheet in `runs/icons`."""
    OUT.mkdir(parents=True, exist_ok=True)
    store, model = OUT / "icons.lance", OUT / "model"
    pairs = lamplit.fetch("icons", sets=sets, workers=2, progress=True)  # a table that holds the pictures
    lamplit.embed(pairs, store, image_tower="demo:efficientnet-lite0", workers=1, progress=True)
    report = lamplit.tune(store, model, lamplit.TuneSettings(text_tower="demo:minilm"), progress=True)
    recall, chance = report.best["text_to_image/recall@5"], 5 / report.held_out_captions
    print(f"held-out names find their picture: recall@5 {recall:.3f}, chance {chance:.3f}")

    searcher = lamplit.Searcher(lamplit.load(model, towers="text"), lamplit.Store(store))
    found = {query: searcher.search(query, k=6) for query in QUERIES}
    for query, hits in found.items():
        print(f"{query}: {', '.join(hit.texts[0] for hit in hits)}")
    lamplit.contact_sheet(found, OUT / "searches.png")
    print(f"images: {OUT / 'searches.png'}; on a page: lamplit app {model} {store}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        main(sys.argv[1:] or SETS)
    except lamplit.LamplitError as error:
        sys.exit(f"error: {error}")
