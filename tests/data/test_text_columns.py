"""Columns of texts and paths as a whole, against the same cell by cell."""

from __future__ import annotations

import sys
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.tables import text_columns
from lamplit.data.tables.columns import CellError, text_cells
from lamplit.data.tables.text_columns import count_texts, first_texts, path_texts, text_lists

SPACE = text_columns._SPACE
TEXT = st.none() | st.text(st.sampled_from(f"ab[]'\",é{SPACE}"), max_size=8) | st.sampled_from(['["x", "y"]', "[' z']"])
LISTS = st.none() | st.lists(TEXT, max_size=3)
COLUMNS = [
    (TEXT, pa.string()),
    (TEXT, pa.large_string()),
    (TEXT, pa.dictionary(pa.int32(), pa.string())),
    (LISTS, pa.list_(pa.string())),
    (LISTS, pa.large_list(pa.string())),
    (st.none() | st.lists(TEXT, min_size=2, max_size=2), pa.list_(pa.string(), 2)),
    (st.none() | st.integers(0, 9), pa.int64()),
    (st.none() | st.floats(), pa.float64()),
    (st.none() | st.fixed_dictionaries({"raw": TEXT}), pa.struct({"raw": pa.string()})),
    (st.none(), pa.null()),
]


def slow(columns: dict[str, pa.Array], num_rows: int) -> list[list[str]]:
    rows = []
    for row in range(num_rows):
        texts: list[str] = []
        for name, cells in columns.items():
            texts += [text for text in text_cells({name: cells[row].as_py()}, (name,)) if text not in texts]
        rows.append(texts)
    return rows


def test_space_is_what_strip_takes_off() -> None:
    assert sorted(SPACE) == [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]


@given(st.data(), st.integers(0, 6), st.lists(st.sampled_from(COLUMNS), max_size=3))
def test_texts_of_columns(data: st.DataObject, num_rows: int, kinds: list[tuple[Any, pa.DataType]]) -> None:
    columns = {
        str(number): pa.array(data.draw(st.lists(cells, min_size=num_rows + 1, max_size=num_rows + 1)), kind).slice(1)
        for number, (cells, kind) in enumerate(kinds)
    }
    assert text_lists(columns, num_rows).to_pylist() == slow(columns, num_rows)


def test_column_that_holds_no_text() -> None:
    with pytest.raises(CellError, match="column when holds"):
        text_lists({"when": pa.array([0], pa.timestamp("s"))}, 1)


def test_paths() -> None:
    assert path_texts(pa.array(["a", None])).to_pylist() == ["a", ""]
    assert path_texts(pa.array(["a", None]).dictionary_encode()).to_pylist() == ["a", ""]
    assert path_texts(pa.array([{"path": "a"}, None])).to_pylist() == ["a", ""]
    assert path_texts(pa.array([1, 2])).to_pylist() == ["", ""]


@given(st.lists(LISTS, max_size=6), st.integers(0, 2))
def test_first_and_number_of_texts(lists: list[list[str | None] | None], start: int) -> None:
    cells, rows = pa.array(lists, pa.list_(pa.string())).slice(start), [row or [] for row in lists[start:]]
    assert count_texts(cells) == sum(bool(text and text.strip()) for row in rows for text in row)
    assert first_texts(cells).to_pylist() == [row[0] if row else None for row in rows]
