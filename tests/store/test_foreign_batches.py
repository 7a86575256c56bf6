"""Rows of a store from blocks of vectors: columns taken as a whole, against value by value."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.vectors.foreign_tables import Described, plain_cells
from lamplit.store.foreign_batches import to_store_batch, to_unit
from lamplit.store.table.rows import to_column
from lamplit.store.table.store_metadata import StoreMetadata
from lamplit.towers.identity import TowerIdentity

WHOLE = st.none() | st.integers(-(2**63), 2**63 - 1)
NUMBER = st.none() | st.floats()
COLUMNS = [
    (WHOLE, pa.int64(), [pa.int64(), pa.float64(), pa.string(), pa.int8(), pa.uint64()]),
    (st.none() | st.integers(0, 200), pa.uint8(), [pa.int64(), pa.float64(), pa.int8(), pa.bool_()]),
    (NUMBER, pa.float64(), [pa.float64(), pa.string(), pa.int64()]),
    (st.none() | st.floats(width=32), pa.float32(), [pa.float64(), pa.string()]),
    (st.none() | st.booleans(), pa.bool_(), [pa.bool_(), pa.int64(), pa.string()]),
    (st.none() | st.text("ab1", max_size=3), pa.string(), [pa.string(), pa.int64(), pa.large_string()]),
    (st.none() | st.text("ab1", max_size=3), pa.dictionary(pa.int8(), pa.large_string()), [pa.string()]),
    (st.none() | st.lists(st.none() | st.text("ab"), max_size=2), pa.list_(pa.string()), [pa.list_(pa.string())]),
    (st.none() | st.lists(NUMBER, max_size=2), pa.list_(pa.float64()), [pa.list_(pa.float64()), pa.string()]),
    (st.none(), pa.null(), [pa.string(), pa.list_(pa.int64())]),
]


def described(metadata: dict[str, Any], size: int) -> Described:
    return Described(pa.array([""] * size, pa.string()), pa.array([[]] * size, pa.list_(pa.string())), metadata)


@given(st.data(), st.sampled_from(COLUMNS))
def test_column_of_metadata(data: st.DataObject, column: tuple[Any, pa.DataType, list[pa.DataType]]) -> None:
    values, have, targets = column
    kind = data.draw(st.sampled_from(targets))
    cells = pa.array(data.draw(st.lists(values, min_size=1, max_size=6)), have)
    expected, unfit = to_column(plain_cells(cells), kind)
    schema = StoreMetadata(TowerIdentity.of_imported("a", 2), "imported", False).schema({"n": kind})
    made = to_store_batch((np.ones((len(cells), 2), np.float32), {}, described({"n": cells}, len(cells))), 0, schema)
    assert made.rows["n"].type == kind
    assert made.rows["n"].to_pylist() == expected.to_pylist()
    assert made.lost == ({"n": unfit} if unfit else {})


def test_ids_contents_and_what_is_skipped() -> None:
    values = np.array([[3, 4], [0, 0], [np.nan, 1], [0.6, 0.8]], np.float32)
    schema = StoreMetadata(TowerIdentity.of_imported("a", 2), "imported", False).schema({})
    made = to_store_batch((values, {1: "no vector"}, described({}, 4)), 999_999_998, schema)
    unit = np.array([0.6, 0.8], np.float16)
    assert made.rows["id"].to_pylist() == made.rows["path"].to_pylist() == ["999999998", "1000000001"]
    assert made.rows["hash"].to_pylist() == [blake2b(unit.tobytes(), digest_size=16).hexdigest()] * 2
    assert [item.id for item in made.skipped] == ["999999999", "1000000000"]
    assert [item.reason for item in made.skipped] == ["no vector", "the vector has NaN, infinite or missing values"]


@given(st.lists(st.floats(0.9985, 1.0015), min_size=1, max_size=5), st.integers(0, 9))
def test_unit_float16_alone_or_in_a_block(lengths: list[float], seed: int) -> None:
    """Whether a block is all of unit length decides nothing about any vector in it."""
    rows = np.random.default_rng(seed).normal(size=(len(lengths), 8))
    rows *= np.array(lengths)[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
    halves = rows.astype(np.float16)
    together, _ = to_unit(np.concatenate([halves, np.full((1, 8), 5, np.float16)]))
    assert np.array_equal(to_unit(halves)[0], together[:-1])
