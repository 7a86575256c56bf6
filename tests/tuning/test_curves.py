from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lamplit.tuning.curves import draw_curves

RECALLS = {f"{way}/recall@{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


def write(folder: Path, held_out: dict[str, float], steps: int = 20) -> Path:
    lines: list[dict[str, Any]] = [{"step": 0, "held_out": held_out}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 5 / step, "lr": 1e-3 / step, "logit_scale": 10 + step})
        lines.append({"step": step, "held_out": held_out})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "log.jsonl"


@pytest.mark.parametrize("held_out", [RECALLS, {}])
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_image_opens_and_shows_something(tmp_path: Path, held_out: dict[str, float], steps: int) -> None:
    draw_curves(write(tmp_path, held_out, steps), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image_file:
        assert image_file.format == "PNG"
        assert image_file.width >= 800
        assert image_file.height >= 500
        pixels = np.asarray(image_file.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 20


def test_other_curves_are_another_image(tmp_path: Path) -> None:
    draw_curves(write(tmp_path, RECALLS), tmp_path / "a.png")
    draw_curves(write(tmp_path, {name: 0.9 for name in RECALLS}), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_pyplot_is_not_imported() -> None:
    source = Path(draw_curves.__code__.co_filename).read_text()
    assert "pyplot" not in source, "pyplot keeps figures and picks a window system"
