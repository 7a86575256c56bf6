"""Made-up unit vectors, for tests of search."""

from __future__ import annotations

import numpy as np


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def unit_rows(size: int, width: int, seed: int = 0, groups: int = 0) -> np.ndarray:
    """Random unit vectors; with `groups`, around so many centres and far from the origin, as images are."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((size, width))
    if groups:
        centers = random.standard_normal((groups, width)) * 2 + 1
        rows = rows + centers[random.integers(groups, size=size)]
    return unit(rows)
