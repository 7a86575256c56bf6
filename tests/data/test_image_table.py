from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pytest
from pyarrow import parquet

from lamplit.data.sources import read_pairs
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


def test_bad_cells_cost_their_rows_alone(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"image": "a.jpg", "text": "a"}, {"image": ["b.jpg", "c.jpg"], "text": "two images"},
        {"image": "https://x.org/y.jpg", "text": "web"}, {"image": "a.jpg", "text": {"x": {"y": 1}}},
        {"image": "d.jpg", "text": "d"}, {"image": 7, "text": "n"}, {"image": "a.jpg", "text": "again"},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(tmp_path / "a.jsonl")
    for _ in range(2):  # read again, nothing is listed again
        assert {pair.id: pair.texts for pair in pairs} == {"a.jpg": ("a", "again"), "d.jpg": ("d",)}
        assert [(problem.id, problem.reason) for problem in pairs.problems] == [
            ("a.jsonl, row 2", "column image holds a list; expected a path or the bytes of one image"),
            ("a.jsonl, row 3", "column image holds web addresses (https://x.org/y.jpg)"),
            ("a.jsonl, row 4", "column text holds a dict; expected a text or a list of texts"),
            ("a.jsonl, row 6", "column image holds an int; expected a path or the bytes of one image"),
        ]


def test_a_list_of_rows_with_something_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.jpg", "text": "a"}, "x", {"image": "b.jpg"}]))
    pairs = read_pairs(tmp_path / "a.json")
    assert [pair.id for pair in pairs] == ["a.jpg", "b.jpg"]
    [problem] = pairs.problems
    assert (problem.id, problem.reason) == ("a.json, row 2", "this is a str; expected an object of columns")


def test_short_rows_are_counted(tmp_path: Path) -> None:
    for name, mark in (("a.csv", ","), ("b.tsv", "\t")):
        lines = ["image,text,lang", "a.jpg,a,en", "b.jpg", "c.jpg,c", "d.jpg,d,"]
        (tmp_path / name).write_text("".join(line.replace(",", mark) + "\n" for line in lines))
        pairs = read_pairs(tmp_path / name)
        assert [pair.texts for pair in pairs] == [("a",), (), ("c",), ("d",)]
        assert pairs.notes == [f"2 rows of {name} have fewer cells than the header; the missing ones are empty"]
    # A comma at the header's end names no column.
    (tmp_path / "c.csv").write_text("image,text,\na.jpg,a\n")
    assert read_pairs(tmp_path / "c.csv").notes == []


def test_tables_of_one_folder_name_their_columns_each(tmp_path: Path) -> None:
    place(tmp_path, "a.jpg", "b.jpg", "sub/a.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.jpg,An owl\n")
    (tmp_path / "metadata.jsonl").write_text('{"image": "b.jpg", "text": "A carp"}\n')
    (tmp_path / "sub/metadata.csv").write_text("path,title,n\na.jpg,A lynx,1\n")
    pairs = read_pairs(tmp_path)
    found = {pair.id: (pair.texts, pair.metadata) for pair in pairs}
    assert found == {"a.jpg": (("An owl",), {}), "b.jpg": (("A carp",), {}), "sub/a.jpg": (("A lynx",), {"n": "1"})}
    assert (pairs.text_columns, pairs.notes, pairs.problems) == (("caption", "text", "title"), [], [])


def test_a_table_without_images_or_texts_among_others(tmp_path: Path) -> None:
    place(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.jpg,An owl\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.jpg", "n": 1}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/metadata.csv").write_text("license,by\nMIT,me\n")
    pairs = read_pairs(tmp_path)
    assert {pair.id: pair.texts for pair in pairs} == {"a.jpg": ("An owl",), "b.jpg": ()}
    assert pairs.notes == [
        "no column of texts is known in metadata.jsonl, which has file_name, n; name it with --text-column NAME"
    ]
    [problem] = pairs.problems
    assert problem.path == str(tmp_path / "sub/metadata.csv")
    assert problem.reason == "no column of images is known in it; it has license, by"


def test_a_column_of_texts_that_is_empty_gives_way(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,text,caption\na.jpg, ,An owl\n")
    assert texts_of(tmp_path / "a.csv") == {"a.jpg": ("An owl",)}
    (tmp_path / "a.csv").write_text("image,text,caption\na.jpg,,\n")
    assert read_pairs(tmp_path / "a.csv").text_columns == ("text",)


def test_a_file_of_parquet_that_was_cut_off(tmp_path: Path) -> None:
    for number in range(3):
        parquet.write_table(pa.table({"image": [b"-"], "text": [str(number)]}), tmp_path / f"{number}.parquet")
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[:-9])
    pairs = read_pairs(tmp_path)
    assert [pair.texts for pair in pairs] == [("0",), ("2",)]
    [problem] = pairs.problems
    assert problem.id == "1.parquet"
    assert problem.reason.startswith("cannot be read (Parquet magic bytes not found in footer.")
    for number in (0, 2):
        (tmp_path / f"{number}.parquet").write_bytes(b"-")
    with pytest.raises(PairsError, match=r"cannot be read: 0\.parquet: "):
        read_pairs(tmp_path)


def test_a_table_that_is_damaged_on_the_way(tmp_path: Path) -> None:
    names = [f"{number % 4500}.jpg" for number in range(9000)]
    for letter in "ab":
        table = pa.table({"image": names, "text": [letter * 50] * 9000, "n": list(range(9000))})
        parquet.write_table(table, tmp_path / f"{letter}.parquet", row_group_size=4500, compression="gzip")
    file = tmp_path / "a.parquet"
    content = bytearray(file.read_bytes())
    page = parquet.read_metadata(file).row_group(1).column(1).data_page_offset
    content[page : page + 80] = b"\xff" * 80  # of a column that is not of images
    file.write_bytes(content)
    pairs = read_pairs(tmp_path)
    read = {pair.id: pair.texts for pair in pairs}
    assert len(read) == 4500
    assert read["0.jpg"] == ("a" * 50, "b" * 50)
    assert read["4400.jpg"] == ("b" * 50,)
    [problem] = pairs.problems
    assert problem.id == "a.parquet"
    assert problem.reason.startswith("cut off or damaged (")
    assert problem.reason.endswith("; rows read before that: 4,096")
