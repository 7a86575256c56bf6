from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamplit.data.sources import read_pairs
from lamplit.errors import PairsError, UsageError

COCO = {
    "info": {},
    "images": [{"id": 7, "file_name": "7.jpg", "height": 48}, {"id": 9, "file_name": "9.jpg", "height": 50}],
    "annotations": [
        {"id": 0, "image_id": 7, "caption": "a "},
        {"id": 1, "image_id": 9, "caption": "c"},
        {"id": 2, "image_id": 7, "caption": "b"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "split": split,
            "sentences": [{"raw": split, "tokens": []}],
        }
        for number, split in enumerate(("train", "restval", "val", "test", "train"))
    ],
}


def written(file: Path, document: Any, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, **options))
    return file


def texts_of(source: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {pair.id: pair.texts for pair in read_pairs(source, **options)}


def image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"-")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("place", "prefix"),
    [("7.jpg", ""), ("train2017/7.jpg", "train2017/"), ("../train2017/7.jpg", "train2017/"),
     ("../images/train2017/7.jpg", "images/train2017/")],
)  # fmt: skip
def test_coco(tmp_path: Path, place: str, prefix: str, indent: int | None) -> None:
    file = written(tmp_path / "annotations/captions_train2017.json", COCO, indent=indent)
    image(file.parent / place)
    pairs = read_pairs(file)
    assert pairs.count == 2
    assert {pair.id: pair.texts for pair in pairs} == {f"{prefix}7.jpg": ("a", "b"), f"{prefix}9.jpg": ("c",)}
    first = next(iter(pairs))
    assert first.metadata == {"id": 7, "height": 48}
    assert isinstance(first.image, Path)
    assert first.image.is_file()
    if place.startswith(".."):  # the folder gives the same
        assert list(read_pairs(tmp_path)) == list(pairs)


def test_a_folder_of_coco_with_both_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        written(tmp_path / f"annotations/captions_{split}2017.json", COCO)
        image(tmp_path / f"{split}2017/7.jpg")
        image(tmp_path / f"{split}2017/9.jpg")
    image(tmp_path / "train2017/8.jpg")
    pairs = read_pairs(tmp_path)
    assert {pair.id: pair.texts for pair in pairs} == {"train2017/7.jpg": ("a", "b"), "train2017/9.jpg": ("c",)}
    several, unnamed = pairs.notes[0], pairs.notes[-1]
    assert several.endswith("read is train, and not validation (1); --split NAME or --split all reads others")
    assert unnamed.endswith("left out: train2017/8.jpg, val2017/7.jpg, val2017/9.jpg")
    assert set(texts_of(tmp_path, split="val")) == {"val2017/7.jpg", "val2017/9.jpg"}
    assert len(texts_of(tmp_path, split="all")) == 4


def test_karpathy(tmp_path: Path) -> None:
    file = written(tmp_path / "dataset_coco.json", KARPATHY)
    pairs = read_pairs(file)
    expected = {"val2014/0.jpg": ("train",), "val2014/1.jpg": ("restval",), "val2014/4.jpg": ("train",)}
    assert {pair.id: pair.texts for pair in pairs} == expected
    assert pairs.notes == [
        "dataset_coco.json has several splits; read is train and restval, and not val (1), test (1); "
        "--split NAME or --split all reads others"
    ]
    assert texts_of(file, split="validation") == texts_of(file, split="val") == {"val2014/2.jpg": ("val",)}
    assert len(texts_of(file, split="all")) == 5
    with pytest.raises(UsageError, match="has no split 'extra'; it has train, restval, val, test; type --split NAME"):
        read_pairs(file, split="extra")
    image(tmp_path / "images/val2014/0.jpg")
    assert [pair.id for pair in read_pairs(tmp_path)] == [f"images/{name}" for name in expected]


@pytest.mark.parametrize(
    ("document", "texts"),
    [
        ({"a.jpg": ["x", "y"], "b.jpg": "z"}, {"a.jpg": ("x", "y"), "b.jpg": ("z",)}),
        ({"version": 1, "data": [{"image": "a.jpg", "caption": "x"}]}, {"a.jpg": ("x",)}),
        ({"image": "a.jpg", "caption": "x"}, {"a.jpg": ("x",)}),
        ([{"id": "q", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}]}], {"a.jpg": ("x",)}),
    ],
)
def test_other_documents(tmp_path: Path, document: Any, texts: dict[str, tuple[str, ...]]) -> None:
    for indent in (None, 2):
        assert texts_of(written(tmp_path / "a.json", document, indent=indent)) == texts


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"bbox": []}]},
            "no captions; give captions_val.json",
        ),
        ({"a": {"b": 1}, "c": [1]}, "an object of a, c; expected a list of rows"),
        ([1], "row 1 is an int"),
        ("text", "it holds a str; expected a list of rows"),
    ],
)
def test_documents_of_no_known_kind(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(PairsError, match=message):
        read_pairs(written(tmp_path / "instances_val.json", document))
