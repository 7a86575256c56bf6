"""How often `lamplit locate` points at the right one of two stamps in one picture.

    python benchmarks/locate.py [--folder runs/locate] [--sheet docs/locate.png] [--quick]

On the stamps, with the demo towers tuned at the defaults. Two stamps are pasted side by side or above each other, so
that the tower sees both whole; the words are the caption of one of them. The map is right by its mean if that is higher
over the half of that stamp, and by its peak if its highest place is there (a place in the middle column or row counts
as half); its colour is the part of what is drawn that lies over that half. Chance is 0.5. All captions were held out
from tuning. On half of them the two ways to make a map were compared: the cosine of each place alone, which is what
lamplit shows, and what each place adds to the cosine of the whole. The other half is the result. Each of its captions
is asked for as often; intervals are those of drawing captions again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from timing import console, filled, finish, parser
from torch.nn import functional as F

import lamplit
from lamplit.data.caption_hash import hash_captions
from lamplit.data.split_record import is_in
from lamplit.metrics.bootstrap import measure
from lamplit.retrieval.heat_picture import PALE

SIDE = 256  # of a picture; the demo tower sees the middle 224 of it
SEEN = 224
WAYS = ("cosine of the place", "share of the cosine")
SHOWN = 8  # pictures on the sheet: evenly spaced ones of the result, right or wrong


class Picture(NamedTuple):
    """Two stamps in one picture, and what is asked for."""

    image: Image.Image
    words: str
    place: int  # of the stamp that is asked for: 0 left or above, 1 right or below
    is_stacked: bool


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, default=Path("runs/locate"), help="the store and the model")
    options.add_argument("--sheet", type=Path, help="draw some pictures of the result, with their maps, here")
    options = filled(options.parse_args())
    store, folder = options.folder / "stamps.lance", options.folder / "model"
    lamplit.embed(lamplit.fetch("stamps"), store, image_tower="demo:efficientnet-lite0", progress=True)
    lamplit.tune(store, folder, lamplit.TuneSettings("demo:minilm"), progress=True)
    model = lamplit.load(folder, device="cpu")
    chosen, reported = held_out_halves(model, lamplit.Store(store))
    figures = []
    for title, stamps in (("to choose by", chosen), ("the result", reported)):
        pictures = make_pictures(stamps, partners=2 if options.quick else 8)
        figures.append({"title": title, "captions": len(stamps), "pictures": len(pictures)} | score(model, pictures))
        show(figures[-1])
    if options.sheet:
        draw_sheet(model, pictures[:: len(pictures) // SHOWN + 1], options.sheet)
    finish(options, figures)


def held_out_halves(model: lamplit.LiT, store: lamplit.Store) -> list[dict[str, str]]:
    """Return one image file for each caption that was held out from tuning, in two halves drawn at random."""
    assert model.tuned_on is not None
    captions = [texts[0] for texts in store.texts()]
    is_held_out = is_in(hash_captions(captions), model.tuned_on.captions("held_out"))
    files = {
        caption: file for caption, file, held in zip(captions, store.column("path"), is_held_out, strict=True) if held
    }
    order = np.random.default_rng(0).permutation(sorted(files)).tolist()
    return [{caption: files[caption] for caption in half} for half in (order[::2], order[1::2])]


def make_pictures(stamps: dict[str, str], partners: int) -> list[Picture]:
    """Put each stamp beside others, drawn at random, in all four places in turn."""
    captions, generator = list(stamps), np.random.default_rng(1)
    pictures = []
    for turn in range(partners):
        for words in captions:
            other = str(generator.choice([caption for caption in captions if caption != words]))
            place, is_stacked = turn % 2, turn // 2 % 2 == 1
            files = [stamps[words], stamps[other]]
            pictures.append(Picture(paste(files[::-1] if place else files, is_stacked), words, place, is_stacked))
    return pictures


def paste(files: list[str], is_stacked: bool) -> Image.Image:
    """Paste two images on white, each as large as fits into its half of what the tower sees."""
    picture, margin = Image.new("RGB", (SIDE, SIDE), "white"), (SIDE - SEEN) // 2
    box = (SEEN, SEEN // 2) if is_stacked else (SEEN // 2, SEEN)
    for number, file in enumerate(files):
        with Image.open(file) as opened:
            stamp = opened.convert("RGBA")
        scale = min(box[0] / stamp.width, box[1] / stamp.height)
        stamp = stamp.resize((max(1, int(stamp.width * scale)), max(1, int(stamp.height * scale))))
        left = margin + (0 if is_stacked else number * box[0]) + (box[0] - stamp.width) // 2
        top = margin + (number * box[1] if is_stacked else 0) + (box[1] - stamp.height) // 2
        picture.paste(stamp, (left, top), stamp)
    return picture


@torch.no_grad()
def score(model: lamplit.LiT, pictures: list[Picture]) -> dict[str, Any]:
    """Return how often each kind of map is right, by its mean and by its peak."""
    right: dict[str, dict[str, list[tuple[str, float]]]] = {}
    captions = list(dict.fromkeys(picture.words for picture in pictures))
    texts = dict(zip(captions, model.encode_texts(captions), strict=True))
    for picture in pictures:
        for way, values in maps_of(model, picture.image, texts[picture.words]).items():
            for name, value in points(values.T if picture.is_stacked else values, picture.place).items():
                right.setdefault(way, {}).setdefault(name, []).append((picture.words, value))
    first = maps_of(model, pictures[0].image, texts[pictures[0].words])[WAYS[0]]
    assert np.allclose(lamplit.locate(model, pictures[0].image, pictures[0].words).values, first, atol=1e-4)
    return {"sides": {way: {name: by_caption(of) for name, of in found.items()} for way, found in right.items()}}


def maps_of(model: lamplit.LiT, image: Image.Image, ztxt: torch.Tensor) -> dict[str, Any]:
    """Return both maps of a picture, (h, w), from one pass of the tower."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    places, whole = model.unlocked_image_tower.find_places(model.image_preprocessing().resize(pixels)[None])
    cosines = model.project(F.normalize(places[0], dim=-1)) @ ztxt
    shares = places[0] @ ztxt / whole[0].norm()  # of this tower, with no centre and no head: their mean is the cosine
    return dict(zip(WAYS, (cosines.numpy(), shares.numpy()), strict=True))


def points(values: Any, place: int) -> dict[str, float]:
    """Tell how far a map, (h, w), points to the left half (0) or the right half (1): from 0 to 1 in three ways."""
    width = values.shape[1]
    first, last = values[:, : width // 2].mean(), values[:, -(width // 2) :].mean()
    column = float(np.unravel_index(values.argmax(), values.shape)[1]) + 0.5
    peak = 0.5 if column == width / 2 else float((column > width / 2) == (place == 1))
    color = (values / values.max() - PALE).clip(0) if values.max() > 0 else np.ones_like(values)
    sides = color[:, : width // 2].sum(), color[:, -(width // 2) :].sum()
    part = (sides[place] + (color.sum() - sum(sides)) / 2) / color.sum()
    return {"mean": float((last > first) == (place == 1)), "peak": peak, "colour": float(part)}


def by_caption(right: list[tuple[str, float]]) -> dict[str, float]:
    """Return the mean with its interval; the pictures of one caption are drawn together."""
    captions: dict[str, list[float]] = {}
    for caption, value in right:
        captions.setdefault(caption, []).append(value)
    found = measure([float(np.mean(values)) for values in captions.values()])
    return {"value": found.value, "low": found.low, "high": found.high}


def show(figures: dict[str, Any]) -> None:
    title = f"{figures['title']}: {figures['pictures']} pictures, {figures['captions']} captions"
    table = Table("on the right half", *figures["sides"], "chance", title=title)
    for name in ("mean", "peak", "colour"):
        found = [side[name] for side in figures["sides"].values()]
        table.add_row(name, *(f"{f['value']:.3f} ({f['low']:.3f} to {f['high']:.3f})" for f in found), "0.5")
    console.print(table)


def draw_sheet(model: lamplit.LiT, pictures: list[Picture], file: Path) -> None:
    """Draw pictures with their maps in rows of four, the words above each."""
    cell, title, font = SIDE + 8, 24, ImageFont.load_default(15)
    sheet = Image.new("RGB", (4 * cell, -(-len(pictures) // 4) * (cell + title)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        left, top = number % 4 * cell, number // 4 * (cell + title)
        draw.text((left + 4, top + 4), picture.words.replace("\u2014", " - "), fill="black", font=font)
        sheet.paste(lamplit.locate(model, picture.image, picture.words).draw(), (left + 4, top + title))
    sheet.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main()
