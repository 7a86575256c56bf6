"""`lamplit locate` as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import lamplit
from lamplit.cli import main as cli
from lamplit.errors import ImageError, TowerError, UsageError


@pytest.fixture
def image(image_folder: Path) -> Path:
    return next(image_folder.glob("large_blue_triangle.*"))


def locate(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, ["locate", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_line_and_picture(places_path: Path, image: Path, tmp_path: Path) -> None:
    printed = locate(places_path / "model", image, "A large blue triangle.", "--out", tmp_path / "where.png")
    found = lamplit.locate(places_path / "model", image, "A large blue triangle.")
    x, y = found.peak
    assert printed == (
        f"most at x {x:.0f}, y {y:.0f} of 64 x 64 pixels ({x / 64:.0%} from the left, {y / 64:.0%} from the top): "
        f"{found.values.max():.3f} there, {found.score:.3f} the whole image\n"
    )
    with Image.open(tmp_path / "where.png") as drawn:
        assert drawn.format == "PNG"
        assert drawn.size == (64, 64)


def test_json(places_path: Path, image: Path) -> None:
    found = json.loads(locate(places_path / "model", image, "ring", "--json", "--device", "cpu"))
    expected = lamplit.locate(places_path / "model", image, "ring", device="cpu")
    assert found["values"] == [[pytest.approx(value, abs=1e-6) for value in row] for row in expected.values.tolist()]
    assert (found["x"], found["y"]) == expected.peak
    assert found["score"] == pytest.approx(expected.score)
    assert found["value"] == pytest.approx(float(expected.values.max()))
    assert (tuple(found["size"]), tuple(found["window"])) == (expected.size, expected.window)


def test_errors(places_path: Path, model_path: Path, image: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='put the words in quotes: lamplit locate MODEL IMAGE "a blue triangle"'):
        locate(places_path / "model", image, "a", "blue", "triangle")
    with pytest.raises(UsageError, match=r"ends in \.png"):
        locate("no/model", image, "ring", "--out", tmp_path / "where.txt")  # before anything is opened
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match="empty file"):
        locate(places_path / "model", tmp_path / "a.png", "ring", "--out", tmp_path / "where.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(TowerError, match="embed with --pool mean"):
        locate(model_path, image, "ring")


def test_one_line_in_a_process(model_path: Path, image: Path) -> None:
    command = [sys.executable, "-m", "lamplit", "locate", str(model_path), str(image), "ring"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: timm:test_vit cannot show where .*\n", done.stderr)
