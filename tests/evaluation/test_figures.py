from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lamplit.errors import UsageError
from lamplit.evaluation.report.figures import SUPERVISED, Figure, read_figures

FIGURES = read_figures()
CLASSIFICATION, RETRIEVAL = "zero-shot classification", "image-text retrieval"
# What Papers with Code listed: data set, metric, percent
LISTED = [
    ("ImageNet", "Accuracy (Private)", 84.5), ("ImageNet", "Accuracy (Public)", 75.7),
    ("ImageNet ReaL", "Accuracy (Private)", 88.0), ("ImageNet ReaL", "Accuracy (Public)", 82.2),
    ("ImageNet V2", "Accuracy (Private)", 78.7), ("ImageNet V2", "Accuracy (Public)", 66.6),
    ("ImageNet-A", "Accuracy (Private)", 79.4), ("ImageNet-A", "Accuracy (Public)", 37.8),
    ("ImageNet-R", "Accuracy", 93.9),
    ("ObjectNet", "Accuracy (Private)", 81.1), ("ObjectNet", "Accuracy (Public)", 54.5),
    ("ObjectNet", "Top-1 Accuracy", 82.5),
]  # fmt: skip


def table_1(model: str) -> dict[str, float]:
    ends = ("Table 1", "Tables 1 and 13")
    return {
        figure.benchmark: figure.value for figure in FIGURES if figure.model == model and figure.source.endswith(ends)
    }


def test_the_twelve_rows_of_papers_with_code() -> None:
    listed = [figure for figure in FIGURES if figure.leaderboard]
    assert sorted((*f.leaderboard.split(" | ")[1:], round(100 * f.value, 1)) for f in listed) == LISTED
    later = [figure for figure in listed if figure.revision == "v3"]
    assert [(figure.benchmark, figure.value) for figure in later] == [("objectnet", 0.825)]
    assert all(figure.revision == "v1" for figure in listed if figure not in later)
    assert {figure.model for figure in listed} == {"LiT", "LiT-tuning"}


def test_first_and_third_revision_are_both_there() -> None:
    def best(benchmark: str, revision: str) -> float:
        return max(
            f.value for f in FIGURES if (f.benchmark, f.revision, f.task) == (benchmark, revision, CLASSIFICATION)
        )

    assert (best("imagenet", "v1"), best("imagenet", "v3")) == (0.845, 0.852)
    assert (best("imagenet-a", "v1"), best("imagenet-a", "v3")) == (0.794, 0.818)


def test_table_1() -> None:
    assert list(table_1("LiT g/14").values()) == [0.852, 0.798, 0.949, 0.818, 0.825, 0.886, 0.747]
    public = table_1("LiT L/16")
    assert [public[name] for name in ("imagenet", "imagenet-r", "imagenet-real")] == [0.757, 0.604, 0.821]
    assert table_1("CLIP") == {
        "imagenet": 0.762, "imagenet-v2": 0.701, "imagenet-r": 0.889, "imagenet-a": 0.772, "objectnet": 0.723,
    }  # fmt: skip
    assert table_1("CLIP-YFCC") == {"imagenet": 0.313}
    assert table_1("OpenCLIP") == {"imagenet": 0.348, "imagenet-v2": 0.3}
    assert len(table_1("ALIGN")) == 4
    supervised = [figure for figure in FIGURES if figure.task == SUPERVISED]
    assert {figure.model for figure in supervised} == {"ResNet50"}
    assert len(supervised) == 7


def test_table_13_is_complete() -> None:
    """47 rows; all have ImageNet and both directions of COCO, one has no VTAB and one only its natural part."""
    rows = Counter((f.benchmark, f.metric) for f in FIGURES if "13" in f.source)
    assert rows == {
        ("imagenet", "accuracy@1"): 47,
        ("coco", "image_to_text/recall@1"): 47,
        ("coco", "text_to_image/recall@1"): 47,
        ("vtab-natural", "accuracy@1"): 46,
        ("vtab-specialized", "accuracy@1"): 45,
        ("vtab-structured", "accuracy@1"): 45,
    }
    [best] = [f for f in FIGURES if f.benchmark == "coco" and f.value == 0.593]
    assert (best.model, best.task) == ("LiT g/14", RETRIEVAL)


def test_released_models() -> None:
    cards = {
        (f.checkpoint, f.benchmark): f.value for f in FIGURES if "model card" in f.source and f.metric == "accuracy@1"
    }
    assert cards["B16B_2", "imagenet"] == 0.739
    assert cards["B16B_2", "imagenet-v2"] == 0.651
    assert cards["L16L", "cifar100"] == 0.805
    assert cards["L16L", "resisc45"] == 0.256
    both = {f.value for f in FIGURES if f.checkpoint == "B16B_2" and f.metric == "image_to_text/recall@1"}
    assert both == {0.516, 0.515}, "the model card and the README differ"
    assert [f.value for f in FIGURES if f.task == "few-shot classification"] == [0.639, 0.771, 0.225, 0.612, 0.606]


def test_every_figure_has_a_source_and_is_a_share() -> None:
    assert len(FIGURES) == 362
    assert len(set(FIGURES)) == len(FIGURES)
    for figure in FIGURES:
        assert 0 < figure.value < 1
        assert figure.source
        assert figure.data
        assert figure.revision in ("v1", "v3") or "arXiv" not in figure.source
        assert figure.leaderboard.count(" | ") in (0, 2)
        assert (figure.benchmark == "coco") == ("recall" in figure.metric) == (figure.task == RETRIEVAL)


@pytest.mark.parametrize("model", ["lit:L16L", "L16L", "LiT-L16L", "lit:/models/LiT-L16L.npz"])
def test_released_model_is_known_by_its_names(model: str) -> None:
    assert {f.model for f in FIGURES if f.is_of(model)} == {"LiT L/16", "LiT-L16L"}


@pytest.mark.parametrize("model", ["runs/L16L", "lit:L16S", "lit:B16B_2x", ""])
def test_other_models_are_not(model: str) -> None:
    assert not any(figure.is_of(model) for figure in FIGURES)


def test_own_file(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("model,metric,benchmark,task,value,note\nmine,accuracy@1,stamps,zero-shot classification,0.5,x\n")
    assert read_figures(file) == [Figure("stamps", CLASSIFICATION, "accuracy@1", 0.5, "mine")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no figures; expected a CSV file with the columns benchmark, task, metric, value, model"),
        ("benchmark,task\na,b\n", "has no figures"),
        ("benchmark,task,metric,value,model\na,b,accuracy@1,75.7,m\n", "write 75.7 % as 0.757"),
        ("benchmark,task,metric,value,model\na,b,accuracy@1,nan,m\n", "figures are between 0 and 1"),
        ("benchmark,task,metric,value,model\na,b,accuracy@1,high,m\n", "line 2 of .* is no figure"),
        ("benchmark,task,metric,value,model\na,b,accuracy@1,0.5,\n", "line 2 of .* is no figure"),
        ('benchmark,task,metric,value,model\n"a', "cannot be read as a CSV file"),
    ],
)
def test_what_is_no_file_of_figures(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_figures(file)
