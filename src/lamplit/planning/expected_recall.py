"""What recall a collection of this size reached: is your data enough?"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

_FILE = "planning/learning_curves.json"  # what benchmarks/learning_curves.py --json writes
_MORE = 10
_NAMES = {"start": "in closed form", "both": "tuned"}  # by the benchmark's names


def expected_recall(images: int) -> dict[str, float]:
    """Tell what recall so many captioned icons reached, for a guess at what other images will.

    It is image_to_text/recall@5 among 2,000 captions, with the demo towers at the defaults. Between the numbers of
    images that were tried it is interpolated, by their logarithm; beyond them it is that of the nearest one.

    Args:
        images: number of images, those included that `tune` holds out.

    Returns:
        The number of icons that it is of; recall in closed form, tuned, tuned with ten times as many images if so many
        were tried, and by guessing.
    """
    curves = _curves()
    sizes = np.log([point["images"] for point in curves["points"]])

    def recall(way: str, count: int) -> float:
        means = [float(np.mean(point[way])) for point in curves["points"]]
        return float(np.interp(np.log(max(1, count)), sizes, means))

    fewest, most = (curves["points"][place]["images"] for place in (0, -1))
    found = {"icons": float(min(max(images, fewest), most))}
    found |= {name: recall(way, images) for way, name in _NAMES.items()}
    if _MORE * images <= most:
        found["tuned, ten times as many"] = recall("both", _MORE * images)
    return found | {"guessing": float(curves["chance"])}


@cache
def _curves() -> dict[str, Any]:
    curves: dict[str, Any] = json.loads((files("lamplit") / _FILE).read_text(encoding="utf-8"))["figures"][0]
    return curves
