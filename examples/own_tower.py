"""Any torch module can be the locked tower: this one has no weights, and sees only colours.

Run with: python examples/own_tower.py
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

import lamplit

OUT = Path("runs/own_tower")
QUERIES = ("red", "yellow", "green", "black")  # few stamps are blue, so "blue" finds black


class Colours(nn.Module):
    """A histogram of colours: takes (B, 3, height, width) between 0 and 1, gives (B, 216)."""

    def forward(self, images: Tensor) -> Tensor:
        """Count the pixels in 6 × 6 × 6 boxes of red, green and blue, but not white paper."""
        red, green, blue = (images * 5).round().long().unbind(1)
        boxes = nn.functional.one_hot(red * 36 + green * 6 + blue, 216).float().mean((1, 2))
        boxes[:, -1] = 0.01  # white is the background of the stamps
        return boxes.sqrt()  # so that one large area does not hide the rest


def main() -> None:
    """Embed, tune and search with this tower."""
    OUT.mkdir(parents=True, exist_ok=True)
    # The tower takes 64 × 64 pixels between 0 and 1; images are squeezed to that size.
    images = lamplit.Preprocessing((64, 64), mean=(0, 0, 0), std=(1, 1, 1), fit="squash")
    tower = lamplit.open_image_tower(Colours(), preprocessing=images)
    embedded = lamplit.embed(lamplit.fetch("stamps"), OUT / "stamps.lance", image_tower=tower)
    settings = lamplit.TuneSettings(text_tower="demo:minilm", epochs=5, num_evals=1)
    report = lamplit.tune(OUT / "stamps.lance", OUT / "model", settings)
    recall, chance = report.last["text_to_image/recall@5"], 5 / report.held_out_captions
    print(f"{embedded.embedded + embedded.copies + embedded.unchanged} images as vectors of {tower.width} numbers")
    print(f"held-out captions: recall@5 {recall:.3f}, chance {chance:.3f}")

    # A search needs only the text tower. A module of yours is not saved with the model: lamplit could not build it.
    model = lamplit.load(OUT / "model", towers="text")
    searcher = lamplit.Searcher(model, OUT / "stamps.lance")
    found = {query: searcher.search(query, k=6) for query in QUERIES}
    lamplit.contact_sheet(found, OUT / "searches.png")
    for query, hits in found.items():
        print(f"{query}: {', '.join(hit.texts[0] for hit in hits)}")
    print(f"images: {OUT / 'searches.png'}")


if __name__ == "__main__":
    main()
