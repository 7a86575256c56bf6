"""Where the points of a map lie dense, and what these places are called."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from lamplit.retrieval.map_regions import TOLD_BY, Region, find_regions, name_regions

MIDDLES = np.array([[-0.6, -0.6], [0.6, -0.5], [0.0, 0.7]])
WORDS = ["cat", "dog", "boat"]


def cloud(size: int) -> NDArray[np.float32]:
    """Points around three places, one place after the other; each has fewer than the one before."""
    generator = np.random.default_rng(3)
    parts = [middle + 0.05 * generator.standard_normal((size // (n + 1), 2)) for n, middle in enumerate(MIDDLES)]
    points: NDArray[np.float32] = np.concatenate(parts).astype(np.float32)
    return points


def place_of(region: Region) -> int:
    return int(np.square(MIDDLES - (region.x, region.y)).sum(1).argmin())


def test_dense_places_are_regions() -> None:
    regions = find_regions(cloud(600))
    coarse = [region for region in regions if region.level == 0]
    assert [place_of(region) for region in coarse] == [0, 1, 2]  # the largest first
    assert [region.images for region in coarse] == [600, 300, 200]
    for region in coarse:
        assert np.hypot(*(MIDDLES[place_of(region)] - (region.x, region.y))) < 0.05
        assert len(region.rows) == TOLD_BY
        assert (np.diff(region.rows) > 0).all()
    begins = [0, 600, 900, 1100]
    assert all(begins[n] <= region.rows.min() <= region.rows.max() < begins[n + 1] for n, region in enumerate(coarse))
    finer = [region for region in regions if region.level == 2]
    assert len(finer) > len(coarse)
    assert sum(region.images for region in finer) <= 1100


@pytest.mark.parametrize("points", [np.zeros((0, 2)), np.zeros((3, 2)), np.ones((50, 2)), np.full((50, 2), -1)])
def test_few_or_equal_points(points: NDArray[np.float64]) -> None:
    regions = find_regions(points.astype(np.float32))
    assert [region.images for region in regions] == [50] * 3 * (len(points) == 50)


def test_region_is_named_by_the_words_that_fit_it_better_than_others() -> None:
    regions = [region for region in find_regions(cloud(600)) if region.level == 0]
    # All images lean to the word that every caption has: what is alike in all says nothing of one of them.
    axes = np.eye(5, dtype=np.float32)

    def vectors(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        kinds = np.searchsorted([600, 900], rows, side="right")
        return 2 * axes[3] + axes[kinds]

    def captions(rows: NDArray[np.int64]) -> Sequence[Sequence[str]]:
        kinds = np.searchsorted([600, 900], rows, side="right")
        return [[f"A {WORDS[kind]} 12", "ab"] if kind != 2 else [f"zeppelin {WORDS[kind]}"] for kind in kinds]

    def encode(words: list[str]) -> NDArray[np.float32]:
        assert words == sorted({*WORDS, "zeppelin"})  # no number, and no word of two letters
        place = {"cat": 0, "dog": 1, "boat": 2, "zeppelin": 4}
        return np.stack([axes[place[word]] + axes[3] for word in words])

    assert name_regions(regions, vectors, captions, encode) == ["cat", "dog", "boat, zeppelin"]


def test_without_captions_there_are_no_names() -> None:
    regions = find_regions(cloud(100))

    def never(words: list[str]) -> NDArray[np.float32]:
        raise AssertionError(words)

    none: list[list[str]] = []
    assert set(name_regions(regions, lambda rows: np.ones((len(rows), 4)), lambda rows: none, never)) == {""}  # type: ignore[arg-type, return-value]
