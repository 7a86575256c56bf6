from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamplit.errors import UsageError
from lamplit.metrics.results import Measure, Result, read_results


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
