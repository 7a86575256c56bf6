from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_rows import unit_rows

from lamplit.retrieval.bit_planes import BitPlanes
from lamplit.retrieval.nearest import rank, rank_many
from lamplit.retrieval.recall import recall_of, sample_queries


@settings(max_examples=25)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 140), st.integers(0, 5))
def test_ranks_tell_what_the_sieves_must_keep(size: int, chosen: int, width: int, seed: int) -> None:
    vectors, query = unit_rows(size, width, seed), unit_rows(1, width, seed + 9)[0]
    planes, true = BitPlanes.of(vectors), np.unique([0, chosen % size])
    first, second = planes.ranks(query, true)
    assert (first >= 1).all()
    assert (second <= first.max()).all()
    assert set(true) <= set(planes.candidates(query, (int(first.max()), int(second.max()))))


@pytest.mark.parametrize("width", [64, 200])
def test_bits_find_the_nearest_rows(width: int) -> None:
    """Two bits a component are good enough that a thirtieth of the rows holds nearly all of the ten nearest."""
    vectors, queries = unit_rows(6000, width), unit_rows(50, width, seed=6)
    planes = BitPlanes.of(vectors)
    true = rank_many(vectors, queries, 10)
    found = planes.find_all(vectors, queries, 10, (1200, 200))
    assert recall_of(found, true) > 0.9
    by_chance = [rank(vectors, query, 10, np.arange(200)) for query in queries]
    assert recall_of(by_chance, true) < 0.1


def test_candidates_are_so_many_allowed_and_ascending() -> None:
    vectors = unit_rows(3000, 64, groups=5)
    planes, query = BitPlanes.of(vectors), unit_rows(1, 64, seed=7)[0]
    found = planes.candidates(query, (400, 100))
    assert 100 <= len(found) < 400
    assert (np.diff(found) > 0).all()
    allowed = np.zeros(3000, bool)
    allowed[10:60] = True
    assert planes.candidates(query, (400, 100), allowed).tolist() == list(range(10, 60))
    assert planes.candidates(query, (5000, 5000)).tolist() == list(range(3000))
    assert allowed[planes.candidates(query, (40, 10), allowed)].all()
    assert planes.candidates(query, (40, 10), np.zeros(3000, bool)).tolist() == []


def test_candidates_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_rows(100_000, 32)
    planes, query = BitPlanes.of(vectors), unit_rows(1, 32, seed=7)[0]
    found = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append(planes.candidates(query, (20_000, 1000)).tolist())
    assert found[0] == found[1]


def slow_candidates(planes: BitPlanes, query: np.ndarray, kept: tuple[int, int], allowed: np.ndarray) -> list[int]:
    """Weigh every differing bit by hand."""
    magnitudes = np.abs(query) * planes.scale
    largest = 2.7 * float(np.sqrt(np.mean(magnitudes**2))) or 1.0
    weights = np.rint(np.minimum(magnitudes / largest, 1) * 7)
    size, width = planes.seconds.shape
    signs = np.ascontiguousarray(planes.signs.swapaxes(1, 2)).reshape(-1, width)[:size]
    bits = [np.unpackbits(words.view(np.uint8), axis=1, bitorder="little") for words in (signs, planes.seconds)]
    first, second = (((each[:, : len(query)] > 0) != (query >= 0)) @ weights for each in bits)
    rows = np.flatnonzero(allowed)
    for sums, count in ((first, kept[0]), (2 * first + second, kept[1])):
        if len(rows) > count:
            rows = rows[sums[rows] <= np.sort(sums[rows])[count - 1]]
    return rows.tolist()


@settings(max_examples=30)
@given(st.integers(1, 5000), st.integers(1, 140), st.integers(1, 900), st.integers(1, 60), st.integers(0, 99))
def test_candidates_by_hand(size: int, width: int, first: int, second: int, seed: int) -> None:
    vectors, query = unit_rows(size, width, seed), unit_rows(1, width, seed + 9)[0]
    planes, allowed = BitPlanes.of(vectors), np.random.default_rng(seed).random(size) < 0.7
    expected = slow_candidates(planes, query, (first, second), allowed)
    assert planes.candidates(query, (first, second), allowed).tolist() == expected


@pytest.mark.parametrize("near_first", [True, False])
def test_rows_that_the_sample_is_unlike(near_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is near lies in the one block of the sample, or in none of it."""
    monkeypatch.setattr("lamplit.retrieval.bit_planes._SAMPLE", 32)
    query = unit_rows(1, 64, seed=7)[0]
    vectors = unit_rows(6000, 64)
    vectors[np.arange(100) if near_first else np.arange(3000, 3100)] += query
    planes = BitPlanes.of(vectors)
    for first, second in ((50, 20), (900, 100), (6000, 3)):
        # The first sieve lets through at least so many.
        expected = [
            slow_candidates(planes, query, (more, second), np.ones(6000, bool)) for more in range(first, 6001, 50)
        ]
        assert planes.candidates(query, (first, second)).tolist() in expected


def test_equal_rows_come_through_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there is room for at first."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    vectors = np.repeat(unit_rows(3, 64), [40_000, 5, 40_000], axis=0)
    planes = BitPlanes.of(vectors)
    assert planes.candidates(vectors[-1], (10, 10)).tolist() == list(range(40_005, 80_005))
    assert len(planes.find(vectors, vectors[0], 10, (10, 10))) == 10


def test_components_that_never_change_do_not_count() -> None:
    vectors = np.concatenate([unit_rows(300, 30), np.full((300, 3), 0.25, np.float32)], 1)
    planes, query = BitPlanes.of(vectors), unit_rows(1, 33, seed=3)[0]
    assert planes.scale[30:].max() < 1e-4
    other = query.copy()
    other[30:] *= -1
    assert planes.candidates(query, (60, 20)).tolist() == planes.candidates(other, (60, 20)).tolist()


def test_all_candidates_give_the_exact_ranking() -> None:
    vectors = unit_rows(500, 100, groups=4).astype(np.float16)
    planes, query = BitPlanes.of(vectors), unit_rows(1, 100, seed=3)[0]
    exact, found = rank(vectors, query, 20), planes.find(vectors, query, 20, (500, 500))
    assert found.rows.tolist() == exact.rows.tolist()
    assert found.scores.tolist() == exact.scores.tolist()


@pytest.mark.parametrize("room", [2**24, 2000])
def test_many_at_once_are_each_alone(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamplit.retrieval.bit_planes._ROOM", room)
    vectors = unit_rows(4000, 64).astype(np.float16)
    planes, queries = BitPlanes.of(vectors), sample_queries(vectors, 6)
    for query, found, exact in zip(
        queries, planes.find_all(vectors, queries, 7, (900, 300)), rank_many(vectors, queries, 7), strict=True
    ):
        alone = planes.find(vectors, query, 7, (900, 300))
        assert alone.rows.tolist() == found.rows.tolist()
        assert rank(vectors, query, 7).scores.tolist() == pytest.approx(exact.scores.tolist(), abs=1e-6)


def test_no_rows() -> None:
    nothing = np.empty((0, 8), np.float32)
    assert BitPlanes.of(nothing).candidates(np.ones(8, np.float32), (3, 3)).tolist() == []
