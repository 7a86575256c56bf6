"""Keys of names, against lists and sets of Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data import sorted_keys
from lamplit.data.sorted_keys import KeySet, SortedKeys, keys_of

# Few first halves, so that keys share them.
KEYS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=20)


def as_keys(keys: list[tuple[int, int]]) -> sorted_keys.Keys:
    return np.array(keys, np.uint64).reshape(-1, 2)


@given(KEYS, KEYS)
def test_find(there: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    found = SortedKeys.of(as_keys(there)).find(as_keys(asked))
    assert found.tolist() == [there.index(key) if key in there else -1 for key in asked]


@given(st.lists(KEYS, max_size=6))
def test_set_of_blocks(blocks: list[list[tuple[int, int]]]) -> None:
    keys, seen = KeySet(), set()
    for block in blocks:
        assert keys.has(as_keys(block)).tolist() == [key in seen for key in block]
        expected = []
        for key in block:
            expected.append(key not in seen)
            seen.add(key)
        assert keys.add(as_keys(block)).tolist() == expected
        assert len(keys) == len(seen)


@pytest.mark.parametrize("size", [70_000])
def test_set_that_is_merged(size: int) -> None:
    keys = KeySet()
    for start in range(0, size, 10_000):
        assert keys.add(keys_of(map(str, range(start, start + 10_000)))).all()
    assert not keys.add(keys_of(map(str, range(size)))).any()
    assert len(keys) == size


def test_names_of_any_bytes() -> None:
    names = ["a", "b", "", "a\udcff", "é"]
    assert len(np.unique(keys_of(names), axis=0)) == len(names)
    assert np.array_equal(keys_of(["a"]), keys_of(["a"]))
