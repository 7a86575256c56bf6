from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lamplit.retrieval.heat_picture import draw_heat, spread


def spread_slowly(values: list[list[float]], window: tuple[float, ...], size: tuple[int, int]) -> list[list[float]]:
    """Pixel by pixel: the weighted sum of the four places around it; beyond the outer middles, the nearest ones."""
    left, top, right, bottom = window
    height, width = len(values), len(values[0])
    rows = []
    for y in range(size[1]):
        row = []
        for x in range(size[0]):
            if not (left <= x + 0.5 <= right and top <= y + 0.5 <= bottom):
                row.append(math.nan)
                continue
            down = (y + 0.5 - top) / (bottom - top) * height - 0.5
            across = (x + 0.5 - left) / (right - left) * width - 0.5
            total = 0.0
            for i in (math.floor(down), math.floor(down) + 1):
                for j in (math.floor(across), math.floor(across) + 1):
                    weight = (1 - abs(down - i)) * (1 - abs(across - j))
                    total += weight * values[min(max(i, 0), height - 1)][min(max(j, 0), width - 1)]
            row.append(total)
        rows.append(row)
    return rows


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.floats(-3, 5), st.floats(-3, 5), st.floats(1, 15), st.floats(1, 15)),
    st.randoms(use_true_random=False),
)
def test_spread_is_the_slow_one(shape, size, box, random):
    window = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    values = [[random.uniform(-1, 1) for _ in range(shape[1])] for _ in range(shape[0])]
    found = spread(np.array(values, np.float32), window, size)
    np.testing.assert_allclose(found, spread_slowly(values, window, size), atol=1e-5)


def test_map_lies_in_its_window():
    found = spread(np.array([[1, 0]], np.float32), (2, 1, 6, 3), (8, 4))
    assert np.isnan(found[[0, 3]]).all()
    assert np.isnan(found[:, [0, 1, 6, 7]]).all()
    assert found[1, 2:6].tolist() == found[2, 2:6].tolist() == [1, 0.75, 0.25, 0]


def channels(image: Image.Image, x: int, y: int) -> np.ndarray:
    return np.asarray(image, int)[y, x]


def test_drawing_is_orange_at_the_peak_pale_below_half_of_it_and_hatched_outside():
    picture = Image.new("RGB", (80, 40), (0, 80, 200))
    drawn = draw_heat(picture, np.array([[0.4, 0.2, -5, 0.3]], np.float32), (0, 0, 80, 20))
    assert drawn.size == picture.size
    hot, pale, below, middle = (channels(drawn, x, 5) for x in (5, 30, 50, 75))
    assert hot.tolist() == [0, 44, 20]  # the picture through orange glass
    assert np.ptp(pale) == 0
    assert below.tolist() == pale.tolist()
    assert middle == pytest.approx((hot + pale) / 2, abs=1)
    outside = np.asarray(drawn)[20:].reshape(-1, 3)
    assert len(np.unique(outside, axis=0)) == 2, "lines and what is between them"
    assert np.ptp(outside, axis=1).max() == 0


@pytest.mark.parametrize("values", [[[0, 0]], [[-1, -0.5]]])
def test_map_without_anything_above_zero_is_pale(values):
    drawn = np.asarray(draw_heat(Image.new("RGB", (8, 8), "red"), np.array(values, np.float32), (0, 0, 8, 8)))
    assert np.ptp(drawn, axis=-1).max() == 0
