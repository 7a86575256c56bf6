from __future__ import annotations

import os
from itertools import pairwise
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_rows import unit_rows

from lamplit.retrieval.nearest import (
    BitPlanes,
    find,
    find_all,
    in_threads,
    num_threads,
    rank,
    rank_many,
)
from lamplit.retrieval.recall import recall_of, sample_queries


def slow(vectors: np.ndarray, query: np.ndarray, rows: list[int]) -> list[tuple[float, int]]:
    """Rank the given rows one at a time, best first."""
    scored = []
    for row in rows:
        vector = vectors[row].astype(np.float64)
        scored.append((float((vector * query).sum() / np.sqrt((vector * vector).sum())), row))
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 70), st.integers(0, 50), st.sampled_from([np.float16, np.float32]), st.data())
def test_rank_is_the_slow_ranking(size: int, width: int, k: int, kind: type, data: st.DataObject) -> None:
    vectors = unit_rows(size, width, seed=size).astype(kind)
    vectors[: size // 2] = vectors[size - size // 2 :]  # every second cosine twice
    query = unit_rows(1, width, seed=99)[0]
    rows = data.draw(st.sets(st.integers(0, max(0, size - 1)))) if size else set()
    for chosen in (None, np.array(sorted(rows), np.int64)):
        ranking = slow(vectors, query, list(range(size)) if chosen is None else sorted(rows))
        cosine = {row: score for score, row in ranking}
        found = rank(vectors, query, k, chosen)
        assert found.scores.tolist() == pytest.approx([score for score, _ in ranking[:k]], abs=1e-6)
        mine = found.rows.tolist()
        assert len(set(mine)) == len(mine)
        assert [cosine[row] for row in mine] == pytest.approx(found.scores.tolist(), abs=1e-6)  # each row's own
        for row, other in pairwise(mine):
            assert row < other or vectors[row].tobytes() != vectors[other].tobytes()  # equals by their rows


def test_equals_come_by_their_rows() -> None:
    row, other = unit_rows(2, 16)
    vectors = np.stack([other, row, row, other, row])
    assert rank(vectors, row, 4).rows.tolist() == [1, 2, 4, 0]
    assert rank(vectors, row, 2, np.array([2, 3, 4])).rows.tolist() == [2, 4]


def test_order_does_not_depend_on_threads_or_on_what_else_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_rows(70_000, 16, groups=3).astype(np.float16)
    query = unit_rows(1, 16, seed=5)[0]
    whole = rank(vectors, query, 50)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    again = rank(vectors, query, 50)
    few = rank(vectors, query, 50, np.sort(whole.rows))
    for other in (again, few):
        assert other.rows.tolist() == whole.rows.tolist()
        assert other.scores.tobytes() == whole.scores.tobytes()


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_rows_without_numbers_are_never_found(kind: type) -> None:
    vectors = unit_rows(300, 16).astype(kind)
    query = unit_rows(1, 16, seed=4)[0]
    query[0] = 0  # hides an infinity from the quick product
    expected = [row for _, row in slow(vectors, query, [row for row in range(300) if row not in (5, 17, 40, 41)])]
    vectors[5], vectors[17, 3], vectors[40, 0], vectors[41, 2] = np.nan, np.nan, np.inf, -np.inf
    assert rank(vectors, query, 3).rows.tolist() == expected[:3]
    whole = rank(vectors, query, 300)
    assert whole.rows.tolist() == expected
    assert np.isfinite(whole.scores).all()
    assert rank(vectors, query, 9, np.array([5, 6, 40])).rows.tolist() == [6]
    planes = BitPlanes.of(vectors)
    assert np.isfinite(planes.scale).all()
    assert len(planes.candidates(query, (150, 60))) < 150  # they do not spoil the bits of the others
    assert set(find(vectors, planes, query, 300, (300, 300)).rows.tolist()) == set(expected)


@settings(max_examples=25, deadline=None)
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
    found = find_all(vectors, planes, queries, 10, (1200, 200))
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
    exact, found = rank(vectors, query, 20), find(vectors, planes, query, 20, (500, 500))
    assert found.rows.tolist() == exact.rows.tolist()
    assert found.scores.tolist() == exact.scores.tolist()


def test_many_at_once_are_each_alone() -> None:
    vectors = unit_rows(4000, 64).astype(np.float16)
    planes, queries = BitPlanes.of(vectors), sample_queries(vectors, 6)
    for query, found, exact in zip(
        queries, find_all(vectors, planes, queries, 7, (900, 300)), rank_many(vectors, queries, 7), strict=True
    ):
        alone = find(vectors, planes, query, 7, (900, 300))
        assert alone.rows.tolist() == found.rows.tolist()
        assert rank(vectors, query, 7).scores.tolist() == pytest.approx(exact.scores.tolist(), abs=1e-6)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_every_part_is_worked_once(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert num_threads() == int(threads)
    seen = np.zeros(10_001, int)

    def work(start: int, stop: int) -> None:
        seen[start:stop] += 1

    in_threads(work, len(seen), least=100)
    assert (seen == 1).all()


@pytest.mark.parametrize("value", ["", "0", "many"])
def test_without_a_number_there_are_as_many_threads_as_cores(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert num_threads() == len(os.sched_getaffinity(0))


def test_empty() -> None:
    nothing = np.empty((0, 8), np.float32)
    assert rank(nothing, unit_rows(1, 8)[0], 3).rows.tolist() == []
    assert BitPlanes.of(nothing).candidates(np.ones(8, np.float32), (3, 3)).tolist() == []


def test_threads_within_threads_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """`find_all` asks `find` in threads, which would have threads of its own."""
    seen: list[tuple[int, int]] = []
    done = Event()

    def outer(start: int, stop: int) -> None:
        in_threads(lambda first, last: seen.append((start + first, start + last)), stop - start, least=1)

    def run() -> None:
        in_threads(outer, 40, least=10)
        done.set()

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    Thread(target=run, daemon=True).start()
    assert done.wait(20)
    assert sorted(seen) == [(0, 20), (20, 40)]
