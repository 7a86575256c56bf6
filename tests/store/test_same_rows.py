"""Rows that are compared a column at a time, against each compared with what is stored of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import write_store
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lamplit.store.embed.same_rows import surely_same
from lamplit.store.embed.stored_rows import StoredRows
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import FIXED_COLUMNS, Row

SIZE = 40
OF_COLUMN: dict[str, list[Any]] = {
    "text": [None, "", "a", "é", 5, ["a"]],
    "whole": [None, 0, 7, -(2**63), 2**70, 7.0, True],
    "real": [None, 0.5, float("inf"), 7.0, 7, "7"],
    "flag": [None, True, False, 1],
    "items": [None, [], ["a"], ["b", None]],
    "parts": [None, {"x": 1}, {"x": None}, {"x": 1, "y": 2}],
    "unknown": [None, "a"],
}
rows_given = st.lists(
    st.tuples(
        st.integers(0, SIZE + 3),
        st.sampled_from(["", "elsewhere"]),
        st.sampled_from([None, [], ["a"], ["a", "b"], ["é"]]),
        st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in OF_COLUMN.items()}),
    ),
    max_size=30,
    unique_by=lambda row: row[0],
)


def stored_row(number: int) -> Row:
    metadata = {
        "text": [None, "", "a", "é"][number % 4],
        "whole": [7, None, 0, -(2**63)][number // 4 % 4],
        "real": [0.5, 7.0, None, float("inf")][number // 2 % 4],
        "flag": [True, None, False][number % 3],
        "items": [["a"], [], None, ["b", None]][number % 4],
        "parts": [{"x": 1}, None][number % 2],
    }
    texts = [[], ["a"], ["a", "b"], ["é"]][number % 4]
    return Row(f"{number:05}", f"{number}.png", f"{number:032x}", texts, None, metadata)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rows = list(map(stored_row, range(SIZE)))
    vectors = F.normalize(torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    path = tmp_path_factory.mktemp("same") / "a.lance"
    return write_store(path, vectors, [row.texts for row in rows], [dict(row.metadata) for row in rows])


@given(rows_given)
def test_what_is_unlike_is_what_row_after_row_says(
    store: Store, given_rows: list[tuple[int, str, list[str] | None, dict[str, Any]]]
) -> None:
    rows = []
    for number, path, texts, metadata in given_rows:
        row = stored_row(number)
        new_texts = row.texts if texts is None else texts
        rows.append(Row(row.id, path or row.path, row.hash, new_texts, None, {**row.metadata, **metadata}))
    stored = StoredRows(store)
    before = stored.read([row.id for row in rows])
    expected = [row for row, old in zip(rows, before, strict=True) if old is None or not stored.has_same(row, old)]
    assert stored.unlike(rows) == expected


def test_rows_of_plain_types_are_not_compared_one_by_one(store: Store) -> None:
    rows = [stored_row(number) for number in range(SIZE)]
    for row in rows:
        row.metadata = {name: value for name, value in row.metadata.items() if name not in ("items", "parts")}
    table = pa.Table.from_pylist(store.rows(), schema=pa.schema([*FIXED_COLUMNS.items(), *store.column_types.items()]))
    assert surely_same(rows, table).all()
    rows[3].path, rows[4].texts, rows[5].metadata = "b", ["b"], {"flag": 1}
    assert np.flatnonzero(~surely_same(rows, table)).tolist() == [3, 4, 5]
