"""Each compiled loop against numpy's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lamplit.retrieval.kernels as compiled
from lamplit.retrieval.kernels import (
    GROUP,
    likely_limits,
    look_closer,
    products,
    products_of,
    scan,
    sift,
    smallest,
    widen,
)


def words(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, shape, dtype=np.uint64)


def grouped(words: np.ndarray) -> np.ndarray:
    """Lay (N, W) words as they are scanned; what fills the last group up is no row and must not matter."""
    size, width = words.shape
    full = np.random.default_rng(9).integers(0, 2**64, (-(-size // GROUP) * GROUP, width), dtype=np.uint64)
    full[:size] = words
    return np.ascontiguousarray(full.reshape(-1, GROUP, width).swapaxes(1, 2))


def weighed(words: np.ndarray, signs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What `scan` gives, by numpy."""
    ones = [np.bitwise_count((words ^ signs) & plane).sum(1, dtype=np.int64) for plane in weights]
    return np.stack([2**bit * counts for bit, counts in enumerate(ones)]).sum(0)


@pytest.mark.parametrize("width", [1, 4, 8, 18])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_scan_and_look_closer(width: int, kind: type) -> None:
    first, second = words(2, 333, width)
    signs, weights = words(width, seed=1), words(3, width, seed=2)
    distances = np.empty(333, kind)
    scan(grouped(first), signs, weights, distances)
    assert distances.tolist() == weighed(first, signs, weights).tolist()
    rows = np.array([0, 7, 332])
    closer = np.empty(3, np.uint32)
    look_closer(distances[rows], second, rows, signs, weights, closer)
    assert closer.tolist() == (2 * weighed(first, signs, weights) + weighed(second, signs, weights))[rows].tolist()


@pytest.mark.parametrize("size", [3, 32, 33, 4000])
@pytest.mark.parametrize("queries", [5, 9])  # few look at second bits where they lie, many at all of them in turn
@pytest.mark.parametrize("some", [True, False])
def test_sift(size: int, queries: int, some: bool) -> None:
    (first, second), signs, weights = words(2, size, 5), words(queries, 5, seed=1), words(queries, 3, 5, seed=2)
    allowed = np.random.default_rng(3).random(size) < 0.5 if some else np.empty(0, bool)
    limits = np.resize(np.array([0, 500, 550, 600, 2300], np.uint64), queries)
    rows, closer = np.empty((2, queries, size + 512), np.uint32)
    found = np.empty(queries, np.int64)
    assert sift(grouped(first), second, allowed, signs, weights, limits, rows, closer, found)
    for query in range(queries):
        true = weighed(first, signs[query], weights[query])
        those = np.flatnonzero((true <= limits[query]) & (allowed if some else True))
        both = 2 * true + weighed(second, signs[query], weights[query])
        assert rows[query, : found[query]].tolist() == those.tolist()
        assert closer[query, : found[query]].tolist() == both[those].tolist()


def test_sift_without_room() -> None:
    rows, closer = np.empty((2, 1, 600), np.uint32)
    equal, weights = np.zeros((1000, 1), np.uint64), words(1, 3, 1)
    given = np.empty(0, bool), np.zeros((1, 1), np.uint64), weights, np.zeros(1, np.uint64)
    assert not sift(grouped(equal), equal, *given, rows, closer, np.empty(1, np.int64))


@pytest.mark.parametrize(("size", "step"), [(3, 1), (5000, 1), (5000, 3), (5000, 99)])
@pytest.mark.parametrize("some", [True, False])
def test_likely_limits(size: int, step: int, some: bool) -> None:
    rows, signs, weights = words(size, 2), words(4, 2, seed=1), words(4, 3, 2, seed=2)
    allowed = np.random.default_rng(3).random(size) < 0.5 if some else np.empty(0, bool)
    blocks = np.arange(size) // GROUP % step == 0
    looked_at = np.flatnonzero(blocks & allowed if some else blocks)
    for count in (1, 40):
        limits = np.empty(4, np.uint64)
        likely_limits(grouped(rows), size, allowed, signs, weights, step, count, limits)
        for query in range(4):
            sums = np.sort(weighed(rows, signs[query], weights[query])[looked_at])
            assert limits[query] == (sums[count - 1] if count <= len(sums) else 2 * 64 * 7)


@pytest.mark.parametrize("count", [1, 20, 799, 800, 900])
def test_smallest(count: int) -> None:
    sums = np.random.default_rng(0).integers(0, 40, 800).astype(np.uint32)
    rows = np.arange(800)
    most = np.sort(sums)[min(count, 800) - 1]
    assert rows[: smallest(rows, sums, count)].tolist() == np.flatnonzero(sums <= most).tolist()


def test_every_half_is_widened_to_the_bit() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))].reshape(2, -1)  # vectors hold no infinity
    wide = np.empty(bits.shape, np.float32)
    widen(bits, wide)
    assert wide.tobytes() == bits.view(np.float16).astype(np.float32).tobytes()


def test_products() -> None:
    random = np.random.default_rng(0)
    rows, query = random.standard_normal((50, 77)).astype(np.float16), random.standard_normal(77).astype(np.float32)
    rows[3] *= np.float16(1e-6)  # below float16's normal range
    scores = np.empty(50, np.float32)
    products(rows.view(np.uint16), query, scores)
    assert scores == pytest.approx(rows.astype(np.float64) @ query, abs=1e-5)
    some = np.array([49, 3, 3, 0])
    products_of(some, rows.view(np.uint16), query, of_some := np.empty(4, np.float32))
    assert of_some.tobytes() == scores[some].tobytes(), "whatever else is multiplied"


def test_words_that_do_not_lie_side_by_side_are_refused() -> None:
    groups = grouped(words(64, 2)).swapaxes(0, 1).copy().swapaxes(0, 1)
    with pytest.raises(TypeError, match="as they lie in memory"):
        scan(groups, words(2), words(3, 2), np.empty(64, np.uint32))


def test_they_run_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """A package folder and a home that cannot be written to, as in a container."""
    blocked = tmp_path / "a file"
    blocked.write_text("")
    package = tmp_path / "package"
    package.mkdir()
    (package / "loops.py").write_text(Path(compiled.__file__).read_text())
    (package / "__pycache__").write_text("in the way")
    code = (
        "import numpy as np, loops; found = np.zeros(1, np.float32); "
        "loops.products(np.ones((1, 2), np.uint16), np.ones(2, np.float32), found); print(found > 0)"
    )
    environment = {"PYTHONPATH": str(package), "HOME": str(blocked), "XDG_CACHE_HOME": str(blocked), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == "[ True]\n", run.stderr
