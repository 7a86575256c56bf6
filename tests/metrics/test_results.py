from __future__ import annotations

import json
import re
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


FORMAT_1 = Path(__file__).parent / "format1"  # as lamplit wrote them before "picture" became "image", shortened


def test_roundtrip_json(tmp_path: Path):
    written = result(per_class=[{"name": "<b>", "images": 3, "accuracy": 0.1}], recall_curve={"a": [0.1, 0.2]})
    file = written.write(tmp_path / "new")
    assert file.name == "imagenet-v2.en.zero-shot.runs_my_model.29d920d6.json"
    assert read_results(tmp_path / "new") == [written]


OTHERS = [
    {"language": "de"},
    {"dataset": "/b/stamps.lance"},
    {"source": "/elsewhere"},
    {"column": "text_de"},
    {"column": "text_fr", "split": "all"},
    {"split": "held_out"},
    {"model": {"name": "run", "fingerprint": "1" * 32}},
    {"model": {"name": "run", "fingerprint": "2" * 32}},
    {"protocol": {"templates": ["{}"], "notes": []}},
    {"protocol": {"templates": "clip-80", "resize_mode": "crop", "notes": []}},
    {"main_metric": "10-shot_accuracy"},
    {"protocol": {"templates": "clip-80", "class_names": "cat, dog", "notes": []}},
    {
        "model": {
            "name": "efficientnet-lite0-minilm-rate3e-4-batch4096-warmup500-decay1e-4-seed0",
            "fingerprint": "3" * 32,
        }
    },
    {
        "model": {
            "name": "efficientnet-lite0-minilm-rate3e-4-batch4096-warmup500-decay1e-4-seed1",
            "fingerprint": "4" * 32,
        }
    },
]


def test_results_do_not_overwrite_each_other(tmp_path: Path):
    names = {result(**changed).write(tmp_path).name for changed in OTHERS}
    assert len(names) == len(OTHERS) == len(read_results(tmp_path))
    again = result(seconds=3.0, time="2026-01-01", protocol={"templates": "clip-80", "notes": ["late"]})
    assert again.file_name == result().file_name, "the same measurement of the same model, made again"


def test_names_of_other_scripts_make_a_file_name_that_systems_take(tmp_path: Path):
    name = "日本の古い切手と絵葉書の全コレクション二千二十六年版" * 3
    written = result(
        benchmark=name,
        dataset=f"/{name}2",
        column=name,
        split="held_out",
        model={"name": name, "fingerprint": "5" * 32},
    ).write(tmp_path)
    assert len(written.name.encode()) <= 255
    assert len(read_results(tmp_path)) == 1


def test_repr():
    assert repr(result()) == "<Result imagenet-v2: accuracy@1 0.500 [0.400, 0.600]>"
    assert repr(result(split="all", metrics={})) == "<Result imagenet-v2 all: accuracy@1>"


def test_file_name():
    """Data set, column, split, language, task, model and its fingerprint; then digits of all that was asked."""
    measured = result(
        benchmark="stamps", dataset="/data/stamps.lance", column="text_de", split="held_out", language="own",
        task="image-text retrieval", model={"name": "run", "fingerprint": "0123456789abcdef"},
    )  # fmt: skip
    assert re.fullmatch(
        r"stamps\.text_de\.held_out\.own\.image-text\.run-01234567\.[0-9a-f]{8}\.json", measured.file_name
    )
    folder = result(benchmark="folder", dataset="my shapes")
    assert folder.file_name.startswith("folder.my_shapes.en.zero-shot.")
    assert len(result(benchmark="b" * 300, model={"name": "m" * 300}).file_name.encode()) < 255


def test_format_1():
    """Older files had other names for some fields, nested ones too."""
    retrieval, zero_shot = read_results(FORMAT_1)
    assert (retrieval.images, retrieval.captions, retrieval.split, retrieval.column) == (139, 125, "held_out", "texts")
    assert (zero_shot.images, zero_shot.classes) == (701, 15)
    assert (zero_shot.column, zero_shot.split) == ("category", "")
    assert all(
        row["images"] > 0 for row in (*zero_shot.per_class, *zero_shot.confusions, *zero_shot.reliability["bins"])
    )
    assert zero_shot.model["image_tower_fingerprint"] == "6cd941a6b86f8098e46e8c79b86ffaad"
    assert "fingerprint" not in zero_shot.model, "nobody noted that of the model itself"


def test_format_1_is_written_as_the_newest(tmp_path: Path):
    for found in read_results(FORMAT_1):
        found.write(tmp_path)
    assert {json.loads(file.read_text())["format"] for file in tmp_path.iterdir()} == {2}
    assert sorted(map(repr, read_results(tmp_path))) == sorted(map(repr, read_results(FORMAT_1)))
    assert "pictures" not in "".join(file.read_text() for file in tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "metrics": {"a": 3}}', "null"])
def test_other_files_are_refused(tmp_path: Path, content: str):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=r"a\.json is not a result that lamplit evaluate wrote"):
        read_results(tmp_path)


def test_newer_format_and_empty_folder(tmp_path: Path):
    with pytest.raises(UsageError, match="no results in"):
        read_results(tmp_path)
    file = result().write(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 3}))
    with pytest.raises(UsageError, match="newer lamplit"):
        read_results(tmp_path)
