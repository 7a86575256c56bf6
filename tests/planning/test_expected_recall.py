"""What recall to expect is that of the learning curves: what was measured, and between two sizes something between."""

from __future__ import annotations

import json
from importlib.resources import files
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.planning.expected_recall import expected_recall

CURVES = json.loads((files("lamplit") / "planning/learning_curves.json").read_text(encoding="utf-8"))["figures"][0]
POINTS = CURVES["points"]
WAYS = {"in closed form": "start", "tuned": "both"}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: str(point["images"]))
def test_sizes_that_were_tried(point: dict[str, list[float]]) -> None:
    found = expected_recall(point["images"])  # type: ignore[arg-type]
    for name, way in WAYS.items():
        assert found[name] == pytest.approx(mean(point[way]))
    assert found["guessing"] == CURVES["chance"] == 5 / CURVES["captions"]


@given(st.integers(0, 10**12))
def test_other_sizes_lie_between_their_neighbours(images: int) -> None:
    found = expected_recall(images)
    below = [point for point in POINTS if point["images"] <= images] or POINTS[:1]
    above = [point for point in POINTS if point["images"] >= images] or POINTS[-1:]
    for name, way in WAYS.items():
        ends = sorted(mean(point[way]) for point in (below[-1], above[0]))
        assert ends[0] - 1e-9 <= found[name] <= ends[1] + 1e-9
    assert found["icons"] == min(max(images, POINTS[0]["images"]), POINTS[-1]["images"])
    if 10 * images <= POINTS[-1]["images"]:
        assert found["tuned, ten times as many"] == expected_recall(10 * images)["tuned"]
    else:
        assert "tuned, ten times as many" not in found


def test_curves_are_real_ones() -> None:
    """They were measured on the icons, and more images gave more recall, far above guessing."""
    assert CURVES["data"] == "icons"
    tuned = [mean(point["both"]) for point in POINTS]
    assert tuned == sorted(tuned)
    assert tuned[0] > 5 * CURVES["chance"]
