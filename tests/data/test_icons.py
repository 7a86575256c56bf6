"""Icons: sets in Iconify's format to pictures and captions, and the package that they come in."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pyarrow import parquet

from lamplit.data.decoding.images import decode_image
from lamplit.data.decoding.svg import draw_svg
from lamplit.data.named import icons
from lamplit.data.named.catalog import fetch
from lamplit.data.named.icons import choose_icons, read_icons, svg_of, words
from lamplit.data.sources import read_pairs
from lamplit.errors import PairsError, UsageError

pytest.importorskip("resvg_py")

LEFT = '<path d="M0 0h8v16H0z" {}/>'  # the left half of 16 x 16
RED, BLACK = LEFT.format('fill="red"'), LEFT.format('fill="currentColor"')


def about(name: str, *, palette: bool, spdx: str = "MIT", **more: object) -> dict[str, object]:
    licence = {"title": spdx, "spdx": spdx, "url": f"https://example.org/{spdx}"}
    return {"name": name.title(), "total": 2, "author": {"name": "Ada"}, "license": licence, "palette": palette} | more


COLOUR = {
    "prefix": "colour",
    "icons": {
        "heart-outline": {"body": RED},
        "heart": {"body": RED},
        "keycap-3": {"body": RED},
        "old": {"body": RED, "hidden": True},
        "white": {"body": LEFT.format('fill="#fff"')},
        "damaged": {"body": "<g>"},
    },
    "aliases": {
        "love": {"parent": "heart"},
        "affection": {"parent": "love"},
        "gone": {"parent": "heart", "hidden": True},
        "older": {"parent": "old"},
        "lost": {"parent": "nothing"},
        "lost-and-turned": {"parent": "nothing", "rotate": 1},
        "traeh": {"parent": "heart", "hFlip": True},
        "mirrored_heart": {"parent": "traeh"},
    },
    "suffixes": {"": "Solid", "outline": "Outline"},
    "categories": {"FeelingsEmotions": ["heart"]},
}
BLACK_SET = {"prefix": "black", "icons": {"bar": {"body": BLACK}}, "width": 16}
SETS = {"colour": COLOUR, "black": BLACK_SET, "brand": COLOUR, "flag": COLOUR, "closed": COLOUR}
ABOUT = {
    "colour": about("colour", palette=True),
    "black": about("black", palette=False),
    "brand": about("brand", palette=True, category="Logos"),
    "flag": about("flag", palette=True),
    "closed": about("closed", palette=True, spdx="CC-BY-NC-4.0"),
}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry without npm, which serves a small package of the same form; its requests are listed."""
    package, archive = tmp_path / "package", tmp_path / "registry/@iconify/json/-/json-2.2.535.tgz"
    (package / "json").mkdir(parents=True)
    archive.parent.mkdir(parents=True)
    (package / "collections.json").write_text(json.dumps(ABOUT))
    for name, data in SETS.items():
        (package / "json" / f"{name}.json").write_text(json.dumps(data))
    with tarfile.open(archive, "w:gz") as out:
        out.add(package, "package")
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_message):
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "registry")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("PATH", str(tmp_path))
        digest = hashlib.sha512(archive.read_bytes()).digest()
        monkeypatch.setattr(icons, "INTEGRITY", f"sha512-{base64.b64encode(digest).decode()}")
        yield requests
        server.shutdown()


def table(path):
    return {row["id"]: row for row in parquet.read_table(path).to_pylist()}


def test_fetch_icons(tmp_path, registry) -> None:
    path = fetch("icons", tmp_path / "cache")
    assert path == tmp_path / "cache/icons/pairs.parquet"
    rows = table(path)
    assert list(rows) == ["colour/heart-outline", "colour/heart", "colour/keycap-3", "colour/traeh"]
    heart = rows["colour/heart"]
    expected = {
        "text": ["heart", "love", "affection"], "set": "colour", "style": "Solid", "category": "Feelings Emotions",
        "licence": "MIT", "author": "Ada",
    }  # fmt: skip
    assert {key: heart[key] for key in expected} == expected
    assert (rows["colour/heart-outline"]["text"], rows["colour/heart-outline"]["style"]) == (["heart"], "Outline")
    assert rows["colour/keycap-3"]["text"] == ["keycap 3"]
    assert rows["colour/traeh"]["text"] == ["traeh", "mirrored heart"]
    assert rows["colour/traeh"]["category"] == "Feelings Emotions"
    image, mirrored = decode_image(heart["image"]), decode_image(rows["colour/traeh"]["image"])
    assert image.shape == (3, 224, 224)
    assert image[:, 112, 20].tolist() == [255, 0, 0]
    assert image[:, 112, 5].tolist() == image[:, 112, 200].tolist() == [255, 255, 255]
    assert mirrored[:, 112, 200].tolist() == [255, 0, 0]
    pairs = list(read_pairs(path))
    assert pairs[1].texts == ("heart", "love", "affection")
    assert pairs[1].metadata["set"] == "colour"
    with path.with_name("sets.csv").open(newline="") as file:
        sets = {row["set"]: row for row in csv.DictReader(file)}
    assert {name: row["left_out"] for name, row in sets.items()} == {
        "colour": "", "brand": "logos", "flag": "flags",
        "closed": "its licence (CC-BY-NC-4.0) does not allow every use",
    }  # fmt: skip
    assert (sets["colour"]["pictures"], sets["colour"]["blank"], sets["colour"]["licence"]) == ("4", "2", "MIT")
    fetch("icons", tmp_path / "cache")
    assert len(registry) == 1, "fetched again"


def test_choices_have_their_own_folders(tmp_path, registry) -> None:
    black = fetch("icons", tmp_path, colour=False)
    assert black.parent.name == "icons-no-colour"
    assert list(table(black)) == ["black/bar"]
    assert decode_image(table(black)["black/bar"]["image"])[:, 112, 20].tolist() == [0, 0, 0]
    two = fetch("icons", tmp_path, sets="flag, black")
    assert two.parent.name == "icons-black+flag"
    assert {row["set"] for row in table(two).values()} == {"black", "flag"}
    assert fetch("icons", tmp_path, sets=["flag", "black"]) == two
    assert len(choose_icons([f"set-{number}" for number in range(50)], None).folder) < 30


@pytest.mark.slow
def test_processes_draw_the_same(tmp_path, registry) -> None:
    one, two = (table(fetch("icons", tmp_path / str(workers), workers=workers)) for workers in (0, 2))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sets": "colour,blck"}, "there is no set of icons 'blck'; type one of black, "),
        ({"sets": "closed"}, r"'closed' is left out: its licence \(CC-BY-NC-4.0\) does not allow every use; choose an"),
        ({"sets": "../x"}, r"'../x' cannot be a set of icons; expected names such as noto"),
        ({"sets": []}, "no set of icons is named"),
        ({"sets": "colour", "colour": True}, "by their names or by colour, not by both; leave one out"),
    ],
)
def test_sets_that_cannot_be_had(tmp_path, registry, arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        fetch("icons", tmp_path / "cache", **arguments)
    assert not list(tmp_path.glob("cache/*"))
    with pytest.raises(UsageError, match="emoji has no sets to choose from; leave out"):
        fetch("emoji", tmp_path / "cache", colour=True)


def test_package_that_cannot_be_had(tmp_path, registry, monkeypatch) -> None:
    monkeypatch.setattr(icons, "INTEGRITY", "sha512-other")
    with pytest.raises(
        PairsError, match=r"@iconify/json@2.2.535 is not what it should be: sha512-.*, expected sha512-o"
    ):
        fetch("icons", tmp_path / "cache")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", os.environ["NPM_CONFIG_REGISTRY"] + "nothing")
    with pytest.raises(PairsError, match=r"cannot be fetched from http.*nothing \(HTTP Error 404: .*; connect to the"):
        fetch("icons", tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_words() -> None:
    assert words("arrow-left_1") == "arrow left 1"
    assert words("ice-cream-3", numbers=True) == "ice cream"
    assert words("2", numbers=True) == "2"
    assert words("-") == "-"


def test_numbers_of_drawings_are_taken_off() -> None:
    drawings = {"prefix": "streamline-color", "icons": {"add-1": {"body": RED}, "add-1-flat": {"body": RED}}}
    found = list(read_icons(drawings | {"suffixes": {"": "Duo", "flat": "Flat"}}))
    assert [(icon.texts, icon.style) for icon in found] == [(["add"], "Duo"), (["add"], "Flat")]
    found = list(read_icons(drawings | {"prefix": "other", "prefixes": {"add": "Add"}}))
    assert [(icon.texts, icon.style) for icon in found] == [(["1"], "Add"), (["1 flat"], "Add")]


@pytest.mark.parametrize(
    ("turned", "corner"),
    [
        ({}, (0, 0)),
        ({"hFlip": True}, (0, 1)),
        ({"vFlip": True}, (1, 0)),
        ({"rotate": 1}, (0, 1)),
        ({"rotate": 2}, (1, 1)),
        ({"rotate": 3}, (1, 0)),
        ({"hFlip": True, "rotate": 1}, (1, 1)),  # mirrored first
    ],
)
def test_turned_and_mirrored(turned, corner) -> None:
    """A corner of 4 x 4 in a square that begins at (10, 20)."""
    icon = {"body": '<path d="M10 20h4v4h-4z"/>', "left": 10, "top": 20, "width": 8, "height": 8} | turned
    image = decode_image(draw_svg(svg_of(icon)))
    dark = [(row, column) for row in (0, 1) for column in (0, 1) if image[0, 62 + 100 * row, 62 + 100 * column] == 0]
    assert dark == [corner]


def test_alias_of_a_turned_alias_turns_further() -> None:
    aliases = {"b": {"parent": "a", "rotate": 1, "hFlip": True}, "c": {"parent": "b", "rotate": 3, "hFlip": True}}
    found = {
        icon.name: icon.svg for icon in read_icons({"prefix": "x", "icons": {"a": {"body": RED}}, "aliases": aliases})
    }
    assert list(found) == ["a", "b", "c"]
    assert found["c"] == found["a"] != found["b"]
    endless = {"b": {"parent": "c"}, "c": {"parent": "b"}}
    assert len(list(read_icons({"prefix": "x", "icons": {"a": {"body": RED}}, "aliases": endless}))) == 1
