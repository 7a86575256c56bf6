from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.tuning import permutation
from lamplit.tuning.permutation import BLOCK, WINDOW, blocks_of_window, permute, stream, window_at, windows


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
@settings(max_examples=60)
def test_a_pass_has_each_number_once(size: int, seed: int, number: int) -> None:
    found = stream(number * size, (number + 1) * size, size, seed)
    assert np.array_equal(np.sort(found), np.arange(size))


@given(st.integers(50, 300), st.integers(0, 900), st.integers(0, 900), st.integers(0, 5))
@settings(max_examples=60)
def test_any_part_is_cut_from_one_stream(size: int, start: int, length: int, seed: int) -> None:
    whole = stream(0, start + length, size, seed)
    assert np.array_equal(stream(start, start + length, size, seed), whole[start:])


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permute(np.arange(40, dtype=np.uint64), 40, *key)) for key in np.ndindex(15, 15)}
    assert len(orders) == 225


def test_every_order_of_a_few_is_as_likely() -> None:
    orders = Counter(tuple(stream(4 * number, 4 * number + 4, 4, seed=0).tolist()) for number in range(1200))
    assert len(orders) == 24
    assert sum((times - 50) ** 2 / 50 for times in orders.values()) < 50  # chi-square with 23 degrees: p = 0.001


def slow_windows(number: int, size: int, seed: int, block: int, window: int) -> list[int]:
    """One pass as it is defined: shuffle whole blocks, lay them end to end, and shuffle each window of that."""
    whole = size // block
    shuffled = permute(np.arange(whole, dtype=np.uint64), whole, seed, f"{number} blocks") if whole else []
    ordered = [row for first in shuffled for row in range(first * block, (first + 1) * block)]
    ordered += range(whole * block, size)
    found = []
    for first in range(0, size, window):
        part = ordered[first : first + window]
        mixed = permute(np.arange(len(part), dtype=np.uint64), len(part), seed, f"{number} {first}")
        found += [part[place] for place in mixed]
    return found


@given(st.integers(1, 700), st.integers(0, 3000), st.integers(0, 900), st.integers(0, 5))
@settings(max_examples=60)
def test_windows_are_blocks_shuffled_and_their_rows_too(size: int, start: int, length: int, seed: int) -> None:
    block, window = 8, 64
    passes = range((start + length) // size + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "BLOCK", block)
        patch.setattr(permutation, "WINDOW", window)
        whole = [row for number in passes for row in slow_windows(number, size, seed, block, window)]
        assert windows(start, start + length, size, seed).tolist() == whole[start : start + length]
        first, last = window_at(start, size)
        assert first <= start < last
        expected = {row // block * block for row in whole[first:last]}
        assert blocks_of_window(start, size, seed).tolist() == sorted(expected)


def test_a_window_reads_few_places() -> None:
    size = 10_000_000
    rows = windows(3 * WINDOW, 3 * WINDOW + 8192, size, seed=0)
    assert len(np.unique(rows)) == 8192
    assert len(np.unique(rows // BLOCK)) <= WINDOW // BLOCK
    assert np.ptp(rows) > size / 2


def test_order_of_a_seed_never_changes() -> None:
    """Every figure of a run depends on it: these numbers must stay."""
    assert stream(0, 12, 1000, seed=0).tolist() == [621, 181, 344, 938, 693, 641, 627, 204, 240, 853, 670, 965]
    assert stream(0, 3, 10_000_000, seed=1).tolist() == [8523437, 5759115, 3135866]
    assert windows(0, 3, 10_000_000, seed=1).tolist() == [1441165, 5872575, 9708916]
