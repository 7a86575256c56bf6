"""Compare models of other libraries with lamplit's reading of them; write `two-tower-models.json` and `-models.md`.

    python docs/two_tower_models.py            every family: a minute on one core
    python docs/two_tower_models.py --render   the page alone, from what was seen before

A row is one model with random weights: built and saved by its own library, opened by that library and by lamplit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub, which reads it once
FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tests"))

import torch
from dinotxt_files import IMAGES, NAMES, expected, prepare, write_files
from open_clip_families import open_clip_families, owners_images, owners_texts
from text_families import TEXTS
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor
from two_tower_families import families

import lamplit
from lamplit.model import LiT
from lamplit.towers.images.pooling import pool_features

ALLOWED = 1e-5
SENTENCES = [*TEXTS, "red green " * 40, "a “quoted”  &amp; spaced\ttext"]
WORDS = {
    "image vectors": "of images that the library's own processor prepared",
    "text vectors": "of texts, one of them too long and one empty",
    "preprocessing": "of an image's normalised pixels, resized by Pillow if the library does",
    "multiplier": "of the logit multiplier, relative to it",
    "bias": "of the logit bias, if the model has one",
    "saved and loaded": "after `model.save` and `lamplit.load`",
    "resized by torchvision": "of image vectors as `encode_images` gives them; for information, and not bounded",
}
UNBOUNDED = "resized by torchvision"
DINOTXT_TITLES = {"dinov2": "dino.txt of DINOv2", "dinov3": "dino.txt of DINOv3"}


@dataclass
class Row:
    """One family: the largest differences from its library."""

    family: str
    spec: str
    differences: dict[str, float | None]

    def failures(self) -> list[str]:
        """Name what differs by more than is allowed."""
        bounded = {name: value for name, value in self.differences.items() if name != UNBOUNDED and value is not None}
        return [name for name, value in bounded.items() if not value <= ALLOWED]


@dataclass(frozen=True)
class Owner:
    """What the library gives: unit vectors, prepared pixels, multiplier and bias."""

    zimg: Tensor
    ztxt: Tensor
    pixels: Tensor
    multiplier: float
    bias: float | None
    resizes_tensors: bool = False  # with torchvision, as lamplit itself


def measure(family: str, spec: str, owner: Owner, folder: Path) -> Row:
    """Open the model as `spec`, and compare."""
    model = lamplit.load(spec, device="cpu")
    tower: Any = model.unlocked_image_tower
    prepare_one = model.preprocess if owner.resizes_tensors else tower.preprocessing.reference
    pixels = torch.stack([prepare_one(image) for image in IMAGES])
    with torch.no_grad():
        zimg = F.normalize(pool_features(tower.backbone, owner.pixels), dim=-1)
    differences: dict[str, float | None] = {
        "image vectors": largest(zimg, owner.zimg),
        "text vectors": largest(model.encode_texts(SENTENCES), owner.ztxt),
        "preprocessing": largest(pixels, owner.pixels),
        "multiplier": abs(float(model.logit_multiplier) / owner.multiplier - 1),
        "bias": None if owner.bias is None or model.logit_bias is None else abs(float(model.logit_bias) - owner.bias),
    }
    assert (owner.bias is None) == (model.logit_bias is None)
    model.save(folder)
    again: LiT = lamplit.load(folder, device="cpu")
    saved = largest(again.encode_texts(SENTENCES), model.encode_texts(SENTENCES))
    differences["saved and loaded"] = max(saved, largest(again.encode_images(IMAGES), model.encode_images(IMAGES)))
    differences[UNBOUNDED] = largest(model.encode_images(IMAGES), owner.zimg)
    return Row(family, spec.partition(":")[0], differences)


def largest(left: Tensor, right: Tensor) -> float:
    """Return the largest difference of any two numbers."""
    return float((left - right).abs().max()) if left.shape == right.shape else float("inf")


@torch.no_grad()
def of_transformers(family: Any, folder: Path) -> Owner:
    """Save a model of transformers into `folder`; return what transformers gives."""
    model = family.save(folder)
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    bias = getattr(model, "logit_bias", None)
    return Owner(
        F.normalize(family.images(model, folder, IMAGES), dim=-1),
        F.normalize(family.texts(model, folder, SENTENCES), dim=-1),
        torch.as_tensor(processor(images=IMAGES, return_tensors="pt")["pixel_values"]),
        family.multiplier(model),
        None if bias is None else float(bias),
    )


@torch.no_grad()
def of_sentence_transformers(family: Any, folder: Path) -> Owner:
    """Save a CLIP by sentence-transformers into `folder`; return what sentence-transformers gives."""
    owner = family.save_sentences(folder)
    pixels = owner.preprocess([image.convert("RGB") for image in IMAGES])["pixel_values"]
    both = [owner.encode(given, convert_to_tensor=True, normalize_embeddings=True) for given in (IMAGES, SENTENCES)]
    return Owner(both[0], both[1], pixels, float(owner[0].auto_model.logit_scale.exp()), None, resizes_tensors=True)


@torch.no_grad()
def of_open_clip(family: Any, folder: Path) -> Owner:
    """Save a model of open_clip into `folder`; return what open_clip gives."""
    opened = family.save(folder)
    model, prepare, _ = opened
    pixels = torch.stack([prepare(image) for image in IMAGES])
    bias = None if model.logit_bias is None else float(model.logit_bias)
    return Owner(
        owners_images(opened, IMAGES), owners_texts(opened, SENTENCES), pixels, float(model.logit_scale.exp()), bias
    )


def of_dinotxt(name: str, folder: Path) -> Owner:
    """Write files of dino.txt into `folder`; return what Meta's code gave, which was run once."""
    write_files(name, folder)
    seen = expected(name)
    assert [str(text) for text in seen["texts"]] == SENTENCES
    pixels = torch.stack([prepare(name, image) for image in IMAGES])
    zimg, ztxt = torch.as_tensor(seen["zimg"]), torch.as_tensor(seen["ztxt"])
    return Owner(zimg, ztxt, pixels, float(seen["multiplier"]), None, resizes_tensors=name == "dinov3")


def measure_all() -> list[Row]:
    """Measure every family."""
    rows = []
    makers = [*((each, "hf", of_transformers) for each in families())]
    makers += [(each, "st", of_sentence_transformers) for each in families() if each.name == "CLIP"]
    makers += [*((each, "open_clip", of_open_clip) for each in open_clip_families())]
    makers += [*((name, "dinotxt", of_dinotxt) for name in NAMES)]
    for family, library, make in makers:
        title = DINOTXT_TITLES[family] if library == "dinotxt" else family.name
        with tempfile.TemporaryDirectory() as name:
            owner, saved = Path(name) / "owner", Path(name) / "saved"
            owner.mkdir()
            rows.append(measure(title, f"{library}:{owner}", make(family, owner), saved))
        print(f"{library}: {title}: {rows[-1].failures() or 'ok'}", flush=True)
    return rows


def render(seen: dict[str, Any]) -> str:
    """Write the page from what was seen."""
    rows = [Row(**values) for values in seen["rows"]]
    versions = ", ".join(f"{name} {number}" for name, number in seen["versions"].items())
    lines = [
        "# Models of other libraries that were checked",
        "",
        "`python docs/two_tower_models.py` wrote this page from what it measured; a test compares page and numbers.",
        f"It ran with {versions}. What these names are for is told in [published models](published.md).",
        "",
        "Each model is tiny and has random weights. Its own library built and saved it, and opened it to compare.",
        "Meta's code of dino.txt is no library: it was run once, on such weights, and its numbers are kept in",
        "`tests/fixtures/dinotxt`. What follows are the largest differences of any number of a unit vector (of a",
        f"pixel, of a scalar) between that library and lamplit; {ALLOWED:.0e} is allowed.",
        "",
        *(f"- **{name}**: {words}." for name, words in WORDS.items()),
        "",
        "| opened as | family | " + " | ".join(WORDS) + " |",
        "| --- | --- |" + " ---: |" * len(WORDS),
        *(line(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def line(row: Row) -> str:
    """Write one row of the table."""
    failed = row.failures()
    cells = ["" if value is None else f"{value:.1g}" for value in (row.differences[name] for name in WORDS)]
    shown = [f"FAILED ({cell})" if name in failed else cell for name, cell in zip(WORDS, cells, strict=True)]
    return f"| `{row.spec}:` | {row.family} | " + " | ".join(shown) + " |"


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the page alone")
    data, page = FOLDER / "two-tower-models.json", FOLDER / "two-tower-models.md"
    if not parser.parse_args().render:
        warnings.simplefilter("ignore")
        names = ("torch", "transformers", "open_clip_torch", "sentence-transformers", "timm")
        rows = [asdict(row) for row in measure_all()]
        versions = {name: metadata.version(name) for name in names}
        data.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    page.write_text(render(json.loads(data.read_text())))


if __name__ == "__main__":
    main()
