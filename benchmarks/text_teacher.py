"""What a head learns from the vectors of texts in place of images: with and without whitening, and across the gap.

    python benchmarks/text_teacher.py [TEXT_TOWER] [--quick]

Run it after examples/old_index.py: it takes that script's split and its English model. The head is fitted in closed
form to the captions in one language after the other, with the vectors of their pictures or of the English captions,
and the held-out pictures are searched. Vectors of a CLIP's texts all share one direction, which is not that of its
images (the modality gap). The English model here has next to no such direction, so one is added: half as long again as
the vectors themselves, and drawn at random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import lamplit
from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.tuning.head import closed_form
from lamplit.tuning.head.closed_form import ClosedForm, count_anchors
from lamplit.tuning.split import Links, content_hashes, held_out_recall, link

FOLDER = Path("runs/old_index")
COLUMNS = {"German": "text_de", "Russian": "text_ru", "Japanese": "text_ja"}
GAP = 1.5  # length of what is added to unit vectors
WHITENS, LEAVES = closed_form.SHRINKAGE, 1e9  # so much shrinkage leaves nothing of the covariance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text_tower", nargs="?", default="demo:minilm")
    parser.add_argument("--quick", action="store_true", help="one language alone")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if not (FOLDER / "english").exists():
        raise SystemExit("error: run examples/old_index.py first, in this folder")
    store, held_out = lamplit.Store(FOLDER / "train.lance"), lamplit.Store(FOLDER / "held_out.lance")
    teacher = lamplit.load(FOLDER / "english", device="cpu")
    class_head = lamplit.open_image_tower(store.tower.spec).class_head
    ztxt = teacher.encode_texts([texts[0] for texts in store.texts()])
    apart = GAP * F.normalize(torch.randn(store.tower.width, generator=torch.Generator().manual_seed(0)), dim=0)
    sides = {
        "pictures": (store.vectors(), WHITENS),
        "pictures, not whitened": (store.vectors(), LEAVES),
        "texts": (ztxt, WHITENS),
        "texts, not whitened": (ztxt, LEAVES),
        "texts across a gap": (F.normalize(ztxt + apart, dim=-1), WHITENS),
        "texts across a gap, not whitened": (F.normalize(ztxt + apart, dim=-1), LEAVES),
    }
    tower = open_text_tower(options.text_tower, width=store.tower.width)
    columns = dict(list(COLUMNS.items())[: 1 if options.quick else None])
    found: dict[str, dict[str, float]] = {name: {} for name in sides}
    for language, column in columns.items():
        head, links = with_new_head(tower, store, column, class_head)
        for name, (vectors, closed_form.SHRINKAGE) in sides.items():
            head.fit(vectors[links.image_index], links.text_index)
            found[name][language] = measure(tower, held_out, column)
    table = Table("the head is fitted to", *columns, title=f"mean recall on held-out pictures; {options.text_tower}")
    for name, recalls in found.items():
        table.add_row(name, *(f"{recall:.3f}" for recall in recalls.values()))
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps({"figures": [found]}) + "\n")


def with_new_head(
    tower: TextTower, store: lamplit.Store, column: str, class_head: ClassHead | None
) -> tuple[ClosedForm, Links]:
    """Give the tower a head for the captions of a column, still to be fitted."""
    links = link(range(len(store)), store.texts(column))
    anchors = count_anchors(links.texts, class_head)
    tower.head = KernelHead(tower.head.in_features, store.tower.width, anchors)
    return ClosedForm(tower, links.texts, class_head), links


@torch.no_grad()
def measure(tower: TextTower, store: lamplit.Store, column: str) -> float:
    """Search the pictures of a store by their captions, and the captions by the pictures."""
    links = link(range(len(store)), store.texts(column), content_hashes(store))
    ztxt = F.normalize(tower(tower.tokenize(links.texts)), dim=-1)
    return held_out_recall(store.vectors(), ztxt, links)["mean_recall"]


if __name__ == "__main__":
    main()
