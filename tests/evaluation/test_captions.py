from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lamplit.data.pairs import Pair
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.captions import read_coco, read_flickr30k, read_xm3600, read_xtd


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / path)


def write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def karpathy(number: int, split: str, *captions: str, place: str = "val2014") -> dict:
    sentences = [{"raw": text, "tokens": text.split(), "imgid": number, "sentid": 0} for text in captions]
    name = f"COCO_val2014_{number:012}.jpg"
    return {
        "filepath": place,
        "filename": name,
        "cocoid": number,
        "split": split,
        "sentences": sentences,
        "sentids": [],
    }


COCO = {
    "images": [
        karpathy(7, "test", "A cat.", "A cat sits. ", "An animal."),
        karpathy(8, "train", "Not asked."),
        karpathy(9, "test", "A dog.", "An animal."),
        karpathy(10, "restval", "Not asked."),
    ],
    "dataset": "coco",
}
CAT, DOG = (f"val2014/COCO_val2014_{number:012}.jpg" for number in (7, 9))


@pytest.mark.parametrize("place", ["", "annotations"])
def test_coco_by_karpathy(tmp_path, place):
    write(tmp_path / place / "dataset_coco.json", COCO)
    write(tmp_path / "annotations" / "captions_val2017.json", {})  # Karpathy's list goes first
    put(tmp_path, CAT, DOG)
    [task] = read_coco(tmp_path)
    assert (task.benchmark, task.language) == ("coco", "en")
    # Every caption is an item of its own, the shared one too.
    assert task.captions == {CAT: ("A cat.", "A cat sits.", "An animal."), DOG: ("A dog.", "An animal.")}
    assert task.split == "Karpathy's test split, 2 images, 5 captions"
    assert task.notes == ("2 images here, 5,000 as published", "5 captions here, 25,010 as published")
    assert (task.images.key, task.images.root, task.images.ids) == ("coco-test", tmp_path, [CAT, DOG])
    for _ in range(2):  # they can be read again
        assert list(task.images.pairs) == [Pair(name, tmp_path / name, (), {}) for name in (CAT, DOG)]
    assert task.images.pairs.count == 2


def test_coco_images_of_2017(tmp_path):
    write(tmp_path / "dataset_coco.json", COCO)
    put(tmp_path, "val2017/000000000007.jpg", "train2017/000000000009.jpg")
    [task] = read_coco(tmp_path)
    assert task.images.ids == ["val2017/000000000007.jpg", "train2017/000000000009.jpg"]
    assert list(task.captions) == task.images.ids


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_official_split_is_named(tmp_path, year):
    annotations = [(3, "Second image."), (1, "First."), (3, "Second again.")]
    write(
        tmp_path / "annotations" / f"captions_val{year}.json",
        {
            "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
            "annotations": [{"id": 0, "image_id": image, "caption": text} for image, text in annotations],
        },
    )
    put(tmp_path, f"val{year}/a.jpg", f"val{year}/b.jpg")
    [task] = read_coco(str(tmp_path))
    assert task.captions == {f"val{year}/a.jpg": ("First.",), f"val{year}/b.jpg": ("Second image.", "Second again.")}
    assert task.split == f"validation split of {year}, 2 images, 3 captions"
    assert task.images.key == f"coco-val{year}"
    assert "not Karpathy's test split" in task.notes[0]


@pytest.mark.parametrize("place", ["flickr30k-images", "images"])
def test_flickr30k(tmp_path, place):
    entries = [
        {"filename": "1.jpg", "split": "test", "imgid": 0, "sentences": [{"raw": "Two."}, {"raw": "Two."}]},
        {"filename": "2.jpg", "split": "val", "imgid": 1, "sentences": [{"raw": "Not asked."}]},
    ]
    write(tmp_path / "dataset_flickr30k.json", {"images": entries})
    put(tmp_path, f"{place}/1.jpg")
    [task] = read_flickr30k(tmp_path)
    assert task.captions == {f"{place}/1.jpg": ("Two.", "Two.")}
    assert (task.benchmark, task.images.key) == ("flickr30k", "flickr30k-test")
    assert task.split == "Karpathy's test split, 1 images, 2 captions"


def xm3600(key: str, **captions: list[str]) -> str:
    languages = {
        code: {"caption": texts, "caption/tokenized": texts, "caption/tokenized/lowercase": texts}
        for code, texts in captions.items()
    }
    return json.dumps({"image/key": key, "image/locale": "quz", **languages}, ensure_ascii=False)


def test_xm3600(tmp_path):
    # A caption may hold a line separator of Unicode.
    rows = [xm3600("ab", en=["A hill.", "Hills."], ja=["丘\u2028二"]), xm3600("cd", en=["A lake."], ja=[" "])]
    write(tmp_path / "captions.jsonl", "\n".join(rows) + "\n")
    put(tmp_path, "images/ab.jpg", "images/cd.jpg")
    english, japanese = read_xm3600(tmp_path)
    assert (english.language, japanese.language) == ("en", "ja")
    assert english.captions == {"images/ab.jpg": ("A hill.", "Hills."), "images/cd.jpg": ("A lake.",)}
    assert japanese.captions == {"images/ab.jpg": ("丘\u2028二",)}, "an image without a caption does not count"
    assert english.images is japanese.images
    assert english.images.ids == ["images/ab.jpg", "images/cd.jpg"]
    assert english.notes == ("2 images here, 3,600 as published",)


NAMES = ["COCO_train2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"]


@pytest.mark.parametrize("authors", [True, False])
def test_xtd(tmp_path, authors):
    folders = ("XTD10", "MIC", "STAIR") if authors else ("", "", "")
    write(tmp_path / folders[0] / "test_image_names.txt", "\r\n".join(NAMES))
    write(tmp_path / folders[0] / "test_1kcaptions_it.txt", "Un gatto\nUn cane\n")
    write(tmp_path / folders[1] / "test_1kcaptions_de.txt", "Eine Katze\r\nEin Hund\r\n")
    write(tmp_path / folders[2] / "test_1kcaptions_jp.txt", "猫\n犬")
    paths = [f"{name.split('_')[1]}/{name}" if authors else f"images/{name}" for name in NAMES]
    put(tmp_path, *paths)
    tasks = read_xtd(tmp_path)
    assert {task.language: list(task.captions.values()) for task in tasks} == {
        "de": [("Eine Katze",), ("Ein Hund",)],
        "it": [("Un gatto",), ("Un cane",)],
        "ja": [("猫",), ("犬",)],
    }
    assert all(list(task.captions) == paths == task.images.ids for task in tasks)
    assert len({id(task.images) for task in tasks}) == 1


def test_xtd_needs_a_line_for_each_image(tmp_path):
    write(tmp_path / "test_image_names.txt", "\n".join(NAMES))
    write(tmp_path / "test_1kcaptions_en.txt", "one\ntwo\nthree\n")
    put(tmp_path, *(f"images/{name}" for name in NAMES))
    with pytest.raises(PairsError, match=r"test_1kcaptions_en\.txt has 3 lines; expected 2"):
        read_xtd(tmp_path)


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        (read_coco, "dataset_coco.json"),
        (read_flickr30k, "dataset_flickr30k.json"),
        (read_xm3600, "captions.jsonl"),
        (read_xtd, "test_image_names.txt"),
    ],
)
def test_wrong_root(tmp_path, reader, expected):
    with pytest.raises(PairsError, match=f"nowhere is no folder; expected one with .*{expected}"):
        reader(tmp_path / "nowhere")
    with pytest.raises(PairsError, match=f"expected .*{expected}"):
        reader(tmp_path)


def test_missing_images_are_counted(tmp_path):
    write(tmp_path / "dataset_coco.json", COCO)
    put(tmp_path, CAT)
    with pytest.raises(PairsError, match=f"1 of the 2 images of coco-test are missing under .*, first {DOG}"):
        read_coco(tmp_path)


def test_no_image_outside_the_root(tmp_path):
    put(tmp_path, "secret.jpg")
    write(tmp_path / "root" / "captions.jsonl", xm3600("../../secret", en=["A secret."]))
    with pytest.raises(PairsError, match="leads out of"):
        read_xm3600(tmp_path / "root")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "cannot be read: .*get it again"),
        ("[]", "not laid out as expected, .*TypeError"),
        ({"images": [{"filename": "1.jpg"}]}, "not laid out as expected, .*KeyError: 'split'"),
        ({"images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": 3}]}]}, "expected a list of str"),
        ({"images": [{"filename": "1.jpg", "split": "test", "sentences": []}]}, "has no captions in its split"),
        ({"images": []}, "every image of flickr30k-test is missing"),
    ],
)
def test_broken_karpathy(tmp_path, content, message):
    write(tmp_path / "dataset_flickr30k.json", content)
    put(tmp_path, "images/1.jpg")
    with pytest.raises(PairsError, match=message):
        read_flickr30k(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, "KeyError: 1"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": None}]},
            "list of str",
        ),
    ],
)
def test_broken_official(tmp_path, content, message):
    write(tmp_path / "annotations" / "captions_val2017.json", content)
    put(tmp_path, "val2017/a.jpg")
    with pytest.raises(PairsError, match=message):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"image/key": "a"}\n{', "line 2 of .*captions.jsonl is not JSON"),
        ('{"image/key": "a", "en": {"caption": "not a list"}}', "expected a list of str"),
        ('{"en": {"caption": []}}', "KeyError: 'image/key'"),
        ('{"image/key": "a"}', "has no captions"),
    ],
)
def test_broken_xm3600(tmp_path, lines, message):
    write(tmp_path / "captions.jsonl", lines)
    put(tmp_path, "images/a.jpg")
    with pytest.raises(PairsError, match=message):
        read_xm3600(tmp_path)


def test_a_file_that_is_not_text(tmp_path):
    write(tmp_path / "test_image_names.txt", "\n".join(NAMES))
    (tmp_path / "test_1kcaptions_en.txt").write_bytes(b"\xff\xfe\xff")
    put(tmp_path, *(f"images/{name}" for name in NAMES))
    with pytest.raises(PairsError, match=r"test_1kcaptions_en\.txt cannot be read"):
        read_xtd(tmp_path)


def test_names_that_are_not_utf8_are_as_a_store_has_them(tmp_path):
    name, id_ = "caf\udce9.jpg", "flickr30k-images/caf\\xe9.jpg"
    images = [{"filename": name, "split": "test", "sentences": [{"raw": "half \ud83d"}]}]
    write(tmp_path / "dataset_flickr30k.json", {"images": images})
    put(tmp_path, f"flickr30k-images/{name}")
    [task] = read_flickr30k(tmp_path)
    assert (task.captions, task.images.ids) == ({id_: ("half �",)}, [id_])
    assert [(pair.id, pair.image) for pair in task.images.pairs] == [(id_, tmp_path / f"flickr30k-images/{name}")]
