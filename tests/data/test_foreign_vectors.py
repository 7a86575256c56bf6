"""Vectors as others write them, and what only looks like them."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from vector_files import some, write_part

from lamplit.data.vectors import foreign_tables as columns_of
from lamplit.data.vectors import foreign_vectors as vectors_of
from lamplit.data.vectors.foreign_vectors import ForeignVectors, read_vectors
from lamplit.errors import PairsError, UsageError


class Entry(NamedTuple):
    """What a source says about the image of one vector."""

    path: str
    texts: tuple[str, ...]
    metadata: dict[str, Any]


def read(vectors: ForeignVectors) -> tuple[np.ndarray, list[Entry]]:
    """Read all vectors, and a row for each, with its metadata as a store would be given it."""
    blocks = list(vectors)
    assert all(len(values) == len(described) for values, _, described in blocks)
    entries = []
    for *_, described in blocks:
        cells = {
            name: columns_of.plain_cells(column) if isinstance(column, pa.Array) else column
            for name, column in described.metadata.items()
        }
        for row, (path, texts) in enumerate(zip(described.paths.to_pylist(), described.texts.to_pylist(), strict=True)):
            entries.append(Entry(path, tuple(texts), {name: values[row] for name, values in cells.items()}))
    return np.concatenate([values for values, *_ in blocks]), entries


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (columns_of, vectors_of):
        monkeypatch.setattr(module, "BLOCK_ROWS", 3)


# clip-retrieval's folders


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("digits", [1, 2])
def test_parts_come_by_their_number(tmp_path: Path, digits: int) -> None:
    """As text, 10 comes before 2."""
    made = {number: some(5, seed=number, kind=np.float16) for number in (0, 2, 10)}
    for number, vectors in made.items():
        write_part(
            tmp_path, f"{number:0{digits}}", vectors, image_path=[f"{number}/{i}" for i in range(5)], caption=["x"] * 5
        )
    (tmp_path / "text_emb").mkdir()
    np.save(tmp_path / "text_emb" / "text_emb_0.npy", some(99))  # of texts, and not read
    opened = read_vectors(tmp_path)
    assert (opened.count, opened.width) == (15, 4)
    for _ in range(2):
        values, entries = read(opened)
        assert np.array_equal(values, np.concatenate(list(made.values())))
        assert [entry.path for entry in entries] == [f"{number}/{i}" for number in made for i in range(5)]


def test_columns_of_clip_retrieval(tmp_path: Path) -> None:
    write_part(
        tmp_path, "0", some(2),
        image_path=["000000001", "000000002"], caption=[" one ", None], key=["a", "b"], text=["not the", "caption"],
        original_width=[640, 480], similarity=[0.25, float("nan")], id=[7, 8], **{"exif.Make": ["x", None]},
    )  # fmt: skip
    _, [first, second] = read(read_vectors(tmp_path))
    metadata = {"key": "a", "text": "not the", "original_width": 640, "similarity": 0.25, "id": 7, "exif.Make": "x"}
    assert first == Entry("000000001", ("one",), metadata)
    assert (second.texts, second.metadata["similarity"], second.metadata["exif.Make"]) == ((), None, None)
    _, [first, _] = read(read_vectors(tmp_path, text_column="text,key", image_column="key"))
    assert (first.path, first.texts, first.metadata["caption"]) == ("a", ("not the", "a"), " one ")


def test_texts_beside_the_caption(tmp_path: Path) -> None:
    texts = [["b", "a", "b"], ["c"], []]
    write_part(tmp_path, "0", some(3), image_path=["1", "2", "3"], caption=["b", "other", "only"], texts=texts)
    _, entries = read(read_vectors(tmp_path))
    assert [entry.texts for entry in entries] == [("b", "a", "b"), ("c", "other"), ("only",)]
    assert [entry.metadata for entry in entries] == [{}] * 3


def test_columns_that_only_some_parts_have(tmp_path: Path) -> None:
    """As pandas writes them: whole numbers with gaps are floats, and a column of gaps has no type."""
    gaps = pa.array([None, None], pa.null())
    write_part(tmp_path, "0", some(2), image_path=["a", "b"], caption=["x", "y"], n=[1, 2], error=gaps, mixed=[1, 2])
    write_part(
        tmp_path, "1", some(2), image_path=["c", "d"], caption=["x", "y"], n=[1.5, None], error=["late", None],
        mixed=["x", "y"], late=[True, None], tags=[["p"], ["q"]], when=pa.array([0, 1], pa.timestamp("s")),
        inner=[{"a": 1}, None], pairs=pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    )  # fmt: skip
    assert read_vectors(tmp_path).types == {
        "n": pa.float64(), "error": pa.string(), "mixed": pa.string(), "late": pa.bool_(),
        "tags": pa.list_(pa.string()), "when": pa.string(), "inner": pa.struct({"a": pa.int64()}),
        "pairs": None,
    }  # fmt: skip


def test_parts_that_are_not_whole(tmp_path: Path) -> None:
    write_part(tmp_path, "0", some(3), image_path=["a", "b", "c"])
    write_part(tmp_path, "1", some(3), image_path=["a", "b"])
    with pytest.raises(PairsError, match=r"img_emb_1\.npy has 3 vectors, but .*metadata_1\.parquet has 2 rows"):
        read_vectors(tmp_path)
    write_part(tmp_path, "1", some(2, width=5), image_path=["a", "b"])
    with pytest.raises(PairsError, match=r"img_emb_1\.npy has vectors 5 wide, but those of .*img_emb_0\.npy are 4"):
        read_vectors(tmp_path)
    (tmp_path / "img_emb" / "img_emb_1.npy").unlink()
    with pytest.raises(PairsError, match="not whole: part 1 is in metadata/ but not in img_emb/"):
        read_vectors(tmp_path)
    write_part(tmp_path, "01", some(2), image_path=["a", "b"])
    np.save(tmp_path / "img_emb" / "img_emb_1.npy", some(2))
    with pytest.raises(PairsError, match="have one number"):
        read_vectors(tmp_path)


def test_folder_without_parts(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    with pytest.raises(PairsError, match=r"holds no img_emb/img_emb_0\.npy"):
        read_vectors(tmp_path)


# single arrays


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_array_alone(tmp_path: Path, kind: Any) -> None:
    made = some(7, kind=kind)
    for order in (made, np.asfortranarray(made)):
        np.save(tmp_path / "a.npy", order)
        opened = read_vectors(tmp_path / "a.npy")
        values, entries = read(opened)
        assert (opened.count, opened.width, values.dtype) == (7, 4, made.dtype.newbyteorder("="))
        assert np.array_equal(values, made)
        assert entries == [Entry("", (), {})] * 7


@pytest.mark.usefixtures("small_blocks")
def test_array_with_pairs(tmp_path: Path) -> None:
    made = some(7)
    np.save(tmp_path / "a.npy", made)
    (tmp_path / "pairs.csv").write_text("path,caption,n\n" + "".join(f"{i}.png,text {i},{i}\n" for i in range(7)))
    _, entries = read(read_vectors(tmp_path / "a.npy", pairs=tmp_path / "pairs.csv"))
    assert entries[5] == Entry(str(tmp_path / "5.png"), ("text 5",), {"n": "5"})
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"caption": f"t{i}", "n": i}) + "\n" for i in range(7)))
    _, entries = read(read_vectors(tmp_path / "a.npy", pairs=tmp_path / "texts.jsonl"))
    assert entries[5] == Entry("", ("t5",), {"n": 5})
    parquet.write_table(pa.table({"says": [f"t{i}" for i in range(7)]}), tmp_path / "texts.parquet")
    _, entries = read(read_vectors(tmp_path / "a.npy", pairs=tmp_path / "texts.parquet", text_column="says"))
    assert entries[6] == Entry("", ("t6",), {})


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [5, 6, 8, 10])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])  # whose rows are counted beforehand, and are not
def test_pairs_that_do_not_match(tmp_path: Path, rows: int, suffix: str) -> None:
    np.save(tmp_path / "a.npy", some(7))
    (tmp_path / f"texts.{suffix}").write_text("".join(json.dumps({"caption": f"t{i}"}) + "\n" for i in range(rows)))
    with pytest.raises(PairsError, match=r"a\.npy has 7 vectors, but .* has (\d+|more) rows"):
        read(read_vectors(tmp_path / "a.npy", pairs=tmp_path / f"texts.{suffix}"))


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", some(3))
    (tmp_path / "texts.jsonl").write_text('{"caption": "a"}\n{\n{"caption": "c"}\n')
    with pytest.raises(PairsError, match=r"has 3 vectors, but .* has 2 rows; texts\.jsonl, line 2: this is not JSON"):
        read_vectors(tmp_path / "a.npy", pairs=tmp_path / "texts.jsonl")


class Trap:
    """What runs code where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("place", ["alone", "part"])
def test_nothing_is_unpickled(tmp_path: Path, place: str) -> None:
    file = tmp_path / "a.npy"
    if place == "part":
        write_part(tmp_path, "0", some(1), image_path=["x"])
        file = tmp_path / "img_emb" / "img_emb_0.npy"
    source = file if place == "alone" else tmp_path
    sprung = tmp_path / "sprung"
    np.save(file, np.array([[Trap(sprung)]], dtype=object), allow_pickle=True)
    with pytest.raises(PairsError, match=r"\.npy cannot be read: .*Python objects"):
        read_vectors(source)
    file.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(PairsError, match=r"\.npy cannot be read"):
        read_vectors(source)
    with file.open("wb") as archive:
        np.savez(archive, a=some(1))
    with pytest.raises(PairsError, match=r"\.npy cannot be read"):
        read_vectors(source)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(4, np.float32), np.zeros((2, 2, 2), np.float32), np.zeros((2, 0), np.float32),
        np.zeros((2, 2), np.int8), np.zeros((2, 2), np.complex64), np.zeros((2, 2), "V2"), np.array([["a"]]),
        np.zeros((2, 2), np.longdouble), np.zeros((2, 2), [("a", np.float32)]),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)  # fmt: skip
def test_arrays_that_are_no_vectors(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(PairsError, match=r"a\.npy has shape .* expected \(number, width\) of float16, 32 or 64"):
        read_vectors(tmp_path / "a.npy")


def damage() -> st.SearchStrategy[bytes]:
    whole = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (7, 5), }"
    whole = whole.ljust(127) + b"\n" + some(7, 5).tobytes()
    edits = st.lists(st.tuples(st.integers(0, 127), st.sampled_from(b"(){}[]'\",:0789-<>fO \n\\#\0\xff")), max_size=4)
    return st.builds(lambda changes, end: _edited(whole, changes)[:end], edits, st.integers(0, len(whole)))


def _edited(whole: bytes, changes: list[tuple[int, int]]) -> bytes:
    edited = bytearray(whole)
    for place, byte in changes:
        edited[place] = byte
    return bytes(edited)


@given(damage())
def test_damaged_arrays_are_our_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.npy"
    file.write_bytes(content)
    with suppress(PairsError):
        assert read(read_vectors(file))[0].ndim == 2


# Parquet


def vector_column(vectors: np.ndarray, kind: str) -> pa.Array:
    flat = pa.array(vectors.ravel())
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.array(list(vectors), {"list": pa.list_, "large": pa.large_list}[kind](flat.type))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
@pytest.mark.parametrize("numbers", [np.float16, np.float32, np.float64])
def test_parquet_file(tmp_path: Path, kind: str, numbers: Any) -> None:
    made = some(8, kind=numbers)
    table = {
        "url": [f"https://example.org/{i}" for i in range(8)], "image_path": [f"{i}.png" for i in range(8)],
        "caption": [f"text {i}" for i in range(8)], "bytes": [b"left out"] * 8,
    }  # fmt: skip
    parquet.write_table(pa.table(table | {"emb": vector_column(made, kind)}), tmp_path / "a.parquet", row_group_size=5)
    opened = read_vectors(tmp_path / "a.parquet")
    values, entries = read(opened)
    assert (opened.count, opened.width) == (8, 4)
    assert np.array_equal(values, made)
    assert entries[6] == Entry("6.png", ("text 6",), {"url": "https://example.org/6"})
    by_url = read(read_vectors(tmp_path / "a.parquet", image_column="url"))[1]
    assert by_url[6].path == "https://example.org/6"


@pytest.mark.usefixtures("small_blocks")
def test_folder_of_parquet(tmp_path: Path) -> None:
    made = {number: some(4, seed=number) for number in (2, 10, 1)}
    for number, vectors in made.items():
        parquet.write_table(
            pa.table({"text": ["x"] * 4, "embedding": vector_column(vectors, "list")}), tmp_path / f"p-{number}.parquet"
        )
    values, _ = read(read_vectors(tmp_path))
    assert np.array_equal(values, np.concatenate([made[number] for number in (1, 2, 10)]))
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "p-11.parquet")
    with pytest.raises(PairsError, match=r"p-11\.parquet has no vectors in column 'embedding'"):
        read_vectors(tmp_path)


def test_images_beside_the_vectors_are_not_read(tmp_path: Path) -> None:
    """As `datasets` stores them; the path is kept."""
    images = [{"bytes": b"x" * 100, "path": f"{i}.png"} for i in range(2)]
    parquet.write_table(
        pa.table({"image": images, "image.alt": ["a", "b"], "v": vector_column(some(2), "fixed")}),
        tmp_path / "a.parquet",
    )
    opened = read_vectors(tmp_path / "a.parquet")
    assert read(opened)[1] == [Entry(f"{i}.png", (), {"image.alt": alt}) for i, alt in enumerate("ab")]
    assert opened.types == {"image.alt": pa.string()}


def test_gaps_are_nan(tmp_path: Path) -> None:
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2)):
        cells = pa.array([None, [1.0, 2.0], [3.0, None], None], kind)
        parquet.write_table(pa.table({"vector": cells}), tmp_path / "a.parquet")
        [(values, without, _)] = read_vectors(tmp_path / "a.parquet")
        assert np.array_equal(values, [[np.nan] * 2, [1, 2], [3, np.nan], [np.nan] * 2], equal_nan=True)
        assert without == {0: "no vector", 3: "no vector"}


def test_which_column_holds_the_vectors(tmp_path: Path) -> None:
    image, text = vector_column(some(2, seed=1), "fixed"), vector_column(some(2, seed=2), "fixed")
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text_embedding": text, "Image_Embedding": image}), file)
    assert np.array_equal(read(read_vectors(file))[0], some(2, seed=1))
    assert np.array_equal(read(read_vectors(file, vector_column="text_embedding"))[0], some(2, seed=2))
    parquet.write_table(pa.table({"a": text, "b": image, "n": [1, 2]}), file)
    with pytest.raises(PairsError, match=r"2 columns that may be .*: a, b; .*--vector-column"):
        read_vectors(file)
    for wanted, what in (("n", "is int64"), ("c", "is not there")):
        with pytest.raises(UsageError, match=f"column '{wanted}' of .* {what}; its columns of vectors: a, b"):
            read_vectors(file, vector_column=wanted)
    parquet.write_table(pa.table({"n": [1, 2]}), file)
    with pytest.raises(PairsError, match="has no columns that may be the images' vectors: n"):
        read_vectors(file)


def test_widths_that_differ(tmp_path: Path) -> None:
    cells = pa.array([[], [1.0, 2.0], [1.0, 2.0, 3.0], [3.0, 4.0], [5.0]])
    parquet.write_table(pa.table({"vector": cells}), tmp_path / "a.parquet")
    [(values, without, _)] = read_vectors(tmp_path / "a.parquet")
    none = [np.nan] * 2
    assert np.array_equal(values, [none, [1, 2], none, [3, 4], none], equal_nan=True)
    differ = {place: f"the vector is {width} wide; the first is 2 wide" for place, width in ((2, 3), (4, 1))}
    assert without == {0: "no vector"} | differ


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(PairsError, match=r"a\.parquet cannot be read"):
        read_vectors(file)
    parquet.write_table(pa.table({"vector": pa.array([], pa.list_(pa.float32()))}), file)
    with pytest.raises(PairsError, match="holds no vectors"):
        read_vectors(file)
    parquet.write_table(pa.table([vector_column(some(1), "list"), pa.array(["a"]), pa.array(["b"])], list("vcc")), file)
    with pytest.raises(PairsError, match="two columns named c"):
        read_vectors(file)


# tables of Lance and LanceDB


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["fixed", "list"])
@pytest.mark.parametrize("numbers", [np.float16, np.float32, np.float64])
def test_lance_table(tmp_path: Path, kind: str, numbers: Any) -> None:
    """Deleted rows are gone, images are not read, and a commit after the table was opened changes nothing."""
    made = some(8, kind=numbers)
    images = [{"bytes": b"x" * 100, "path": f"{i}.png"} for i in range(8)]
    table = pa.table(
        {"vector": vector_column(made, kind), "id": range(8), "Image": images, "text": [f"text {i}" for i in range(8)],
         "Länge in cm": [i / 2 for i in range(8)], "blob": [b"left out"] * 8}
    )  # fmt: skip
    folder = tmp_path / "db" / "photos.lance"
    lance.write_dataset(table, folder, max_rows_per_file=5)
    lance.dataset(folder).delete("id = 2")
    opened = read_vectors(folder)
    lance.write_dataset(table, folder, mode="append")
    kept = np.delete(np.arange(8), 2)
    for _ in range(2):
        values, entries = read(opened)
        assert (opened.count, opened.width, values.dtype) == (7, 4, made.dtype)
        assert np.array_equal(values, made[kept])
        assert entries == [Entry(f"{i}.png", (f"text {i}",), {"id": i, "Länge in cm": i / 2}) for i in kept]
    with pytest.raises(PairsError, match=r"is a folder of Lance tables; name one of them: .*photos\.lance"):
        read_vectors(folder.parent)
    with pytest.raises(UsageError, match=r"column 'text' of .* is string; its columns of vectors: vector"):
        read_vectors(folder, vector_column="text")


def test_lance_table_that_is_damaged(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"vector": vector_column(some(8), "fixed")}), tmp_path / "a.lance")
    opened = read_vectors(tmp_path / "a.lance")
    [data] = (tmp_path / "a.lance" / "data").iterdir()
    data.write_bytes(data.read_bytes()[:50])
    with pytest.raises(PairsError, match=r"a\.lance cannot be read"):
        read(opened)
    for manifest in (tmp_path / "a.lance" / "_versions").iterdir():
        manifest.write_bytes(b"")
    with pytest.raises(PairsError, match=r"a\.lance cannot be read"):
        read_vectors(tmp_path / "a.lance")


# what is asked for


@pytest.mark.parametrize("name", ["none", "none.npy", "a.npz", "empty", "owner/name"])
def test_no_vectors(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "a.npz", a=some(2))
    with pytest.raises(PairsError, match=r"holds no vectors; expected a folder with img_emb/img_emb_0\.npy"):
        read_vectors(tmp_path / name)


def test_options_for_other_sources(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", some(2))
    parquet.write_table(pa.table({"v": vector_column(some(2), "fixed")}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"--pairs is for a \.npy"):
        read_vectors(tmp_path / "a.parquet", pairs="x.csv")
    with pytest.raises(UsageError, match="--vector-column is for Parquet"):
        read_vectors(tmp_path / "a.npy", vector_column="v")
    with pytest.raises(UsageError, match=r"has no columns; .*--pairs"):
        read_vectors(tmp_path / "a.npy", text_column="caption")
    with pytest.raises(UsageError, match="has no column 'caption'"):
        read_vectors(tmp_path / "a.parquet", text_column="caption")
