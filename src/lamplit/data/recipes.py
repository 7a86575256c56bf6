"""How each data set of the catalogue is made from its package.

A recipe fetches into `work`, and leaves a pairs file and the pictures it names in `made`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lamplit.data.images import decode_image
from lamplit.data.packages import fetch_debian_package
from lamplit.errors import MissingExtraError

LONGEST_SIDE = 512  # pixels; towers look at 224 to 384


def make_stamps(work: Path, made: Path) -> None:
    """Tux Paint's stamps: a caption in English first, then in up to 77 other languages."""
    root = fetch_debian_package("tuxpaint-stamps-default", work) / "usr/share/tuxpaint/stamps"
    rows = []
    for caption_file in sorted(root.rglob("*.txt")):
        place = caption_file.relative_to(root)
        captions = parse_stamp_captions(caption_file.read_text("utf-8", "replace"))
        # Where there are both, they show the same, and the PNG is cut to the thing and needs no renderer.
        sources = [caption_file.with_suffix(suffix) for suffix in (".png", ".svg")]
        source = next((path for path in sources if path.exists()), None)
        if source is None or "text" not in captions or place.parts[0] == "symbols":  # letters and digits
            continue
        target = Path("pictures") / place.with_suffix(".png")
        _write_png(source, made / target)
        rows.append({"image": target.as_posix(), **captions, "category": place.parts[0]})
    _write_jsonl(made / "pairs.jsonl", rows)


def parse_stamp_captions(content: str) -> dict[str, str]:
    """Read a stamp's captions: `text` from the first line, `text_pt_BR` from `pt_BR.utf8=...`."""
    first, *others = content.strip().splitlines() or [""]
    captions = {"text": first.strip()}
    for line in others:
        language, _, caption = line.partition("=")
        captions["text_" + language.strip().removesuffix(".utf8").replace("@", "_")] = caption.strip()
    return {column: caption for column, caption in captions.items() if caption}


def _write_png(source: Path, target: Path) -> None:
    data = render_svg(source) if source.suffix == ".svg" else source.read_bytes()
    image = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, optimize=True)


def render_svg(path: Path) -> bytes:
    """Render an SVG to PNG, transparent where it draws nothing.

    Raises:
        MissingExtraError: the renderer is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("resvg-py", "demo") from error
    # Widths in points are nothing without a resolution.
    return bytes(
        resvg_py.svg_to_bytes(svg_path=str(path), width=LONGEST_SIDE, dpi=96, skip_system_fonts=True)
    )


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write every column in every row, null where it has no value, so that all rows have one schema."""
    rows = list(rows)
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({column: row.get(column) for column in columns}, ensure_ascii=False) + "\n")
