from __future__ import annotations

import json
import os
import random
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import StoreError, UsageError
from lamplit.store.lance_store import Store, as_store
from lamplit.store.table import table_writing
from lamplit.store.table.rows import Row, metadata_name
from lamplit.store.table.store_metadata import FORMAT
from lamplit.towers.identity import TowerIdentity

WIDTH = 6
HALF = (0.5, 0.5, 0.5)
TOWER = TowerIdentity("timm:tower", "f" * 32, WIDTH, Preprocessing((32, 32), HALF, HALF), {"library": "timm"})


def vector(seed: int) -> Tensor:
    return F.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


def row(id: str, seed: int | None = 0, texts: Sequence[str] = ("text",), **metadata: Any) -> Row:
    return Row(id, f"{id}.png", f"hash {seed}", texts, None if seed is None else vector(seed), metadata)


def create(path: Path, rows: Sequence[Row], columns: Sequence[str] = (), **options: Any) -> Store:
    return Store.create(path, TOWER, rows, backend="torch", metadata_columns=columns, **options)


def stored(seeds: Sequence[int]) -> Tensor:
    """What fp16 leaves of the vectors."""
    return F.normalize(torch.stack([vector(seed) for seed in seeds]).half().float(), dim=-1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pairs.lance"


def test_round_trip(path: Path) -> None:
    made = create(path, [row("b", 1, ["one", "two"], shape="ring"), row("a", 2, [], shape=None)], ["shape"])
    for store in (made, Store(path), Store(str(path))):
        assert len(store) == 2
        assert store.tower == TOWER
        assert store.backend == "torch"
        assert not store.centered
        assert store.center is None
        assert store.metadata_columns == ["shape"]
        assert store.column("id") == ["a", "b"]
        assert store.column("path") == ["a.png", "b.png"]
        assert store.column("shape") == [None, "ring"]
        assert store.texts() == [[], ["one", "two"]]
        assert store.rows() == store.rows([0, 1])
        assert [(row["id"], row["hash"], row["texts"], row["shape"]) for row in store.rows()] == [
            ("a", "hash 2", [], None),
            ("b", "hash 1", ["one", "two"], "ring"),
        ]
        assert torch.equal(store.vectors(), stored([2, 1]))


def test_vectors_are_unit_after_half_precision(path: Path) -> None:
    store = create(path, [row(str(i), i) for i in range(50)])
    assert store.vectors().dtype == torch.float32
    assert (store.vectors().norm(dim=-1) - 1).abs().max() < 1e-6
    center = torch.full((WIDTH,), 0.1)
    centered = store.vectors(center)
    assert torch.allclose(centered, F.normalize(store.vectors() - center, dim=-1))


def test_vectors_are_kept_in_half_precision_beside_what_they_belong_to(path: Path) -> None:
    create(path, [row("a", 1)])
    schema = lance.dataset(str(path)).schema
    assert schema.field("vector").type == pa.list_(pa.float16(), WIDTH)
    assert schema.names == ["id", "path", "hash", "texts", "vector"]


def test_rows_come_in_the_order_of_their_ids(path: Path) -> None:
    numbers = list(range(40))
    random.Random(0).shuffle(numbers)
    store = create(path, [row(f"{i:03}", i) for i in numbers[:10]])
    for start in range(10, 40, 7):
        store.append([row(f"{i:03}", i) for i in numbers[start : start + 7]])
    for each in (store, Store(path)):
        assert each.column("id") == [f"{i:03}" for i in range(40)]
        assert torch.equal(each.vectors(), stored(range(40)))
        assert [found["id"] for found in each.rows([39, 0, 7, 7])] == ["039", "000", "007", "007"]


def test_rows(path: Path) -> None:
    store = create(path, [row("b", 1, ["one"], n=1), row("a", 2, ["two"], n=2)], ["n"])
    assert store.rows([1]) == [{"id": "b", "path": "b.png", "hash": "hash 1", "texts": ["one"], "n": 1}]
    assert store.rows([]) == []
    store.append([row("aa", 3, ["three"], n=3)])
    assert [found["id"] for found in store.rows([0, 1, 2])] == ["a", "aa", "b"]


def test_replace(path: Path) -> None:
    store = create(path, [row(id, i, ["old"], n=i) for i, id in enumerate("abcd")], ["n"])
    store.replace([row("b", 11, ["new"], n=11), row("d", None, ["newer"], n=13)])
    for each in (store, Store(path)):
        assert len(each) == 4
        assert torch.equal(each.vectors(), stored([0, 11, 2, 3]))  # d keeps its vector
        assert each.texts() == [["old"], ["new"], ["old"], ["newer"]]
        assert each.column("n") == [0, 11, 2, 13]
        assert each.column("hash") == ["hash 0", "hash 11", "hash 2", "hash None"]
        assert [found["n"] for found in each.rows([3, 1])] == [13, 11]
    store.replace([])
    store.append([])
    assert len(store) == 4


def test_rows_with_and_without_a_vector_are_one_commit(path: Path) -> None:
    """A process that ends between two commits would leave half of them."""
    store = create(path, [row("a", 1), row("b", 2), row("c", 3)])
    before = lance.dataset(str(path)).version
    store.replace([row("a", 11, ["new"]), row("c", None, ["newer"])])
    assert lance.dataset(str(path)).version == before + 1
    assert store.texts() == [["new"], ["text"], ["newer"]]
    assert torch.equal(store.vectors(), stored([11, 2, 3]))


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=6), max_size=5))
@settings(max_examples=15)
def test_any_sequence_of_writes_is_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, writes: list[list[tuple[str, int]]]
) -> None:
    store = create(tmp_path_factory.mktemp("store") / "any.lance", [row("a", 0)])
    expected = {"a": 0}
    for write in writes:
        batch = dict(write)
        store.replace([row(id, seed) for id, seed in batch.items() if id in expected])
        store.append([row(id, seed) for id, seed in batch.items() if id not in expected])
        expected |= batch
    assert store.column("id") == sorted(expected)
    assert torch.equal(store.vectors(), stored([expected[id] for id in sorted(expected)]))
    store.finish()
    assert torch.equal(store.vectors(), stored([expected[id] for id in sorted(expected)]))
    assert [found["id"] for found in store.rows(range(len(expected)))] == sorted(expected)


# metadata


def test_metadata_keeps_its_types(path: Path) -> None:
    values = {"text": "x", "number": 3, "part": 0.5, "flag": True, "names": ["a", "b"], "nested": {"a": 1}}
    store = create(path, [row("a", 1, **values)], list(values))
    store.append([row("b", 2, **values), row("c", 3)])
    for name, value in values.items():
        assert store.column(name) == [value, value, None]


def test_column_that_is_null_first_and_text_later(path: Path) -> None:
    store = create(path, [row("a", 1, note=None)], ["note"])
    store.append([row("b", 2, note="seen"), row("c", 3, note=7)])
    assert store.column("note") == [None, "seen", "7"]


def test_numbers_with_a_stray_text(path: Path) -> None:
    store = create(path, [row("a", 1, year=1999)], ["year"])
    store.append([row("b", 2, year="unknown"), row("c", 3, year=2001), row("d", 4, year=[1])])
    assert store.column("year") == ["1999", "unknown", "2001", "[1]"]


def test_whole_numbers_first_and_fractions_later(path: Path) -> None:
    store = create(path, [row("a", 1, price=100)], ["price"])
    store.append([row("b", 2, price=100.5)])
    assert store.column("price") == [100.0, 100.5]
    assert store.column_types["price"] == pa.float64()
    store.append([row("c", 3, price=2**60)])  # which no float holds beside fractions, as far as anyone can tell
    assert store.column("price") == ["100", "100.5", str(2**60)]


def test_nothing_first_and_numbers_later(path: Path) -> None:
    store = create(path, [row("a", 1, year=None)], ["year"])
    store.append([row("b", 2, year=2019)])
    assert store.column("year") == [None, 2019]
    assert store.where("year > 2000").tolist() == [False, True]


def test_fields_and_items_that_come_later(path: Path) -> None:
    store = create(path, [row("a", 1, box={"x": 1}, tags=[1])], ["box", "tags"])
    store.append([row("b", 2, box={"x": 2, "label": "dog"}, tags=["x"])])
    assert store.column("box") == [{"x": 1, "label": None}, {"x": 2, "label": "dog"}]
    assert store.column("tags") == [["1"], ["x"]]


def test_types_of_other_software_stay(path: Path) -> None:
    store = create(path, [row("a", 1)])
    lance.dataset(str(path)).add_columns(pa.field("seen", pa.timestamp("us")))
    store.append([row("b", 2, seen="yesterday")])
    assert store.column("seen") == [None, None]
    assert store.column_types == {"seen": pa.timestamp("us")}


def test_widening_that_was_killed_is_finished(path: Path) -> None:
    """After the change of names, a value that another process wrote before it is still in the old column."""
    store = create(path, [row("a", 1, n=1), row("b", 2, n=2)], ["n"])
    table = lance.dataset(str(path))
    table.add_columns({"n~lamplit_wider": "CAST(NULLIF(n, 2) AS double)"})
    table.alter_columns({"path": "n", "name": "n~lamplit_narrower"}, {"path": "n~lamplit_wider", "name": "n"})
    store = Store(path)
    assert store.metadata_columns == ["n"]
    assert set(store.rows()[0]) == {"id", "path", "hash", "texts", "n"}
    store.append([row("c", 3, n=3.5)])
    assert store.column("n") == [1.0, 2.0, 3.5]
    assert lance.dataset(str(path)).schema.names == ["id", "path", "hash", "texts", "vector", "n"]


def write_without_vector(path: Path) -> None:
    """Make a store as an earlier lamplit made it, into which other software wrote a row without a vector."""
    create(path, [row("a", 1), row("b", 2)])
    lance.dataset(str(path)).alter_columns({"path": "vector", "nullable": True})
    lance.write_dataset(pa.table({"id": ["c"], "path": ["c"], "hash": ["h"], "texts": [["x"]]}), path, mode="append")


def test_no_other_software_writes_rows_without_a_vector(path: Path) -> None:
    create(path, [row("a", 1), row("b", 2)])
    vectors = pa.array([None, [1, 0, 0, 0, 0, 0]], pa.list_(pa.float16(), WIDTH))
    columns = {"id": ["a", "c"], "path": ["a", "c"], "hash": ["g", "h"], "texts": [["x"], []]}
    some = pa.table({**columns, "vector": vectors})
    for change in (
        lambda: lance.write_dataset(some, path, mode="append"),
        lambda: lance.dataset(str(path)).merge_insert("id").when_not_matched_insert_all().execute(some.select(["id"])),
        lambda: lance.dataset(str(path)).merge_insert("id").when_matched_update_all().execute(some),
    ):
        with pytest.raises(OSError, match=r"vector.* non-null"):
            change()
    assert Store(path).rows() == create(path.with_name("same.lance"), [row("a", 1), row("b", 2)]).rows()


def test_rows_without_a_vector_of_an_older_store_are_deleted(path: Path) -> None:
    write_without_vector(path)
    store = Store(path)
    assert store.prepare_to_write() == [f"1 rows of {path} had no vector, left by other software; they are deleted"]
    assert store.prepare_to_write() == []
    assert torch.equal(store.vectors(), stored([1, 2]))
    assert not lance.dataset(str(path)).schema.field("vector").nullable


def test_rows_without_a_vector_are_named(path: Path) -> None:
    write_without_vector(path)
    store = Store(path)
    for read in (store.vectors, lambda: list(store.blocks()), lambda: store.vectors_at([2])):
        with pytest.raises(StoreError, match=r"has rows without a vector.*delete\('vector IS NULL'\)"):
            read()
    lance.dataset(str(path)).delete("vector IS NULL")
    assert torch.equal(Store(path).vectors(), stored([1, 2]))


def test_halves_of_characters(path: Path) -> None:
    store = create(path, [row("a\udcff", 1, ["half \ud83d"], note="x\ud83d")], ["note"])
    store.append([row("b", 2, ["more"], note=["\ud83d"])])
    assert store.column("id") == ["a\\xff", "b"]
    assert store.texts() == [["half \ufffd"], ["more"]]
    assert store.column("note") == ["x\ufffd", '["\ufffd"]']


def test_types_that_differ_within_the_first_rows(path: Path) -> None:
    values = [1, "two", None, 2.5]
    store = create(path, [row(id, 1, mixed=value) for id, value in zip("abcd", values, strict=True)], ["mixed"])
    assert store.column("mixed") == ["1", "two", None, "2.5"]


def test_lists_of_different_things_within_the_first_rows(path: Path) -> None:
    store = create(path, [row("a", 1, tags=["x"]), row("b", 2, tags="y"), row("c", 3, tags={"z": 1})], ["tags"])
    assert all(isinstance(value, str) for value in store.column("tags"))


def test_empty_list_first(path: Path) -> None:
    store = create(path, [row("a", 1, tags=[])], ["tags"])
    store.append([row("b", 2, tags=["x"])])
    assert store.column("tags") == [[], ["x"]]


def test_columns_that_came_later(path: Path) -> None:
    store = create(path, [row("a", 1, old=1)], ["old"])
    store.append([row("b", 2, old=2, new=3)])
    assert store.metadata_columns == ["old", "new"]
    assert store.column("old") == [1, 2]
    assert store.column("new") == [None, 3]


def test_huge_integers(path: Path) -> None:
    store = create(path, [row("a", 1, n=10**30)], ["n"])
    assert store.column("n") == [str(10**30)]
    other = create(path.with_name("b.lance"), [row("a", 1, n=1)], ["n"])
    other.append([row("b", 2, n=10**30)])
    assert other.column("n") == ["1", str(10**30)]


@pytest.mark.parametrize(
    "name", ["id", "path", "hash", "texts", "vector", "", "a.b", "a`b", "\0", "_rowid", "_rowaddr", "ünï"]
)
def test_any_name_of_a_metadata_column(path: Path, name: str) -> None:
    named = metadata_name(name)
    assert (named == name) == (name == "ünï")
    store = create(path, [row("a", 1, **{named: "theirs"}, n=1)], [named, "n"])
    store.append([row("b", 2, **{named: "too"})])
    store.replace([row("a", None, **{named: "new"})])
    assert store.column(named) == ["new", "too"]
    assert store.column("id") == ["a", "b"]
    assert torch.equal(store.vectors(), stored([1, 2]))


def test_texts_of_metadata_columns(path: Path) -> None:
    metadata = [
        {"german": " rot ", "many": ["eins", "", " zwei"], "n": 1},
        {"german": None, "many": None, "n": 2},
        {"german": "", "many": [], "n": 3},
    ]
    rows = [row(id, 1, **values) for id, values in zip("abc", metadata, strict=True)]
    store = create(path, rows, ["german", "many", "n"])
    assert store.texts("german") == [["rot"], [], []]
    assert store.texts("many") == [["eins", "zwei"], [], []]
    with pytest.raises(StoreError, match="'n' .* holds no text: 1"):  # noqa: RUF043
        store.texts("n")


def test_unknown_column_lists_the_columns(path: Path) -> None:
    store = create(path, [row("a", 1, shape="ring")], ["shape"])
    with pytest.raises(StoreError, match="no column 'german'; it has: id, path, hash, texts, shape"):
        store.texts("german")


# what is no store


def test_nothing_there(path: Path) -> None:
    assert not Store.exists(path)
    with pytest.raises(StoreError, match=f"no store at {path}.*lamplit embed SOURCE --image-tower TOWER --out {path}"):
        Store(path)
    with pytest.raises(UsageError, match="the store is None; expected its path"):
        as_store(None)  # type: ignore[arg-type]


def test_model_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=f"{tmp_path} is a model, not a store; the order is MODEL STORE"):
        Store(tmp_path)


def test_pairs_are_no_store(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "2024").mkdir(parents=True)
    (folder / "2024" / "owl.JPG").touch()
    for name in ("shards/00.tgz", "tables/a.parquet"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/photos").symlink_to(folder)
    suffixes = (
        ".csv",
        ".tsv",
        ".jsonl",
        ".json",
        ".parquet",
        ".arrow",
        ".csv.gz",
        ".tar",
        ".tar.gz",
        ".tgz",
        ".tar.xz",
    )
    files = [tmp_path / f"pairs{suffix}" for suffix in suffixes]
    for source in (folder, tmp_path / "shards", tmp_path / "tables", tmp_path / "linked", *files):
        if source in files:
            source.touch()
        command = f"lamplit embed {source} --image-tower TOWER --out pairs.lance"
        with pytest.raises(StoreError, match=f"{source} holds pairs, not a store; embed it first: {command}"):
            Store(source)


def test_something_else_there(path: Path) -> None:
    path.write_text("hello")
    assert not Store.exists(path)
    with pytest.raises(StoreError, match="no store at"):
        Store(path)
    path.unlink()
    path.mkdir()
    (path / "file").write_text("hello")
    (path / ".thumbnails").mkdir()
    (path / ".thumbnails/owl.jpg").touch()
    assert not Store.exists(path)
    with pytest.raises(StoreError, match="no store at"):
        Store(path)


def test_a_lance_table_of_someone_else(path: Path) -> None:
    lance.write_dataset(pa.table({"id": ["a"]}), str(path))
    with pytest.raises(StoreError, match="not one that lamplit made"):
        Store(path)


def test_format_of_the_future(path: Path) -> None:
    create(path, [row("a", 1)])
    table = lance.dataset(str(path))
    values = json.loads(table.schema.metadata[b"lamplit"]) | {"format": FORMAT + 1}
    table.update_schema_metadata({"lamplit": json.dumps(values)})
    with pytest.raises(StoreError, match=f"has format {FORMAT + 1}; this lamplit reads up to {FORMAT}"):
        Store(path)


def test_another_tower_is_refused(path: Path) -> None:
    store = create(path, [row("a", 1)])
    store.require_tower(TOWER)
    other = TowerIdentity("timm:other", "0" * 32, WIDTH, TOWER.preprocessing, {})
    with pytest.raises(StoreError) as caught:
        store.require_tower(other)
    message = str(caught.value)
    for part in (
        TOWER.fingerprint,
        other.fingerprint,
        TOWER.spec,
        other.spec,
        "lamplit embed",
        "--image-tower timm:other",
    ):
        assert part in message


# centre


def test_center_is_computed_once(path: Path) -> None:
    store = create(path, [row(str(i), i) for i in range(8)], centered=True)
    assert store.centered
    assert store.center is None
    store.finish()
    expected = stored(range(8)).mean(0)
    assert store.center is not None
    assert torch.allclose(store.center, expected)

    store = Store(path)
    store.append([row("x", 99), row("y", 98)])
    store.finish()

    again = Store(path)
    assert again.centered
    assert again.center is not None
    assert torch.allclose(again.center, expected)
    assert len(again) == 10


def test_store_that_is_not_centered_has_no_center(path: Path) -> None:
    store = create(path, [row("a", 1)])
    store.finish()
    assert Store(path).center is None


def test_finish_merges_fragments_and_changes_nothing(path: Path) -> None:
    store = create(path, [row("00", 0)])
    for i in range(1, 18):
        store.append([row(f"{i:02}", i)])
    before = store.rows(range(18))
    store.finish()
    assert len(lance.dataset(str(path)).get_fragments()) == 1
    assert store.rows(range(18)) == before
    assert torch.equal(store.vectors(), stored(range(18)))
    store.append([row("18", 18)])
    store.finish()  # one small fragment is no reason to write all anew
    assert len(lance.dataset(str(path)).get_fragments()) == 2


def test_large_fragments_of_a_large_table_stay(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write hundreds of gigabytes anew, beside the old ones, would gain nothing for who scans them."""
    monkeypatch.setattr(table_writing, "_MOST_FRAGMENTS", 3)
    monkeypatch.setattr(table_writing, "_LARGE_TABLE", 20)
    store = create(path, [row(f"{0:03}-{i}", i) for i in range(4)])
    for number in range(1, 6):
        store.append([row(f"{number:03}-{i}", i) for i in range(4)])
    monkeypatch.setattr(table_writing, "_LARGE_FRAGMENT", 4)
    store.finish()
    assert len(lance.dataset(str(path)).get_fragments()) == 6
    monkeypatch.setattr(table_writing, "_LARGE_FRAGMENT", 5)
    store.finish()
    assert len(lance.dataset(str(path)).get_fragments()) == 1
    assert len(store) == 24


def test_many_fragments_and_deletions(path: Path) -> None:
    """`rows` finds its rows by place, also after replaced rows have moved to the table's end."""
    store = create(path, [row(f"{i:02}", i, n=i) for i in range(10)], ["n"])
    store.replace([row("03", 33, n=33)])
    store.append([row("10", 10, n=10)])
    store.replace([row("00", 30, n=30), row("10", None, n=40)])
    numbers = [30, 1, 2, 33, 4, 5, 6, 7, 8, 9, 40]
    assert [found["n"] for found in store.rows(range(11))] == numbers
    assert store.column("n") == numbers
    assert torch.equal(store.vectors(), stored([30, 1, 2, 33, 4, 5, 6, 7, 8, 9, 10]))


def test_store_opens_with_pyarrow_and_survives_a_copy(path: Path, tmp_path: Path) -> None:
    create(path, [row("a", 1), row("b", 2)])
    shutil.copytree(path, tmp_path / "copy.lance")
    assert torch.equal(Store(tmp_path / "copy.lance").vectors(), stored([1, 2]))


def test_repr_is_a_line(path: Path) -> None:
    assert repr(create(path, [row("a"), row("b")])) == f"<Store {path.name}: 2 × {TOWER.width} by {TOWER.spec}>"


def test_order_from_a_file(path: Path) -> None:
    store = create(path, [row("b", 1), row("a", 2), row("c", 3)])
    kept, digest = store.order.copy(), store.version_digest
    other = Store(path)
    other.use_order(kept)
    assert [found["id"] for found in other.rows([0, 1, 2])] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="order of 3 rows"):
        other.use_order(kept[:2])
    other.append([row("0", 4)])  # which forgets the old order
    assert [found["id"] for found in other.rows([0, 1, 2, 3])] == ["0", "a", "b", "c"]
    assert other.version_digest != digest


def change_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = lance.dataset(str(path))
    values = json.loads(table.schema.metadata[b"lamplit"])
    change(values)
    table.update_schema_metadata({"lamplit": json.dumps(values)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda values: values.pop("format"), "format is missing"),
        (lambda values: values.pop("tower"), "tower is missing"),
        (lambda values: values.update(tower=[1]), r"tower is \[1\]; expected an object"),
        (lambda values: values["tower"].update(width="4"), "tower.width is '4'"),
        (lambda values: values["tower"].update(spec="half \ud83d"), "tower.spec holds half of a surrogate pair"),
        (lambda values: values["tower"]["preprocessing"].pop("mean"), "tower.preprocessing.mean is missing"),
        (lambda values: values.pop("engine"), "engine is missing"),
        (lambda values: values.update(centered=1), "centered is 1; expected true or false"),
        (lambda values: values.update(center=[1.0]), r"center is \[1.0\]; expected a list of"),
    ],
)
def test_damaged_metadata_names_store_and_key(path: Path, change: Any, told: str) -> None:
    create(path, [row("a")])
    change_metadata(path, change)
    with pytest.raises(StoreError, match=f"the metadata of {path} is damaged: {told}"):
        Store(path)


def test_metadata_that_is_no_json(path: Path) -> None:
    create(path, [row("a")])
    lance.dataset(str(path)).update_schema_metadata({"lamplit": "[" * 100_000})
    with pytest.raises(StoreError, match="is damaged: it is not JSON"):
        Store(path)


def test_width_that_does_not_fit_the_vectors(path: Path) -> None:
    create(path, [row("a")])
    change_metadata(path, lambda values: values["tower"].update(width=TOWER.width + 1))
    with pytest.raises(StoreError, match=f"its vectors are .*, but tower.width is {TOWER.width + 1}"):
        Store(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_full_disk_is_one_sentence_and_loses_nothing(path: Path) -> None:
    import resource

    store = create(path, [row("a", 1)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot be written: a file may not grow further; what was committed"):
            store.append([row("b", 2, [secrets.token_hex(10**6)])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Store(path).column("id") == ["a"]
    store.append([row("b", 2)])
    assert torch.equal(Store(path).vectors(), stored([1, 2]))
