from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.errors import UsageError
from lamplit.metrics.results import Measure, Result, measure, read_results


def result(**changed) -> Result:
    values = {
        "task": "zero-shot classification",
        "benchmark": "imagenet-v2",
        "dataset": "ImageNet V2",
        "language": "en",
        "main_metric": "accuracy@1",
        "metrics": {"accuracy@1": Measure(0.5, 0.4, 0.6)},
        "model": {"name": "runs/my model"},
        "protocol": {"templates": "clip-80", "notes": []},
        "per_class": [],
        "confusions": [],
        "images": 10,
    }
    return Result(**values | changed)


def test_a_trip_through_a_file_changes_nothing(tmp_path: Path):
    written = result(per_class=[{"name": "<b>", "images": 3, "accuracy": 0.1}], recall_curve={"a": [0.1, 0.2]})
    file = written.write(tmp_path / "new")
    assert file.name == "imagenet-v2.en.zero-shot.runs_my_model.json"
    assert read_results(tmp_path / "new") == [written]


def test_same_measurement_overwrites_and_another_does_not(tmp_path: Path):
    for language in ("en", "de", "en"):
        result(language=language).write(tmp_path)
    assert [found.language for found in read_results(tmp_path)] == ["de", "en"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "metrics": {"a": 3}}', "null"])
def test_other_files_are_refused(tmp_path: Path, content: str):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=r"a\.json is not a result that lamplit evaluate wrote"):
        read_results(tmp_path)


def test_newer_format_and_empty_folder(tmp_path: Path):
    with pytest.raises(UsageError, match="no results in"):
        read_results(tmp_path)
    file = result().write(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(UsageError, match="newer lamplit"):
        read_results(tmp_path)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=1, max_size=40))
def test_measure_is_numpy_s_mean_and_median_within_its_interval(values):
    for statistic in ("mean", "median"):
        found = measure(values, statistic=statistic)
        assert found.value == pytest.approx(getattr(np, statistic)(values))
        assert min(values) <= found.low <= found.high <= max(values)
        assert found == measure(values[::-1], statistic=statistic), "their order does not matter, and the seed is fixed"


def test_interval_is_that_of_a_plain_bootstrap():
    """Resampled one by one, as the textbook does it."""
    values = np.random.default_rng(3).integers(1, 30, 200).astype(float)
    drawn = np.random.default_rng(4).choice(values, (4000, 200))
    for statistic, slow in (("mean", drawn.mean(1)), ("median", np.median(drawn, axis=1))):
        found = measure(values, statistic=statistic)
        low, high = np.percentile(slow, [2.5, 97.5])
        assert found.low == pytest.approx(low, abs=0.5)
        assert found.high == pytest.approx(high, abs=0.5)
    wide = measure(np.repeat([0, 1], 50))
    narrow = measure(np.repeat([0, 1], 5000))
    assert (wide.low, wide.high) == pytest.approx((0.40, 0.60), abs=0.02)
    assert (narrow.low, narrow.high) == pytest.approx((0.49, 0.51), abs=0.003)
