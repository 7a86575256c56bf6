"""Thumbnails in terminals: a process on a real pseudo-terminal, whose other end answers as one terminal or another."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from packed_images import drawings, pack
from PIL import Image, ImageDraw

import lamplit
from lamplit.data.decoding.images import decode_image
from lamplit.data.places.image_files import read_image
from lamplit.exports.text_graph import write_words
from lamplit.towers.images.image_tower import ImageTower

QUESTION = re.compile(rb"\x1b_G([^;\x1b]*a=q[^;]*);[^\x1b]*\x1b\\|\x1b\[c|\x1b\[16t")
ATTRIBUTES = {"kitty": b"\x1b[?62;52;c", "sixel": b"\x1b[?62;4;22c", "plain": b"\x1b[?6c"}  # a silent one has none
TRIES = 3  # on a machine that has much to do this end may answer later than a terminal would
CLI = "from lamplit.cli.main import main; main()"


class Shown(NamedTuple):
    code: int
    text: str
    err: str
    questions: int


def answer(question: re.Match[bytes], terminal: str) -> bytes:
    if question[0] == b"\x1b[c":
        return ATTRIBUTES.get(terminal, b"")
    if question[0] == b"\x1b[16t":
        return b"\x1b[6;20;10t" if terminal in ("kitty", "sixel") else b""
    name = re.search(rb"i=(\d+)", question[1])
    assert name
    return b"\x1b_Gi=" + name[1] + b";OK\x1b\\" if terminal == "kitty" else b""


def run(code: str, *arguments: object, terminal: str, late: float = 0.0, rows: int = 50, **environment: str) -> Shown:
    """Run Python on a terminal of 120 columns that is a kitty, knows Sixel, is a plain one or answers nothing."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (rows, 120))
    given = {"TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    said, done = b"", 0
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=kept | given) as process:
        os.close(theirs)
        while select.select([ours], [], [], 120)[0]:
            try:
                said += os.read(ours, 1 << 16)
            except OSError:  # the process has ended
                break
            for question in QUESTION.finditer(said, done):
                done = question.end()
                time.sleep(late)
                os.write(ours, answer(question, terminal))
        _, err = process.communicate()
    os.close(ours)
    return Shown(process.returncode, said.decode().replace("\r\n", "\n"), err.decode(), len(QUESTION.findall(said)))


DRAWS = """
import sys
from lamplit.cli.terminal import draws_thumbnails
drawn = draws_thumbnails({"yes": True, "no": False, "": None}[sys.argv[1]])
print(drawn, *({"torch", "numpy", "PIL", "textual_image"} & {name for name, module in sys.modules.items() if module}))
"""


@pytest.mark.parametrize(
    ("terminal", "asked", "expected", "questions"),
    [
        ("kitty", "", "True", 2),
        ("sixel", "", "True", 2),
        ("plain", "", "False", 2),
        ("silent", "", "False", 2),
        ("plain", "yes", "True", 0),
        ("kitty", "no", "False", 0),
    ],
)
def test_terminal_is_asked_and_nothing_heavy_is_imported(
    terminal: str, asked: str, expected: str, questions: int
) -> None:
    for _ in range(TRIES):
        shown = run(DRAWS, asked, terminal=terminal)
        if shown.text.split("\x1b[K")[-1].strip() == expected:
            break
    assert shown.code == 0, shown.err
    assert shown.text.split("\x1b[K")[-1].strip() == expected
    assert shown.questions == questions
    assert "52;c" not in shown.text  # no answer is left over for the shell


def test_terminal_that_answers_late_shows_none_by_itself() -> None:
    shown = run(DRAWS, "", terminal="kitty", late=0.1)
    assert shown.text.split("\x1b[K")[-1].strip() == "False"


@pytest.mark.parametrize("asked", ["", "yes"])
def test_terminal_without_colours_shows_none(asked: str) -> None:
    assert run(DRAWS, asked, terminal="plain", TERM="dumb").text == "False\n"


@pytest.mark.parametrize("asked", ["", "yes"])
def test_terminal_without_rows_shows_none(asked: str) -> None:
    shown = run(DRAWS, asked, terminal="kitty", rows=0)
    assert (shown.text, shown.err) == ("False\n", "")


def test_extra_that_is_missing() -> None:
    without = "import sys; sys.modules['textual_image'] = None\n"
    assert run(without + DRAWS, "", terminal="kitty").text == "False\n"
    assert "pip install 'lamplit[thumbnails]'" in run(without + DRAWS, "yes", terminal="kitty").err


def images_in_kitty(text: str) -> list[Image.Image]:
    """The images that were sent, in the order in which they are shown."""
    sent: dict[str, str] = {}
    for name, chunk in re.findall(r"\x1b_Gi=(\d+),m=[01],f=100,q=2;([^\x1b]*)\x1b\\", text):
        sent[name] = sent.get(name, "") + chunk
    for name in sent:  # and are in cells whose colour and third sign are their number
        number = int(name)
        assert f"\x1b[38;2;{number >> 16 & 255};{number >> 8 & 255};{number & 255}m\U0010eeee" in text
        assert re.search(rf"\x1b_Ga=p,i={name},c=\d+,r=\d+,U=1,q=2\x1b", text)
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in sent.values()]


def images_in_sixels(text: str) -> list[Image.Image]:
    """What a terminal would draw: colours by number, six rows at a time, `$` back to the left, `-` to the next rows."""
    drawn = []
    for width, height, data in re.findall(r'\x1bP0;0;0q"1;1;(\d+);(\d+)([^\x1b]*)\x1b\\', text):
        pixels = np.zeros((int(height) + 6, int(width), 3), np.uint8)
        colors, color, x, y = {}, 0, 0, 0
        for number, percents, times, sign, move in re.findall(
            r"#(\d+)(?:;2;(\d+;\d+;\d+))?|(?:!(\d+))?([?-~])|([$-])", data
        ):
            if number:
                color = int(number)
                if percents:
                    colors[color] = [round(int(part) * 2.55) for part in percents.split(";")]
            elif sign:
                for row in range(6):
                    if (ord(sign) - 63) >> row & 1:
                        pixels[y + row, x : x + int(times or 1)] = colors[color]
                x += int(times or 1)
            else:
                x, y = 0, y + 6 * (move == "-")
        drawn.append(Image.fromarray(pixels[: int(height)]))
    return drawn


def images_in_blocks(text: str) -> list[Image.Image]:
    """Two pixels a cell: the colour of the sign and that behind it."""
    drawn, rows = [], []
    for line in text.split("\n"):
        cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", line)
        if cells:
            colors = np.array(cells, dtype=np.uint8).reshape(-1, 2, 3)
            rows += [colors[:, 0], colors[:, 1]]
        elif rows:
            drawn.append(Image.fromarray(np.stack(rows)))
            rows = []
    return drawn


def assert_alike(image_file: Image.Image, path: Path | str) -> None:
    original = decode_image(Path(path).read_bytes()).permute(1, 2, 0).numpy()
    expected = Image.fromarray(original).resize(image_file.size)
    assert np.abs(np.asarray(expected, float) - np.asarray(image_file, float)).mean() < 4  # Sixel has 256 colours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terminal", "asked", "read"),
    [
        ("kitty", [], images_in_kitty),
        ("sixel", [], images_in_sixels),
        ("plain", ["--thumbnails"], images_in_blocks),
    ],
)
def test_search_shows_the_images_of_its_hits(terminal, asked, read, model_path: Path, store_path: Path) -> None:
    write_words(model_path)  # the first search says that it does so
    hits = lamplit.search(lamplit.load(model_path), lamplit.Store(store_path), "a red ring", k=3)
    for _ in range(TRIES):
        shown = run(CLI, "search", model_path, store_path, "a red ring", "-k", 3, *asked, terminal=terminal)
        image_folder = read(shown.text)
        if image_folder:
            break
    assert (shown.code, shown.err) == (0, "")
    assert len(image_folder) == 3
    for hit, image_file in zip(hits, image_folder, strict=True):
        assert_alike(image_file, hit.path)
        assert f"{hit.score:.3f}" in shown.text
        assert hit.texts[0] in shown.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shard.tar", "cells.parquet"])
def test_images_inside_a_file_are_shown_too(
    model_path: Path, image_tower: ImageTower, image_folder: Path, tmp_path: Path, name: str
) -> None:
    write_words(model_path)
    pack(tmp_path, drawings(image_folder, 4))
    lamplit.embed(tmp_path / name, tmp_path / "a.lance", image_tower=image_tower, backend="torch")
    hits = lamplit.search(lamplit.load(model_path), lamplit.Store(tmp_path / "a.lance"), "a red ring", k=3)
    for _ in range(TRIES):
        shown = run(CLI, "search", model_path, tmp_path / "a.lance", "a red ring", "-k", 3, terminal="kitty")
        if found := images_in_kitty(shown.text):
            break
    assert (shown.code, shown.err) == (0, "")
    assert len(found) == 3
    for hit, image_file in zip(hits, found, strict=True):
        (tmp_path / "alone").write_bytes(read_image(hit.path))
        assert_alike(image_file, tmp_path / "alone")


MANY = """
import sys
from lamplit.cli.main import main
*search, ways = sys.argv[1:]
for way in ways.split(";"):
    sys.argv = ["lamplit", *search, *way.split()]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0
"""


@pytest.mark.slow
def test_search_that_shows_no_images_asks_nothing(model_path: Path, store_path: Path) -> None:
    write_words(model_path)
    ways = "--json --thumbnails;--paths --thumbnails;-0 --thumbnails;--no-thumbnails"
    shown = run(MANY, "search", model_path, store_path, "ring", "-k", 2, ways, terminal="kitty")
    assert (shown.code, shown.err) == (0, "")
    assert shown.questions == 0
    assert "\x1b_G" not in shown.text
    assert "▀" not in shown.text
    assert shown.text.count(".png") + shown.text.count(".jpg") >= 8


PRINT = """
import sys
from lamplit.retrieval.searcher import Hit
from lamplit.cli.thumbnails import print_hits
print_hits([Hit(0.5, path, path, [f"text {n}"], {}) for n, path in enumerate(sys.argv[1:])])
"""


@pytest.mark.slow
def test_images_of_every_shape_and_none(tmp_path: Path) -> None:
    """A panorama and a tower keep their middles, a file that is gone its line; text may have no colours."""
    sizes = {"wide.png": (1200, 20), "high.png": (7, 900), "big.png": (2000, 1500), "one.png": (1, 1)}
    for name, size in sizes.items():
        image_file = Image.new("RGB", size, "green")
        ImageDraw.Draw(image_file).rectangle((0, 0, size[0] // 4, size[1] // 4), fill="red")
        image_file.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in (*sizes, "broken.png", "gone.png")]
    shown = run(PRINT, *paths, terminal="kitty", COLORTERM="", TERM="xterm-kitty", NO_COLOR="1")
    assert (shown.code, shown.err) == (0, "")
    assert all(f"text {number}" in shown.text for number in range(6))
    wide, high, big, one = images_in_kitty(shown.text)  # cells are 10 x 20
    assert [image_file.size for image_file in (wide, high, big, one)] == [(120, 40), (40, 120), (120, 80), (120, 120)]
    assert wide.getpixel((1, 1)) == (0, 128, 0)
    assert big.getpixel((1, 1)) == (255, 0, 0)
    blocks = run(PRINT, *paths[2:], terminal="silent")
    assert (blocks.code, blocks.err) == (0, "")
    assert [image_file.size for image_file in images_in_blocks(blocks.text)] == [(20, 16), (20, 20)]
    assert "Traceback" not in blocks.text
