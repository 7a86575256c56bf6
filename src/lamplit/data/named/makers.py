"""Makers of the catalogue's data sets, each from its packages.

A maker downloads into `work`, and writes a file of pairs and the images that it names into `made`.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from lamplit.data.decoding.images import decode_image
from lamplit.data.named.packages import fetch_debian_package, fetch_npm_package
from lamplit.errors import ImageError, require

LONGEST_SIDE = 512  # pixels; towers read 224 to 384
MAX_USES = 10  # of a title; one that more images share names a collection ("gramastar"), not their content
EMOJI_PACKAGES = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def make_stamps(work: Path, made: Path) -> None:
    """Make pairs of Tux Paint's stamps: a caption in English first, then in up to 77 other languages."""
    root = fetch_debian_package("tuxpaint-stamps-default", work) / "usr/share/tuxpaint/stamps"
    rows = []
    for caption_file in sorted(root.rglob("*.txt")):
        place = caption_file.relative_to(root)
        captions = parse_stamp_captions(caption_file.read_text("utf-8", "replace"))
        # If there are both, they show the same; the PNG is cropped to the object and needs no renderer.
        sources = [caption_file.with_suffix(suffix) for suffix in (".png", ".svg")]
        source = next((path for path in sources if path.exists()), None)
        if source is None or "text" not in captions or place.parts[0] == "symbols":  # letters and digits
            continue
        target = Path("images") / place.with_suffix(".png")
        _write_stamp(source, made / target)
        rows.append({"image": target.as_posix(), "category": place.parts[0], **captions})
    _write_jsonl(made / "pairs.jsonl", rows)


def parse_stamp_captions(content: str) -> dict[str, str]:
    """Read a stamp's captions: `text` from the first line, `text_pt_BR` from `pt_BR.utf8=...`."""
    first, *others = content.strip().splitlines() or [""]
    captions = {"text": first.strip()}
    for line in others:
        language, _, caption = line.partition("=")
        captions["text_" + language.strip().removesuffix(".utf8").replace("@", "_")] = caption.strip()
    return {column: caption for column, caption in captions.items() if caption}


def make_openclipart(work: Path, made: Path) -> None:
    """Make pairs of Open Clip Art: images as PNG, titles and descriptions from the SVGs they were drawn from."""
    images = fetch_debian_package("openclipart-png", work) / "usr/share/openclipart/png"
    drawings = fetch_debian_package("openclipart-svg", work) / "usr/share/openclipart/svg"
    described = {}
    for drawing in sorted(drawings.rglob("*.svg")):
        place = drawing.relative_to(drawings).with_suffix(".png")
        # A link is the same image in another category.
        if not drawing.is_symlink() and (images / place).is_file():
            described[place] = parse_svg_description(drawing.read_bytes())
    num_uses = Counter(text for description in described.values() for text in description["text"])
    rows = []
    for place, description in described.items():
        texts = [text for text in description["text"] if num_uses[text] <= MAX_USES]
        if not texts:
            continue
        target = made / "images" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / place, target)
        image = f"images/{place.as_posix()}"
        rows.append({"image": image, "category": place.parts[0], **description, "text": texts})
    _write_jsonl(made / "pairs.jsonl", rows)


def make_emoji(work: Path, made: Path) -> None:
    """Make pairs of emoji as two vendors draw them, 64 pixels wide, with their Unicode names and short names."""
    rows = []
    for vendor, package in EMOJI_PACKAGES.items():
        root = fetch_npm_package(package, work)
        target = made / "images" / vendor
        target.mkdir(parents=True)
        for emoji in json.loads((root / "emoji.json").read_text("utf-8")):
            image = root / "img" / vendor / "64" / emoji["image"]
            if not image.is_file():
                continue
            shutil.copyfile(image, target / emoji["image"])
            names = [
                emoji["name"].lower(),
                *(name.replace("_", " ").replace("-", " ") for name in emoji["short_names"]),
            ]
            rows.append({
                "image": f"images/{vendor}/{emoji['image']}", "text": list(dict.fromkeys(names)),
                "vendor": vendor, "category": emoji["category"], "code": emoji["unified"],
            })  # fmt: skip
    _write_jsonl(made / "pairs.jsonl", rows)


def make_fashion_mnist(work: Path, made: Path) -> None:
    """Make a table of Fashion-MNIST: 70,000 grey images of 28 pixels, in 10 classes, without captions."""
    root = fetch_debian_package("dataset-fashion-mnist", work) / "usr/share/datasets/fashion-mnist"
    schema = pa.schema([(name, pa.string()) for name in ("text", "label", "split")]).insert(
        0, pa.field("image", pa.binary())
    )
    with parquet.ParquetWriter(made / "pairs.parquet", schema) as writer:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images = parse_idx(gzip.decompress((root / f"{prefix}-images-idx3-ubyte.gz").read_bytes()))
            labels = parse_idx(gzip.decompress((root / f"{prefix}-labels-idx1-ubyte.gz").read_bytes()))
            for start in range(0, len(images), 5000):
                rows = [
                    {"image": _png(image), "label": FASHION_CLASSES[label], "split": split}
                    for image, label in zip(images[start : start + 5000], labels[start : start + 5000], strict=True)
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))


def parse_svg_description(content: bytes) -> dict[str, list[str]]:
    """Read an SVG's Dublin Core metadata: `text` (title and description) and `keywords`.

    A file that declares entities gives no texts: entities can expand without end.
    """
    found: dict[str, list[str]] = {"title": [], "description": [], "li": []}
    path: list[str] = []
    words: list[str] = []

    def start(name: str, _attributes: Any) -> None:
        path.append(name.rpartition(":")[2])
        words.clear()

    def end(name: str) -> None:
        # Creators and publishers have titles too, deeper in the same element.
        owner = path[-4:-1] if path[-1] == "li" else path[-2:-1]
        if path[-1] in found and owner in (["Work"], ["Work", "subject", "Bag"]):
            found[path[-1]].append(" ".join("".join(words).split()))
        path.pop()

    def refuse(*_declaration: Any) -> None:
        raise ValueError("the file declares entities")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = words.append
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError):
        return {"text": [], "keywords": []}
    texts = [text for text in found["title"] + found["description"] if text]
    return {"text": list(dict.fromkeys(texts)), "keywords": [word for word in found["li"] if word]}


def parse_idx(content: bytes) -> NDArray[np.uint8]:
    """Read an array of bytes in the MNIST format: two zeros, type 8, the number of dimensions, the dimensions."""
    zeros, kind, num_dims = int.from_bytes(content[:2], "big"), content[2], content[3]
    if zeros or kind != 8:
        raise ValueError("not an IDX file of bytes")
    dims = np.frombuffer(content, ">u4", num_dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(dims)


def _write_stamp(source: Path, target: Path) -> None:
    """Write an object in the middle of a white square, with a margin, so that a centre crop of 7/8 keeps all of it."""
    data = render_svg(source) if source.suffix == ".svg" else source.read_bytes()
    image = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    image.thumbnail((LONGEST_SIDE * 7 // 8,) * 2)
    side = -(-max(image.size) * 8 // 7)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    target.parent.mkdir(parents=True, exist_ok=True)
    square.save(target)


def render_svg(path: Path) -> bytes:
    """Render an SVG to PNG with a transparent background.

    Raises:
        MissingExtraError: the renderer is not installed.
        ImageError: the SVG cannot be rendered.
    """
    resvg_py = require("resvg_py", "demo")
    try:
        # Widths in points need a resolution.
        data = resvg_py.svg_to_bytes(svg_path=str(path), width=LONGEST_SIDE, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise ImageError(f"{path.name} cannot be rendered ({error})") from error
    return bytes(data)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write every column in every row, null if it has no value, so that all rows have one schema."""
    rows = list(rows)
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({column: row.get(column) for column in columns}, ensure_ascii=False) + "\n")
