"""A starting point for small collections: tune on icons and clip art, then the stamps on top of that and alone.

Run with: python examples/starting_point.py [SET ...] (it needs the extras `demo` and `svg`)

By default all of Iconify's sets in colour are drawn, 39,809 pictures, which takes long. With names of sets, such as
`glyphs-poly`, it takes some minutes. Your own collection stands on the result with
`lamplit tune MINE.lance --text-tower model:runs/starting-point/model`, if it was embedded with the same image tower.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lamplit

OUT = Path("runs/starting-point")
IMAGE_TOWER, TEXT_TOWER = "demo:efficientnet-lite0", "demo:minilm"
COPY = 0.85  # cosine of two pictures that may be one drawing


def main(sets: list[str]) -> None:
    """Leave the stores, the model and the stamps' two models in `runs/starting-point`."""
    OUT.mkdir(parents=True, exist_ok=True)
    large, stamps = OUT / "large.lance", OUT / "stamps.lance"
    icons = lamplit.fetch("icons", **({"sets": sets} if sets else {}), workers=2, progress=True)
    for pairs, store in ((icons, large), (lamplit.fetch("openclipart"), large), (lamplit.fetch("stamps"), stamps)):
        lamplit.embed(pairs, store, image_tower=IMAGE_TOWER, workers=1, progress=True)
    left_out = leave_out_copies(large, stamps)
    print(f"{len(lamplit.Store(large))} pictures to start from, without {left_out} that look like a stamp")

    lamplit.tune(large, OUT / "model", lamplit.TuneSettings(text_tower=TEXT_TOWER), progress=True)
    for name, text_tower in (("alone", TEXT_TOWER), ("on the starting point", f"model:{OUT / 'model'}")):
        settings = lamplit.TuneSettings(text_tower=text_tower)
        found = lamplit.tune(stamps, OUT / f"stamps {name}".replace(" ", "-"), settings, progress=True).best
        print(f"the stamps {name}: image to text recall@1 {found['image_to_text/recall@1']:.3f}, ", end="")
        print(f"recall@5 {found['image_to_text/recall@5']:.3f}")


def leave_out_copies(large: Path, small: Path) -> int:
    """Delete the rows of a store that look like one of another, which is measured; return how many they were."""
    store = lamplit.Store(large)
    nearest = (store.vectors() @ lamplit.Store(small).vectors().T).amax(1)
    copies = [name for name, cosine in zip(store.column("id"), nearest.tolist(), strict=True) if cosine > COPY]
    store.delete(copies)
    return len(copies)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        main(sys.argv[1:])
    except lamplit.LamplitError as error:
        sys.exit(f"error: {error}")
