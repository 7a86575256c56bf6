"""Each compiled loop against numpy's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lamplit.retrieval.kernels as compiled
from lamplit.retrieval.kernels import count_values, look_closer, products, rows_within, scan, widen


def words(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, shape, dtype=np.uint64)


def weighed(words: np.ndarray, signs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What `scan` gives, by numpy."""
    ones = [np.bitwise_count((words ^ signs) & plane).sum(1, dtype=np.int64) for plane in weights]
    return np.stack([2**bit * counts for bit, counts in enumerate(ones)]).sum(0)


@pytest.mark.parametrize("width", [1, 8, 20])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_scan_and_look_closer(width: int, kind: type) -> None:
    first, second = words(2, 333, width)
    signs, weights = words(width, seed=1), words(3, width, seed=2)
    distances = np.empty(333, kind)
    scan(first, signs, weights, distances)
    assert distances.tolist() == weighed(first, signs, weights).tolist()
    rows = np.array([0, 7, 332])
    closer = np.empty(3, np.uint32)
    look_closer(distances, second, rows, signs, weights, closer)
    assert closer.tolist() == (2 * weighed(first, signs, weights) + weighed(second, signs, weights))[rows].tolist()


def test_counts_and_rows() -> None:
    values = np.random.default_rng(0).integers(0, 50, 999).astype(np.uint16)
    counts = np.zeros(51, np.int64)
    count_values(values, counts)
    assert counts.tolist() == np.bincount(values, minlength=51).tolist()
    rows = np.empty(999, np.int64)
    found = rows_within(values, 7, rows)
    assert rows[:found].tolist() == np.flatnonzero(values <= 7).tolist()


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


def test_they_run_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """A package folder and a home that cannot be written to, as in a container."""
    blocked = tmp_path / "a file"
    blocked.write_text("")
    package = tmp_path / "package"
    package.mkdir()
    (package / "loops.py").write_text(Path(compiled.__file__).read_text())
    (package / "__pycache__").write_text("in the way")
    code = (
        "import numpy as np, loops; found = np.zeros(3, int); loops.count_values(np.array([2, 2]), found); print(found)"
    )
    environment = {"PYTHONPATH": str(package), "HOME": str(blocked), "XDG_CACHE_HOME": str(blocked), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == "[0 0 2]\n", run.stderr
