from __future__ import annotations

import os
from itertools import pairwise
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_rows import unit_rows

from lamplit.retrieval.bit_planes import BitPlanes
from lamplit.retrieval.nearest import (
    in_threads,
    num_threads,
    rank,
)


def slow(vectors: np.ndarray, query: np.ndarray, rows: list[int]) -> list[tuple[float, int]]:
    """Rank the given rows one at a time, best first."""
    scored = []
    for row in rows:
        vector = vectors[row].astype(np.float64)
        scored.append((float((vector * query).sum() / np.sqrt((vector * vector).sum())), row))
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


@settings(max_examples=30)
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
    assert set(planes.find(vectors, query, 300, (300, 300)).rows.tolist()) == set(expected)


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


def test_threads_within_threads_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """`find_all` ranks in threads, which would have threads of their own."""
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
