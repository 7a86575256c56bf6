from __future__ import annotations

from threading import Event, Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lamplit.nearest import (
    ENOUGH,
    Found,
    SignBits,
    choose_count,
    find,
    find_all,
    in_threads,
    rank,
    rank_many,
    recall_of,
    sample_queries,
)
from lamplit.unit_vectors import normalize


def unit_rows(size: int, width: int, seed: int = 0, groups: int = 0) -> np.ndarray:
    """Random unit vectors; with `groups`, around so many centres and far from the origin, as pictures are."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, width, generator=random)
    if groups:
        centers = torch.randn(groups, width, generator=random) * 2 + 1
        rows = rows + centers[torch.randint(groups, (size,), generator=random)]
    return F.normalize(rows, dim=1).numpy()


def slow(vectors: np.ndarray, query: np.ndarray, places: list[int]) -> list[tuple[float, int]]:
    """All of `places`, best first, one at a time."""
    scored = []
    for place in places:
        row = F.normalize(torch.from_numpy(vectors[place]).double(), dim=0)
        scored.append((float((row * torch.from_numpy(query).double()).sum().float()), place))
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 70), st.integers(0, 50), st.sampled_from([np.float16, np.float32]), st.data())
def test_rank_is_the_slow_ranking(size: int, width: int, k: int, kind: type, data: st.DataObject) -> None:
    vectors = unit_rows(size, width, seed=size).astype(kind)
    vectors[: size // 2] = vectors[size - size // 2 :]  # every second cosine twice
    query = unit_rows(1, width, seed=99)[0]
    places = data.draw(st.sets(st.integers(0, max(0, size - 1)))) if size else set()
    for chosen in (None, np.array(sorted(places), np.int64)):
        expected = slow(vectors, query, list(range(size)) if chosen is None else sorted(places))[:k]
        found = rank(vectors, query, k, chosen)
        assert found.scores.tolist() == pytest.approx([score for score, _ in expected], abs=1e-6)
        exact = [place for place in found.places.tolist()]
        assert len(set(exact)) == len(exact)
        for (score, place), mine in zip(expected, exact, strict=True):
            assert mine == place or sum(abs(score - other) < 1e-6 for other, _ in expected) > 1 or k < size


def test_equals_come_by_their_places() -> None:
    row, other = unit_rows(2, 16)
    vectors = np.stack([other, row, row, other, row])
    assert rank(vectors, row, 4).places.tolist() == [1, 2, 4, 0]
    assert rank(vectors, row, 2, np.array([2, 3, 4])).places.tolist() == [2, 4]


def test_order_does_not_depend_on_threads_or_on_what_else_is_there() -> None:
    vectors = unit_rows(70_000, 16, groups=3).astype(np.float16)
    query = unit_rows(1, 16, seed=5)[0]
    before = torch.get_num_threads()
    whole = rank(vectors, query, 50)
    try:
        torch.set_num_threads(3)
        again = rank(vectors, query, 50)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    few = rank(vectors, query, 50, np.sort(whole.places))
    for other in (again, few):
        assert other.places.tolist() == whole.places.tolist()
        assert other.scores.tobytes() == whole.scores.tobytes()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 140), st.integers(0, 5))
def test_distances_are_those_counted_one_by_one(size: int, width: int, seed: int) -> None:
    vectors = unit_rows(size, width, seed)
    query = unit_rows(1, width, seed + 100)[0]
    bits = SignBits.of(vectors)
    assert bits.words.shape == (-(-width // 64), size)
    signs = vectors > vectors.mean(0, dtype=np.float64).astype(np.float32)
    falling = sorted(abs(query), reverse=True)
    most = max(range(1, width + 1), key=lambda n: sum(falling[:n]) / n**0.5)
    counted = abs(query) >= falling[most - 1]
    expected = ((signs != (query > 0)) & counted).sum(1)
    assert vars(SignBits)["_distances"](bits, query).tolist() == expected.tolist()
    scale = 3 * np.sqrt(np.mean(query**2))
    weights = np.rint(np.minimum(abs(query) / scale, 1) * 7)
    places = np.arange(0, size, 2)
    weighted = vars(SignBits)["_weighted"](bits, places, query)
    assert weighted.tolist() == ((signs != (query > 0)) * weights).sum(1)[places].tolist()


def test_candidates_are_so_many_allowed_and_ascending() -> None:
    vectors = unit_rows(3000, 64, groups=5)
    bits, query = SignBits.of(vectors), unit_rows(1, 64, seed=7)[0]
    found = bits.candidates(query, 100)
    assert 100 <= len(found) < 400
    assert (np.diff(found) > 0).all()
    allowed = np.zeros(3000, bool)
    allowed[10:60] = True
    assert bits.candidates(query, 100, allowed).tolist() == list(range(10, 60))
    assert bits.candidates(query, 5000).tolist() == list(range(3000))
    assert allowed[bits.candidates(query, 10, allowed)].all()
    assert bits.candidates(query, 10, np.zeros(3000, bool)).tolist() == []


def test_all_candidates_give_the_exact_ranking() -> None:
    vectors = unit_rows(500, 100, groups=4).astype(np.float16)
    bits, query = SignBits.of(vectors), unit_rows(1, 100, seed=3)[0]
    exact, found = rank(vectors, query, 20), find(vectors, bits, query, 20, 500)
    assert found.places.tolist() == exact.places.tolist()
    assert found.scores.tolist() == exact.scores.tolist()


@pytest.mark.parametrize("groups", [0, 40])
def test_chosen_count_keeps_its_recall_on_queries_it_has_not_seen(groups: int) -> None:
    vectors = unit_rows(10_000, 128, groups=groups).astype(np.float16)
    bits = SignBits.of(vectors)
    count, recall = choose_count(vectors, bits)
    assert recall >= ENOUGH
    assert count < 5_000
    queries = normalize(unit_rows(100, 128, seed=8, groups=groups) + vectors[:100])
    true = rank_many(vectors, queries, 10)
    assert recall_of(find_all(vectors, bits, queries, 10, count), true) > ENOUGH - 0.02
    assert recall_of(find_all(vectors, bits, queries, 10, 20), true) < recall  # the bits alone would not do


def test_many_at_once_are_each_alone() -> None:
    vectors = unit_rows(4000, 64).astype(np.float16)
    bits, queries = SignBits.of(vectors), sample_queries(vectors, 6)
    for query, found, exact in zip(
        queries, find_all(vectors, bits, queries, 7, 300), rank_many(vectors, queries, 7), strict=True
    ):
        alone = find(vectors, bits, query, 7, 300)
        assert alone.places.tolist() == found.places.tolist()
        assert rank(vectors, query, 7).scores.tolist() == pytest.approx(exact.scores.tolist(), abs=1e-6)


def test_recall_counts_equals_as_found() -> None:
    def found(*scores: float) -> Found:
        return Found(np.arange(len(scores)), np.array(scores, np.float32))

    assert recall_of([found(0.9, 0.5)], [found(0.9, 0.5)]) == 1
    assert recall_of([found(0.9, 0.4)], [found(0.9, 0.5)]) == 0.5
    assert recall_of([found(0.9, 0.4), found(0.1, 0.1)], [found(0.9, 0.5), found(0.1, 0.1)]) == 0.75


def test_every_part_is_worked_once() -> None:
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            seen = np.zeros(10_001, int)

            def work(start: int, stop: int, seen: np.ndarray = seen) -> None:
                seen[start:stop] += 1

            in_threads(work, len(seen), least=100)
            assert (seen == 1).all()
        finally:
            torch.set_num_threads(before)


def test_empty() -> None:
    nothing = np.empty((0, 8), np.float32)
    assert rank(nothing, unit_rows(1, 8)[0], 3).places.tolist() == []
    assert SignBits.of(nothing).candidates(np.ones(8, np.float32), 3).tolist() == []


def test_threads_within_threads_do_not_wait_for_each_other() -> None:
    """`find_all` asks `find` in threads, which would have threads of its own."""
    seen: list[tuple[int, int]] = []
    done = Event()

    def outer(start: int, stop: int) -> None:
        in_threads(lambda first, last: seen.append((start + first, start + last)), stop - start, least=1)

    def run() -> None:
        in_threads(outer, 40, least=10)
        done.set()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Thread(target=run, daemon=True).start()
        assert done.wait(20)
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == [(0, 20), (20, 40)]
