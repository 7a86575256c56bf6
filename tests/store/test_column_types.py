from __future__ import annotations

import json
import math
import os
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.pairs import Pair
from lamplit.store.embed import store_writer
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.lance_store import Store
from lamplit.store.table.column_types import UnfitError, as_text, column_type, fitted, is_ours
from lamplit.towers.identity import TowerIdentity

HALF = (0.5, 0.5, 0.5)
TOWER = TowerIdentity("timm:tower", "f" * 32, 2, Preprocessing((32, 32), HALF, HALF), {"library": "timm"})
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["a", "b", "ä b"]), VALUES, max_size=3), min_size=1, max_size=7)


def agrees(given: Any, back: Any) -> bool:
    """Whether what came back says what was given: itself, its text, or a struct whose other fields are empty."""
    if given is None or back is None:
        return given is back
    if isinstance(back, str) and not isinstance(given, str):
        if isinstance(given, list | dict):
            return agrees(given, json.loads(back))
        return back == as_text(given) or (not isinstance(given, bool) and float(back) == given)
    if isinstance(given, list):
        return len(given) == len(back) and all(map(agrees, given, back))
    if isinstance(given, dict):
        return all(agrees(given.get(name), back.get(name)) for name in {**given, **back})
    return isinstance(given, bool) == isinstance(back, bool) and bool(given == back)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2**53, 2.5], pa.float64()),
        ([2**53 + 1, 2.5], pa.string()),
        ([2**60, 1], pa.int64()),
        ([2**63], pa.string()),
        ([True, 1], pa.string()),
        ([None], pa.string()),
        ([[], [1]], pa.list_(pa.int64())),
        ([[1], ["x"]], pa.list_(pa.string())),
        ([[1], "x"], pa.string()),
        ([{}, {"a": 1}, {"b": [None]}], pa.struct({"a": pa.int64(), "b": pa.list_(pa.string())})),
        ([{str(number): 1 for number in range(65)}], pa.string()),
    ],
)
def test_narrowest_type(values: list[Any], kind: pa.DataType) -> None:
    assert column_type(values) == kind
    assert is_ours(kind)
    assert all(agrees(value, fitted(value, kind)) for value in values)


@given(st.lists(VALUES, max_size=6))
def test_type_of_values_fits_them_all(values: list[Any]) -> None:
    kind = column_type(values)
    back = pa.array([fitted(value, kind) for value in values], kind).to_pylist()
    assert all(map(agrees, values, back))


@pytest.mark.parametrize(
    ("value", "kind"),
    [(100.7, pa.int64()), (2**53 + 1, pa.float64()), (True, pa.int64()), (1, pa.bool_()), (0.1, pa.float32()),
     ({"b": 1}, pa.struct({"a": pa.int64()})), (["x"], pa.list_(pa.int64())), (300, pa.int8())],
)  # fmt: skip
def test_what_would_come_back_as_something_else_is_refused(value: Any, kind: pa.DataType) -> None:
    with pytest.raises(UnfitError):
        fitted(value, kind)


def test_what_is_not_a_number_stays_so() -> None:
    assert math.isnan(fitted(math.nan, pa.float64()))
    assert fitted({"a": None, "b": None}, pa.struct({"a": pa.int64()})) == {"a": None}


@settings(max_examples=int(os.environ.get("EXAMPLES", 12)))
@given(ROWS, st.integers(1, 3))
@example([{"a": [{"\0": 1, "x\0": 2}]}, {"a": [{"\0": 2.5, "x\0": "y"}], "b": {"\0": "\0"}}], 1)
def test_what_was_given_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], commit_rows: int
) -> None:
    """Through the writer, in commits of any size; then again, where nothing may be taken for unchanged that is not."""
    out = tmp_path_factory.mktemp("store") / "any.lance"
    pairs = [Pair(str(number), b"", ("text",), metadata) for number, metadata in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "COMMIT_ROWS", commit_rows)
        for run in range(3):
            writer = StoreWriter(out, TOWER, centered=False)
            for pair in pairs:
                if run:
                    writer.keep([(pair, f"{int(pair.id):032x}")])
                else:
                    writer.add([pair], [f"{int(pair.id):032x}"], torch.tensor([[1.0, 0.0]]), "torch")
                writer.commit_if_due()
            writer.finish(None, prune=False)
            assert not writer.not_kept
    assert writer.updated == 0  # the texts of numbers are their own after the second run
    stored = Store(out).rows()
    assert [row["id"] for row in stored] == [pair.id for pair in pairs]
    for metadata, row in zip(rows, stored, strict=True):
        assert all(agrees(metadata.get(name), row.get(name)) for name in ("a", "b", "ä b"))
