from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pytest
from pyarrow import parquet

from lamplit.data.pairs import read_pairs
from lamplit.errors import PairsError


def place(path: Path, *names: str) -> Path:
    """Make files that stand for images."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"-")
    return path


def texts_of(source: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {pair.id: pair.texts for pair in read_pairs(source, **options)}


def test_a_row_for_each_caption_in_every_format(tmp_path: Path) -> None:
    rows = [{"image": f"{name}.jpg", "caption": f"{name} {number}"} for number in range(3) for name in "ab"]
    expected = {f"{name}.jpg": tuple(f"{name} {number}" for number in range(3)) for name in "ab"}
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, 4)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as whole:
        whole.write_table(table, 4)
    (tmp_path / "a.csv").write_text("image|caption\n" + "".join(f"{row['image']}|{row['caption']}\n" for row in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.arrow", "b.arrow", "a.csv", "a.jsonl", "a.json", "lines.json"):
        pairs = read_pairs(tmp_path / name)
        assert (pairs.count, {pair.id: pair.texts for pair in pairs}) == (2, expected), name


def test_rows_of_images_in_cells_stay_apart(tmp_path: Path) -> None:
    table = pa.table({"image": [b"same", b"same"], "text": ["a", "b"], "raw": [b"x", b"y"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == {"0": ("a",), "1": ("b",)}


def test_tables_of_several_folders_share_images(tmp_path: Path) -> None:
    place(tmp_path, "all/x.jpg")
    for folder, text in (("train", "one"), ("test", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,text\n../all/x.jpg,{text}\n")
    assert [pair.texts for pair in read_pairs(tmp_path)] == [("two", "one")]


def test_images_that_no_row_names_are_said(tmp_path: Path) -> None:
    place(tmp_path, "a.jpg", "b.jpg", "c.jpg", "sub/d.jpg", normalize("NFD", "ä.jpg"))
    table = f"file_name,text\na.jpg,x\n{tmp_path}/b.jpg,y\n{normalize('NFC', 'ä.jpg')},z\n"
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")
    said = f"2 images below {tmp_path} are not named by metadata.csv and are left out: c.jpg, sub/d.jpg"
    assert read_pairs(tmp_path).notes == [said]
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "d.jpg", "text": "d"}\n')
    said = f"1 image below {tmp_path} is not named by metadata.csv, sub/metadata.jsonl and is left out: c.jpg"
    assert read_pairs(tmp_path).notes == [said]
    (tmp_path / "c.jpg").unlink()
    assert read_pairs(tmp_path).notes == []


def test_a_table_without_texts_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,words\na.jpg,An owl\n")
    [said] = read_pairs(tmp_path / "a.csv").notes
    assert said.startswith("no column of texts is known in ")
    assert said.endswith("which has image, words; name it with --text-column NAME")
    assert read_pairs(tmp_path / "a.csv", text_column="words").notes == []


@pytest.mark.parametrize(
    ("image", "text"), [("file_path", "comment"), ("image_name", "raw"), ("img_path", "conversations")]
)
def test_names_that_communities_use(tmp_path: Path, image: str, text: str) -> None:
    (tmp_path / "a.csv").write_text(f"{image}, {text}\na.jpg, An owl\n")
    assert texts_of(tmp_path / "a.csv") == {"a.jpg": ("An owl",)}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take both forms, or backslashes")
def test_names_from_windows_and_from_a_mac(tmp_path: Path) -> None:
    place(tmp_path, "img/a.jpg", normalize("NFD", "img/é.jpg"))
    composed = normalize("NFC", "é.jpg")
    (tmp_path / "a.csv").write_text(f"image,text\nimg\\a.jpg,a\nimg/a.jpg,b\nimg\\{composed},c\n", encoding="utf-8")
    pairs = list(read_pairs(tmp_path / "a.csv"))
    assert {pair.id: pair.texts for pair in pairs} == {"img/a.jpg": ("a", "b"), f"img/{composed}": ("c",)}
    assert all(isinstance(pair.image, Path) and pair.image.is_file() for pair in pairs)


@pytest.mark.parametrize("folder", ["flickr30k_images", "Images", "../images"])
def test_images_in_a_usual_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / "data").mkdir()
    place(tmp_path / "data", f"{folder}/a.jpg")
    (tmp_path / "data/results.csv").write_text("image_name| comment_number| comment\na.jpg| 0| An owl\na.jpg| 1| Owl\n")
    pairs = read_pairs(tmp_path / "data/results.csv")
    assert pairs.notes == ["results.csv is separated by bars", f"the images of results.csv are in {folder}"]
    [pair] = pairs
    assert isinstance(pair.image, Path)
    assert pair.image.is_file()
    assert (pair.id, pair.texts) == (f"{folder.removeprefix('../')}/a.jpg", ("An owl", "Owl"))


def test_latin_1_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("image;text\na.jpg;café\n".encode("cp1252"))
    pairs = read_pairs(tmp_path / "a.csv")
    assert next(iter(pairs)).texts == ("café",)
    assert [note.partition(";")[0] for note in pairs.notes] == [
        "a.csv is not UTF-8 and is read as Windows-1252 (Latin-1)",
        "a.csv is separated by semicolons",
    ]


def test_web_addresses_are_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,text\nhttps://x.org/a.jpg,a\n")
    with pytest.raises(PairsError, match="web addresses"):
        read_pairs(tmp_path / "a.csv")
