from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lamplit.data.skipped import BadRows
from lamplit.data.tables import readers
from lamplit.data.tables.readers import open_table


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\r\n1,2\r\n", [{"a": "1", "b": "2"}]),
        ("\ufeffa,b\n007,NA\n", [{"a": "007", "b": "NA"}]),
        ("a,,b\n1\n", [{"a": "1", "Unnamed: 1": "", "b": ""}]),
        ('a,b\n"x\ny","say ""hi"""\n', [{"a": "x\ny", "b": 'say "hi"'}]),
        ('\na,b\n\n1,2\n  \n"",\n', [{"a": "1", "b": "2"}, {"a": "", "b": ""}]),
        ('a\n""\n', [{"a": ""}]),
        ("", []),
    ],
)
def test_csv_rows(tmp_path: Path, content: str, rows: list[dict[str, str]]) -> None:
    for suffix, text in ((".csv", content), (".tsv", content.replace(",", "\t"))):
        file = write(tmp_path / f"a{suffix}", text)
        assert list(open_table(file).rows()) == rows
        assert open_table(file).count() == len(rows)


@pytest.mark.parametrize(
    ("name", "content", "good", "listed"),
    [
        ("a.csv", "a,b\n1,2,3\n4,5\n", ["4"], "a.csv, line 2: expected 2 cells, as in the header, and found 3"),
        ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', ["1"], "a.csv, line 3: a quote in the row that begins here is never closed"),
        (
            "a.csv",
            "a,b\n1,2\n" + "x" * (2**24 + 1) + ",1\n",
            ["1"],
            "a.csv, line 3: this is not a row (field larger than",
        ),
        ("a.jsonl", '{"a": "1"}\n{"a\n{"a": "2"}', ["1", "2"], "a.jsonl, line 2: this is not JSON (Invalid control"),
        ("a.jsonl", '["a"]\n{"a": "2"}', ["2"], "a.jsonl, line 1: this is a list; expected an object"),
        ("a.jsonl", "[" * 100_000 + '\n{"a": "2"}', ["2"], "a.jsonl, line 1: this is not JSON ("),
    ],
    ids=["too many cells", "open quote", "long cell", "cut line", "list", "deep"],
)
def test_rows_that_cannot_be_read_are_listed_once(
    tmp_path: Path, name: str, content: str, good: list[str], listed: str
) -> None:
    file = write(tmp_path / name, content)
    bad = BadRows(file)
    table = open_table(file, bad=bad)
    assert [row["a"] for row in table.rows()] == list(table.column("a")) == good
    assert table.count() == len(good)
    [problem] = bad.problems
    assert f"{problem.id}: {problem.reason}".startswith(listed)
    assert problem.path == str(file)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_long_cell_costs_nothing(tmp_path: Path, name: str) -> None:
    """Python's reader ends at 131,072 characters, and with it would end the file."""
    comma = "," if name == "a.csv" else "\t"
    long = "x" * 200_000
    file = write(
        tmp_path / name, "\n".join(comma.join(cells) for cells in (("a", "b"), (long, "1"), (f'"{long}"', "2")))
    )
    bad = BadRows(file)
    assert [row["a"] for row in open_table(file, bad=bad).rows()] == [long, long]
    assert bad.problems == []


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two columns have one name: a, a"):
        list(open_table(write(tmp_path / "a.csv", "a,a\n1,2\n")).rows())


def test_parquet_times_have_microseconds(tmp_path: Path) -> None:
    nanoseconds = 1_577_934_245_678_901_234
    times = pa.array([nanoseconds, None], pa.timestamp("ns", "UTC"))
    table = pa.table({"when": times, "nested": pa.array([[{"at": nanoseconds}], None], _nested("ns"))})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = open_table(tmp_path / "a.parquet").rows()
    assert first["when"].isoformat() == "2020-01-02T03:04:05.678901+00:00"
    assert first["nested"][0]["at"].isoformat() == "2020-01-02T03:04:05.678901"
    assert second == {"when": None, "nested": None}


def _nested(unit: str) -> pa.DataType:
    return pa.list_(pa.struct([("at", pa.timestamp(unit))]))


def test_parquet_is_read_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def rows_of(batch: pa.RecordBatch) -> list[dict[str, object]]:
        sizes.append(batch.nbytes)
        return list(batch.to_pylist())

    monkeypatch.setattr(readers, "to_rows", rows_of)
    images = [os.urandom(2**20) for _ in range(40)]
    parquet.write_table(pa.table({"image": images}), tmp_path / "a.parquet", use_dictionary=False)
    assert [row["image"] for row in open_table(tmp_path / "a.parquet").rows()] == images
    assert max(sizes) < 2**25
    assert len(sizes) > 2


def test_parquet_refuses_equal_names(tmp_path: Path) -> None:
    parquet.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="two columns have one name: a, a"):
        list(open_table(tmp_path / "a.parquet").rows())


def test_tables_need_no_home(tmp_path: Path) -> None:
    """A container that runs as a user without a home reads every table."""
    write(tmp_path / "a.csv", "image\na.png\n")
    write(tmp_path / "a.jsonl", json.dumps({"image": "a.png"}) + "\n")
    parquet.write_table(pa.table({"image": ["a.png"]}), tmp_path / "a.parquet")
    hidden = ("HOME", "USERPROFILE", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment["HOME"] = str(write(tmp_path / "home", ""))  # nothing can be written into a file
    code = (
        "import sys; from lamplit.data.sources import read_pairs\n"
        "print([pair.id for name in sys.argv[1:] for pair in read_pairs(name)], 'datasets' in sys.modules)"
    )
    files = [str(tmp_path / f"a.{suffix}") for suffix in ("csv", "jsonl", "parquet")]
    result = subprocess.run([sys.executable, "-c", code, *files], env=environment, capture_output=True, text=True)
    assert result.stdout == "['a.png', 'a.png', 'a.png'] False\n", result.stderr
