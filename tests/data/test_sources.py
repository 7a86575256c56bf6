from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from PIL import Image

from lamplit.data.pairs import Pair
from lamplit.data.skipped import Skipped
from lamplit.data.sources import read_pairs
from lamplit.errors import PairsError, UsageError


def encoded(color: str = "red", format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(file, format)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"image": "a/owl.jpg", "caption": " An owl. ", "n": "007"},
    {"image": "a/cat.jpg", "caption": "NA", "n": ""},
    {"image": "/far/dog.jpg", "caption": 'A dog, "big"\nand old', "n": "1"},
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_table_gives_the_same_pairs(tmp_path, suffix):
    path = tmp_path / f"odd [name] *{suffix}"
    match suffix:
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(ROWS)
        case ".jsonl":
            write_jsonl(path, ROWS)
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
    pairs = read_pairs(path)
    expected = [
        Pair("a/owl.jpg", tmp_path / "a/owl.jpg", ("An owl.",), {"n": "007"}),
        Pair("a/cat.jpg", tmp_path / "a/cat.jpg", ("NA",), {"n": ""}),
        Pair("/far/dog.jpg", Path("/far/dog.jpg"), ('A dog, "big"\nand old',), {"n": "1"}),
    ]
    assert list(pairs) == expected
    assert list(pairs) == expected, "a second reading differs"
    assert (pairs.image_column, pairs.text_columns) == ("image", ("caption",))
    assert pairs.count == 3


def test_relative_sources_give_images_that_survive_a_change_of_folder(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"image": "x.png"}])
    monkeypatch.chdir(tmp_path)
    assert next(iter(read_pairs("a.jsonl"))).image == tmp_path / "x.png"


def test_columns_are_found_in_order_and_whatever_their_case(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"Path": "p.png", "Title": "t", "Caption": "c", "IMG": "i.png"}])
    assert list(read_pairs(path)) == [Pair("i.png", tmp_path / "i.png", ("c",), {"Path": "p.png", "Title": "t"})]


def test_columns_are_named(tmp_path):
    row = {"photo": "p.png", "image": "i.png", "title": "t", "description": ["d", " ", "e "], "a,b": "f"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    pairs = read_pairs(path, image_column="photo", text_column="title, Description")
    assert list(pairs) == [Pair("p.png", tmp_path / "p.png", ("t", "d", "e"), {"image": "i.png", "a,b": "f"})]
    assert next(iter(read_pairs(path, text_column="a,b"))).texts == ("f",)


def test_a_column_missing_from_the_first_row_is_found(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "0.png"}, {"image": "1.png", "text": "one"}])
    assert [pair.texts for pair in read_pairs(path)] == [(), ("one",)]


def test_columns_null_for_long_and_cells_of_mixed_types(tmp_path):
    rows: list[dict[str, Any]] = [{"image": f"{n}.png", "text": "x" * 1000, "text_de": None} for n in range(12_000)]
    rows.append({"image": "z.png", "text": ["a", None, 3], "text_de": "z", "seen": "2020-01-01 10:00:00"})
    pairs = list(read_pairs(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert pairs[0].metadata == {"text_de": None}
    assert pairs[-1] == Pair("z.png", tmp_path / "z.png", ("a", "3"), {"text_de": "z", "seen": "2020-01-01 10:00:00"})


def test_rows_of_one_image_are_one_pair(tmp_path):
    rows = [
        {"image": "a.png", "text": "one", "by": "ann", "n": 1, "seen": None},
        {"image": "b.png", "text": "two", "by": "ann", "n": 1, "seen": "yes"},
        {"image": "./a.png", "text": ["three", "one"], "by": "bob", "n": 2, "seen": "no"},
        {"image": "a.png#2", "text": "x"},
        {"image": "a.png", "text": "four", "by": "bob", "n": 1},
        {"image": None, "text": "none"},
        {"image": "", "text": "none"},
    ]
    pairs = read_pairs(write_jsonl(tmp_path / "a.jsonl", rows))
    assert pairs.count == 5
    # An image comes where its last row is.
    expected = [
        Pair("b.png", tmp_path / "b.png", ("two",), {"by": "ann", "n": 1, "seen": "yes"}),
        Pair("a.png#2", tmp_path / "a.png#2", ("x",), {}),
        Pair(
            "a.png", tmp_path / "a.png", ("one", "three", "four"), {"by": "ann", "n": 1, "seen": "no"},
            not_kept=("by", "n", "by"),
        ),
        Pair("5", b"", ("none",), {}),
        Pair("6", b"", ("none",), {}),
    ]  # fmt: skip
    assert list(pairs) == list(pairs) == expected
    # Rows that belong to vectors stay apart.
    apart = read_pairs(tmp_path / "a.jsonl", need_images=False)
    assert apart.count == len(list(apart)) == 7


def test_parquet_as_datasets_writes_it(tmp_path):
    red, blue = encoded("red"), encoded("blue")
    data = {
        "image": [{"bytes": red, "path": "x.png"}, {"bytes": blue, "path": None}],
        "texts": [["a", "b"], []],
    }
    features = datasets.Features(
        image=datasets.Image(), texts=datasets.List(datasets.Value("string")), when=datasets.Value("date32"),
        price=datasets.Value("float64"), thumbnail=datasets.Image(), raw=datasets.Value("binary"),
    )  # fmt: skip
    data |= {
        "when": [datetime(2020, 1, 2).date(), None], "price": [1.5, float("nan")],
        "thumbnail": [{"bytes": red, "path": None}] * 2, "raw": [b"x", None],
    }  # fmt: skip
    datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "train-0.parquet")
    for source in (tmp_path, tmp_path / "train-0.parquet"):
        pairs = read_pairs(source)
        assert pairs.count == 2
        first, second = pairs
        assert first == Pair("0", red, ("a", "b"), {"when": "2020-01-02", "price": 1.5})
        assert (second.id, second.image, second.texts) == ("1", blue, ())
        json.dumps([first.metadata, second.metadata], allow_nan=False)


def test_empty_images_stay_to_be_listed_as_skipped(tmp_path):
    rows = [{"image": None}, {"image": ""}, {"image": []}, {"image": ["a.png"]}]
    pairs = list(read_pairs(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [pair.image for pair in pairs] == [b"", b"", b"", tmp_path / "a.png"]
    assert [pair.id for pair in pairs] == ["0", "1", "2", "a.png"]


def image_folder(root: Path) -> Path:
    for name in ("b.PNG", "a.jpg", "birds/owl.png", "birds/night/bat.webp", ".hidden/x.png", "notes.md"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"-")
    return root


def test_folder_of_images_with_texts_beside_them(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "a.txt").write_text("\ufeffAn a.\n\n  Another. \n", encoding="utf-8")
    (tmp_path / "b.TXT").write_text("From a camera.")
    (tmp_path / "birds/owl.txt").write_bytes("déjà vu, \xff".encode("latin-1"))
    pairs = read_pairs(tmp_path)
    assert pairs.count == 4
    assert list(pairs) == [
        Pair("a.jpg", tmp_path / "a.jpg", ("An a.", "Another."), {}),
        Pair("b.PNG", tmp_path / "b.PNG", ("From a camera.",), {}),
        Pair("birds/night/bat.webp", tmp_path / "birds/night/bat.webp", (), {"folder": "birds/night"}),
        Pair("birds/owl.png", tmp_path / "birds/owl.png", ("déjà vu, ÿ",), {"folder": "birds"}),
    ]
    with pytest.raises(UsageError, match="--text-column"):
        read_pairs(tmp_path, text_column="caption")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_folder_with_a_metadata_file(tmp_path, suffix):
    image_folder(tmp_path)
    rows = [{"file_name": "night/bat.webp", "text": "A bat.", "k": "v"}]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / "birds" / f"metadata.{suffix}"
    match suffix:
        case "csv":
            path.write_text("file_name,text,k\nnight/bat.webp,A bat.,v\n")
        case "jsonl":
            write_jsonl(path, rows)
        case "parquet":
            pq.write_table(table, path)
    expected = Pair("birds/night/bat.webp", tmp_path / "birds/night/bat.webp", ("A bat.",), {"k": "v"})
    assert list(read_pairs(tmp_path)) == [expected]


def test_tars_of_mixed_images_and_sidecars(tmp_path):
    red, blue = encoded("red", "JPEG"), encoded("blue")
    write_tar(
        tmp_path / "s-000.tar",
        {
            "./0.jpg": red, "./0.txt": b" red ", "./0.json": b'{"caption": "other", "width": 4}',
            "./._0.jpg": b"mac", "x/1.txt": b"", "x/1.PNG": blue, "x/1.cls": b"3", "x/1.npy": b"\x93NUMPY",
            "2.json": b"{broken", "2.webp": b"", "3.txt": b"no image",
        },
    )  # fmt: skip
    write_tar(tmp_path / "s-001.tar", {"0.png": blue, "0.json": b'{"caption": "c", "d": [1, null]}'})
    expected = [
        Pair("0", red, ("red",), {"caption": "other", "width": 4}),
        Pair("x/1", blue, (), {"cls": "3"}),
        Pair("2", b"", (), {"json": "{broken"}),
        Pair("3", b"", ("no image",), {}),
    ]
    last = Pair("0#2", blue, (), {"caption": "c", "d": [1, None]})
    assert list(read_pairs(tmp_path / "s-000.tar")) == expected
    for source in (tmp_path, tmp_path / "*.tar", tmp_path / "s-{000..001}.tar"):
        pairs = read_pairs(source)
        assert list(pairs) == list(pairs) == [*expected, last]
    captions = [pair.texts for pair in read_pairs(tmp_path, text_column="txt,caption")]
    assert captions == [("red", "other"), (), (), ("no image",), ("c",)]
    assert [pair.image for pair in read_pairs(tmp_path, image_column="jpg")] == [red, b"", b"", b"", b""]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "image,text\n", "no rows"),
        ("a.csv", "image,image\na,b\n", "two columns have one name"),
        ("a.csv", "image,text\na.png,b,c\n", "no rows"),
        ("a.jsonl", '{"image', "no rows"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"foto": "a", "words": "b"}', "it has foto, words; name it with --image-column NAME"),
        ("a.jsonl", '{"url": "https://x.org/a.png", "text": "b"}', "img2dataset.*--image-column NAME"),
        ("a.jsonl", '{"image": "https://x.org/a.png"}', "web addresses.*img2dataset"),
        ("a.jsonl", '{"image": ["a", "b"]}', "image holds a list"),
        ("a.jsonl", '{"image": "a", "text": {"n": 1}}', "text holds a dict.*--text-column NAME"),
        ("a.parquet", "PAR1 not really", "cannot be read"),
        ("a.tar", "not really", "cannot be read"),
        ("a.zip", "PK", "ends in .zip; expected"),
        ("README", "x", "ends in nothing; expected"),
    ],
)
def test_sources_that_cannot_be_read_say_why(tmp_path, name, content, message):
    with pytest.raises(PairsError, match=message):
        list(read_pairs(write(tmp_path / name, content)))


def test_sources_without_pairs_say_what_to_give(tmp_path):
    with pytest.raises(PairsError, match="does not exist; give a folder of images"):
        read_pairs(tmp_path / "nothing.csv")
    with pytest.raises(PairsError, match="does not exist"):
        read_pairs(tmp_path / "*.tar")
    with pytest.raises(PairsError, match="holds no images; expected JPEG"):
        read_pairs(tmp_path)
    write_tar(tmp_path / "a-0.tar", {"0.txt": b"words", "0.mp3": b"sound"})
    with pytest.raises(PairsError, match="no images in its first samples; it has txt, mp3"):
        read_pairs(tmp_path)
    with pytest.raises(PairsError, match="no file for 1, 2"):
        read_pairs(tmp_path / "a-{0..2}.tar")
    whole = write_tar(tmp_path / "b.tar", {f"{n}.png": encoded() for n in range(200)})
    whole.write_bytes(whole.read_bytes()[: 34 * 1024 + 512 + 50])  # in the midst of an image
    pairs = read_pairs(whole)
    assert [pair.id for pair in pairs] == [str(n) for n in range(34)]
    assert [problem.id for problem in pairs.problems] == ["b.tar"]


def test_wanted_columns_that_do_not_exist_are_listed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "a", "text": "b"}])
    with pytest.raises(UsageError, match="no column 'foto'; it has image, text; type --image-column NAME"):
        read_pairs(path, image_column="foto")
    with pytest.raises(UsageError, match="no column 'titel'; it has image, text; type --text-column NAME"):
        read_pairs(path, text_column="text,titel")


def test_a_hub_data_set_that_cannot_be_reached_says_so(tmp_path):
    code = "from lamplit.data.sources import read_pairs; read_pairs('nobody/nothing')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "PairsError: nobody/nothing is not a file or folder here, and the Hugging Face hub" in result.stderr


@pytest.mark.slow
def test_reading_leaves_no_cache(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"image": "a"}])
    pq.write_table(pa.Table.from_pylist([{"image": encoded()} for _ in range(2000)]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("image\n" + "".join(f"{number}.png\n" for number in range(10_000)))
    code = (
        "import sys; from lamplit.data.sources import read_pairs\n"
        "print(sum(1 for name in sys.argv[1:] for pair in read_pairs(name)))"
    )
    home = tmp_path / "home"
    files = [str(tmp_path / name) for name in ("a.jsonl", "a.parquet", "a.csv")]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *files], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "12001\n"
    assert sum(file.stat().st_size for file in home.rglob("*") if file.is_file()) < 10_000


captions = st.lists(
    st.sampled_from(["a", " A", "b", "B ", "ß", "SS", "c", "", "  "]) | st.text(max_size=3), max_size=40
)


def test_captions_beside_images_in_other_encodings(tmp_path):
    for name, encoding in (("a", "utf-8"), ("b", "cp1252"), ("c", "utf-16"), ("d", "utf-8-sig"), ("e", "utf-16-le")):
        (tmp_path / f"{name}.jpg").write_bytes(b"-")
        (tmp_path / f"{name}.txt").write_bytes("Ein Käse\nZwei\n".encode(encoding))
    (tmp_path / "f.jpg").write_bytes(b"-")
    (tmp_path / "f.json").write_bytes('{"caption": "Ein Käse"}'.encode("latin-1"))
    pairs = read_pairs(tmp_path)
    for _ in range(2):
        assert [pair.texts for pair in pairs] == [("Ein Käse", "Zwei")] * 5 + [("Ein Käse",)]
        assert pairs.notes == ["texts that are not UTF-8 are read as Windows-1252 (Latin-1), such as b.txt"]


def test_a_file_of_captions_that_cannot_be_used_is_a_problem(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"-")
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**24 + 1)
    (tmp_path / "b.txt").write_text("An owl")
    pairs = read_pairs(tmp_path)
    assert [pair.texts for pair in pairs] == [(), ("An owl",)]
    assert pairs.problems == [Skipped("a.txt", str(tmp_path / "a.txt"), "16 MiB, more than the bound of 16")]


def test_a_text_in_a_tar_that_is_none_costs_its_sample(tmp_path):
    files = {"a.json": b'{"caption": "An owl"}', "b.json": b'{"caption": {"a": {"b": 1}}}'}
    files |= {"c.txt": "Käse".encode("latin-1")} | {f"{name}.jpg": b"-" for name in "abc"}
    write_tar(tmp_path / "a.tar", dict(sorted(files.items())))
    pairs = read_pairs(tmp_path / "a.tar", text_column="txt,caption")
    assert {pair.id: pair.texts for pair in pairs} == {"a": ("An owl",), "c": ("Käse",)}
    assert pairs.problems == [Skipped("b", "b", "column caption holds a dict; expected a text or a list of texts")]
    assert pairs.notes == ["texts that are not UTF-8 are read as Windows-1252 (Latin-1), such as c.txt"]
