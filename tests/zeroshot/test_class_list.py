from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lamplit
from lamplit.errors import TowerError, UsageError
from lamplit.model import LiT
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.classifier import class_list

NAMES = ["circle", "square", "ring"]


def corner_list(**values: Any) -> ClassList:
    """Three classes along the axes of a space of three dimensions."""
    made = ClassList(
        NAMES, ["{}"], torch.eye(3), logit_multiplier=2.0, space="a" * 32, image_tower="timm:x", text_tower="hf:y"
    )
    return replace(made, **values)


def test_answers_by_hand() -> None:
    zimg = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.6, 0.8], [0.6, 0.6, 0.529]])
    probabilities, given = corner_list().classify(zimg)
    assert torch.allclose(probabilities, (2 * zimg).softmax(1))
    assert given.tolist() == [[True, False, False], [False, False, True], [True, False, False]]

    closed = corner_list(thresholds=[0.7] * 3)
    assert closed.given(zimg).tolist() == [[True, False, False], [False, False, True], [False] * 3]

    independent = corner_list(thresholds=[0.7, 0.5, 0.9], logit_bias=-1.0)
    probabilities, given = independent.classify(zimg)
    assert torch.allclose(probabilities, (2 * zimg - 1).sigmoid())
    assert given.tolist() == [[True, True, False], [False, True, False], [False, True, False]]
    assert (corner_list().multi_label, closed.multi_label, independent.multi_label) == (False, False, True)


# --- Labels


def test_labels() -> None:
    rows, truth = corner_list().read_labels(["ring", None, "none", " ", "", " circle "])
    assert rows == [0, 2, 5]
    assert truth.int().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    rows, truth = corner_list(names=["1", "2", "none"]).read_labels([2, "none"])
    assert truth.int().tolist() == [[0, 1, 0], [0, 0, 1]], "a class may be called so"


def test_labels_that_are_numbers_are_places() -> None:
    notes: list[str] = []
    rows, truth = corner_list().read_labels([2, None, "none", 0.0], notes)
    assert rows == [0, 2, 3]
    assert truth.int().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert notes == ["labels are numbers, so they are places in the list of classes: 0 is circle"]
    with pytest.raises(UsageError, match="labels that are not among the classes: 3"):
        corner_list().read_labels([0, 3])
    with pytest.raises(UsageError, match="labels that are not among the classes: 0"):
        corner_list().read_labels([0, "ring"])


def test_several_labels_where_they_are_independent() -> None:
    cells = ["ring; circle", ["square", "ring"], [], "none", None]
    independent = corner_list(logit_bias=0.0, thresholds=[0.0] * 3)
    rows, truth = independent.read_labels(cells)
    assert rows == [0, 1, 2, 3]
    assert truth.int().tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(UsageError, match=r"an image has several labels; .* need --multi-label"):
        corner_list().read_labels([["ring", "circle"]])
    with pytest.raises(UsageError, match="labels that are not among the classes: ring; circle"):
        corner_list().read_labels(["ring; circle"])


def test_unknown_labels_are_named() -> None:
    with pytest.raises(UsageError, match=r"cross, star \(3 in all\); add them to the classes, or .* 'none'"):
        corner_list().read_labels(["ring", "star", "cross", "star"])
    with pytest.raises(UsageError, match="no image of the sample has a label"):
        corner_list().read_labels([None, ""])


# --- The file


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"thresholds": [0.1, 0.1 + 2**-54, 1 / 3]},
        {"thresholds": [0.1, -0.2, 0.3], "logit_bias": -1 / 3, "logit_multiplier": 1e4 / 7},
        {"names": ["Größe", "<b>", '"'], "templates": ["ein {}", "{}"]},
        {"names": ["ü" * 1000, "b", "c"], "templates": ["{}" + "x" * 998], "image_tower": "model:/" + "x" * 4000},
    ],
)
def test_round_trip_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    vectors = F.normalize(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    made = corner_list(vectors=vectors, **changes)
    made.save(tmp_path / "classes.json")
    read = ClassList.load(tmp_path / "classes.json")
    for field in fields(ClassList):
        if field.name != "vectors":
            assert getattr(read, field.name) == getattr(made, field.name), field.name
    assert read.vectors.dtype == torch.float32
    assert read.vectors.numpy().tobytes() == vectors.numpy().tobytes()
    again = tmp_path / "again.json"
    read.save(again)
    assert again.read_bytes() == (tmp_path / "classes.json").read_bytes()


def without(key: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        del values[key]

    return change


def to(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to("kind", "other"), "it is something else"),
        (to("format", 2), "it has format 2; this lamplit reads up to 1: upgrade it"),
        (without("vectors"), "'vectors'"),
        (to("names", []), "it has no names, or one of them twice"),
        (to("names", ["a", "a", "b"]), "one of them twice"),
        (to("names", "abc"), "names is not a list"),
        (to("names", ["a", "b", 3]), "names has something other than texts"),
        (to("names", ["a", "b", "c" * 1001]), "names has something other than texts"),
        (to("templates", [None]), "templates has something"),
        (to("width", 2**40), "width 1099511627776"),
        (to("width", "3"), "width '3'"),
        (to("width", 4), "36 bytes of vectors; 3 classes of width 4 have 48"),
        (to("vectors", "!!!!"), "base64"),
        (to("vectors", [1.0]), ""),
        (to("vectors", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"), "not of length 1"),
        (to("vectors", "AADAfwAAAAAAAAAAAAAAAAAAgD8AAAAAAAAAAAAAAAAAAIA/"), "not of length 1"),  # one is nan
        (to("thresholds", [0.1]), "the number of thresholds is not that of the classes"),
        (to("thresholds", [0.1, 0.1, "x"]), "thresholds has something other than numbers"),
        (to("logit_bias", 1.0), "multi-label classes without thresholds"),
        (to("logit_scale", 0), "logit_scale 0.0"),
        (to("logit_scale", float("nan")), "NaN is not a number"),
        (to("logit_scale", 10**400), ""),
        (to("logit_scale", True), "logit_scale has something"),
        (to("space", None), "space has something"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    file = tmp_path / "classes.json"
    corner_list().save(file)
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="cannot be read as a class list, which lamplit classes writes: ") as raised:
        ClassList.load(file)
    assert message in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"ring\ncircle\n", b"[" * 100_000, b"[]", b"\xff\xfe", b"\x80\x04"])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.json").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read as a class list"):
        ClassList.load(tmp_path / "classes.json")
    with pytest.raises(UsageError, match="cannot be read as a class list"):
        ClassList.load(tmp_path / "none.json")


def test_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "classes.json").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(UsageError, match="it has more than 256 MB"):
        ClassList.load(tmp_path / "classes.json")


def test_what_load_would_refuse_is_not_made(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lamplit.load(model_path)
    with pytest.raises(
        UsageError, match=r"the class 'cat very very .*' ?\.\.\. has 1,253 letters; expected at most 1,000"
    ):
        lamplit.make_classes(model, ["cat" + " very" * 250, "dog"])
    with pytest.raises(UsageError, match=r"the template 'a \{\}x.* has 1,003 letters"):
        lamplit.make_classes(model, ["cat", "dog"], templates=["a {}" + "x" * 999])
    with pytest.raises(UsageError, match=r"the class 'yyy.* has 1,001 letters"):
        corner_list(names=["a", "b", "y" * 1001])
    monkeypatch.setattr("lamplit.zeroshot.class_list._MAX_BYTES", 100)
    with pytest.raises(UsageError, match="the list of 3 classes has 0 MB; expected at most 0: make several"):
        corner_list().save(tmp_path / "classes.json")
    assert not (tmp_path / "classes.json").exists()


def test_file_of_format_1(model_path: Path) -> None:
    """The file has the form that lamplit 0.1.0 wrote before `logit_scale` became `logit_multiplier` in Python."""
    read = ClassList.load(Path(__file__).parents[1] / "fixtures" / "classes-format-1.json")
    assert (read.names, read.templates) == (["ring", "Größe"], ["{}", "A {}."])
    assert (read.logit_multiplier, read.logit_bias, read.thresholds) == (12.5, None, [0.25, 0.25])
    assert (read.space, read.image_tower, read.text_tower) == ("a" * 32, "timm:test_vit", "hf:bert")
    assert read.vectors.tolist() == [[1, 0, 0], [0, pytest.approx(0.6), pytest.approx(-0.8)]]
    assert read.report is None


def test_repr() -> None:
    assert repr(corner_list()) == (
        "<ClassList of 3: circle, square, ring; one per image, no thresholds, for images of timm:x>"
    )
    many = corner_list(names=list("abcdef"), thresholds=[0.0] * 6, logit_bias=0.0)
    assert repr(many) == "<ClassList of 6: a, b, c and 3 more; multi-label, thresholds, for images of timm:x>"


# --- Which images it reads


def test_images_of_another_space_are_refused(model_path: Path) -> None:
    model = lamplit.load(model_path)
    made = class_list(model, NAMES)
    made.require_model(lamplit.load(model_path, towers="image"))
    width = model.identity.width
    centered = LiT(None, model.identity, center=torch.ones(width))
    head = torch.nn.Linear(width, width)
    headed, other = LiT(None, model.identity, image_head=head), LiT(None, replace(model.identity, fingerprint="b" * 32))
    spaces = {model.space, centered.space, headed.space, other.space}
    assert len(spaces) == 4
    assert model.space == model.identity.fingerprint
    for stranger in (centered, headed, other):
        with pytest.raises(TowerError, match="the class list was made for images of timm:test_vit"):
            made.require_model(stranger)
    with torch.no_grad():
        head.bias += 1
    assert headed.space not in spaces
