from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lamplit.data.pairs import Pairs
from lamplit.data.sources import read_pairs
from lamplit.data.units import Unit, pairs_of, plan_units
from lamplit.errors import PairsError, UsageError


def write_tar(file: Path, keys: Sequence[str]) -> None:
    with tarfile.open(file, "w") as archive:
        for key in keys:
            for ending, content in (("jpg", b"-" * 600), ("txt", f"text {key}".encode())):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def make_folder(folder: Path) -> Path:
    for number in range(23):
        below = folder / f"{number % 3}"
        below.mkdir(exist_ok=True)
        (below / f"{number}.jpg").write_bytes(b"-")
        (below / f"{number}.txt").write_text(f"text {number}")
    return folder


def make_parquet(folder: Path) -> Path:
    for name, size in (("a", 13), ("b", 0), ("c", 8)):
        table = pa.table(
            {
                "image": [b"%d" % number for number in range(size)],
                "text": [f"{name}{number}" for number in range(size)],
            },
            schema=pa.schema([("image", pa.binary()), ("text", pa.string())]),
        )
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=3)
    return folder


def make_arrow(folder: Path) -> Path:
    table = pa.table({"image": [b"%d" % number for number in range(200)], "text": list(map(str, range(200)))})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, 70)
    return folder / "a.arrow"


def make_tars(folder: Path) -> Path:
    for number in range(5):
        write_tar(folder / f"{number}.tar", [f"{number}{sample:03}" for sample in range(4 + number)])
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:3000])  # cut off
    return folder


def make_csv(folder: Path) -> Path:
    rows = [f"{number % 7}.jpg,text {number},{number}" for number in range(40)]
    rows[11] = "1,2,3,4"  # too many cells
    (folder / "a.csv").write_text("\n".join(["image,text,n", *rows]))
    return folder / "a.csv"


MAKERS = (make_folder, make_parquet, make_arrow, make_tars, make_csv)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Pairs]:
    return [read_pairs(make(tmp_path_factory.mktemp("source"))) for make in MAKERS]


@given(number=st.integers(0, len(MAKERS) - 1), rows=st.integers(1, 250))
def test_units_are_the_source(sources: list[Pairs], number: int, rows: int) -> None:
    pairs = sources[number]
    units = plan_units(pairs, rows=rows)
    assert units == plan_units(pairs, rows=rows)
    assert len({unit.name for unit in units}) == len(units)
    assert all(before.stop == after.start for before, after in pairwise(units))
    assert [pair for unit in units for pair in pairs_of(pairs, unit)] == list(pairs)


names = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)), min_size=1, max_size=30)


@given(names, st.lists(st.integers(0, 29), max_size=4), st.integers(1, 12))
def test_rows_of_one_image_are_in_one_unit(rows: list[tuple[str, int]], bad: list[int], size: int) -> None:
    """Rows of an image lie anywhere; some rows cannot be used, because their texts are numbers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.jsonl")
        cells: list[dict[str, Any]] = [{"image": f"{name}.jpg", "text": f"{text}"} for name, text in rows]
        for place in bad:
            if place < len(cells):
                cells[place]["text"] = {"no": "text"}
        file.write_text("".join(json.dumps(each) + "\n" for each in cells))
        try:
            pairs = read_pairs(file)
        except PairsError:  # no row can be used
            return
        found = [pair for unit in plan_units(pairs, rows=size) for pair in pairs_of(pairs, unit)]
        assert sorted(found, key=repr) == sorted(pairs, key=repr)


def test_size_of_a_unit(tmp_path: Path) -> None:
    pairs = read_pairs(make_folder(tmp_path))
    assert len(plan_units(pairs)) == 1
    for num_rows, expected in ((1000, 1024), (640_000, 10_000), (10**9, 250_000)):
        cut_by: list[int] = []
        parts = replace(pairs.parts, num_rows=num_rows, cuts=lambda rows, cut_by=cut_by: cut_by.append(rows) or [0])  # type: ignore[type-var]
        plan_units(replace(pairs, parts=parts))
        assert cut_by == [expected]


def test_names_tell_what_is_in_a_unit(tmp_path: Path) -> None:
    def units(**options: Any) -> list[Unit]:
        return plan_units(read_pairs(tmp_path, **options), rows=5)

    make_tars(tmp_path)
    before = units()
    assert len(before) > 2
    write_tar(tmp_path / "9.tar", ["x1", "x2"])
    assert [unit.name for unit in units()[: len(before) - 1]] == [unit.name for unit in before[:-1]]
    assert not {unit.name for unit in units(image_column="jpg")} & {unit.name for unit in units()}
    pairs = read_pairs(tmp_path)
    assert plan_units(pairs, salt="another tower", rows=5)[0].name != before[0].name


def test_tars_of_equal_keys_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", ["000", "001"])
    with pytest.raises(PairsError, match=r"a.tar and b.tar both begin with a sample 000: .* embed them in one"):
        plan_units(read_pairs(tmp_path))


def test_a_stream_is_refused(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": b"-", "path": None}, {"bytes": None, "path": "a.jpg"}], "text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="cannot be divided among processes: it is read in one stream"):
        plan_units(read_pairs(tmp_path))


def test_a_damaged_table_moves_no_ids(tmp_path: Path) -> None:
    for name, size in (("a", 12_000), ("b", 20)):
        content = {"image": [b"%d" % each for each in range(size)], "text": [f"{name}{each}" for each in range(size)]}
        parquet.write_table(pa.table(content), tmp_path / f"{name}.parquet", row_group_size=4096)
    ids = {pair.texts: pair.id for pair in read_pairs(tmp_path)}
    written = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged = parquet.read_metadata(tmp_path / "a.parquet").row_group(2).column(0)
    start = damaged.dictionary_page_offset or damaged.data_page_offset
    written[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(written)
    pairs = read_pairs(tmp_path)
    found = list(pairs)
    assert len(found) == 8192 + 20
    assert all(ids[pair.texts] == pair.id for pair in found)
    [problem] = pairs.problems
    assert "a.parquet" in problem.path
    in_units = [pair for unit in plan_units(pairs, rows=1000) for pair in pairs_of(pairs, unit)]
    assert [pair for pair in in_units if int(pair.id) >= 12_000] == found[-20:]
    assert all(ids[pair.texts] == pair.id for pair in in_units)
