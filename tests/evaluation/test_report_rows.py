from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.evaluation.report.figures import Figure, figures_of
from lamplit.evaluation.report.report_rows import VTAB_NATURAL, beside, compare, with_means
from lamplit.metrics.results import Measure, Result

CLASSIFICATION = "zero-shot classification"


def result(benchmark: str = "imagenet", value: float = 0.76, half: float = 0.01, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "task": CLASSIFICATION, "benchmark": benchmark, "dataset": benchmark.title(), "language": "en",
        "main_metric": "accuracy@1", "metrics": {"accuracy@1": Measure(value, value - half, value + half)},
        "model": {"name": "lit:L16L"}, "protocol": {}, "images": 100,
    }  # fmt: skip
    return Result(**(values | changes))


def figure(value: float, model: str = "other", **changes: Any) -> Figure:
    values: dict[str, Any] = {"benchmark": "imagenet", "task": CLASSIFICATION, "metric": "accuracy@1", "model": model}
    return Figure(**(values | {"value": value} | changes))


@pytest.mark.parametrize(
    ("published", "verdict"), [(0.757, "inside"), (0.75, "inside"), (0.77, "inside"), (0.74, "above"), (0.78, "below")]
)
def test_difference_and_verdict(published: float, verdict: str) -> None:
    [row] = compare([result(half=0.010001)], [figure(published)])
    assert row.difference == pytest.approx(0.76 - published)
    assert row.verdict == verdict
    assert not row.same_model


def test_the_models_own_figure_comes_before_the_first() -> None:
    figures = [figure(0.9), figure(0.757, "LiT L/16", checkpoint="L16L"), figure(0.7, checkpoint="L16L")]
    [row] = compare([result()], figures)
    assert row.reference is figures[1]
    assert row.same_model
    [other] = compare([result(model={"name": "mine"})], figures)
    assert other.reference is figures[0]
    assert not other.same_model
    assert beside(other, figures) == figures


@pytest.mark.parametrize(
    "changes",
    [
        {"benchmark": "imagenet-v2"},
        {"metric": "accuracy@5"},
        {"task": "few-shot classification"},
        {"language": "de"},
        {"task": "supervised classification"},
    ],
)
def test_what_is_not_compared(changes: dict[str, str]) -> None:
    [row] = compare([result()], [figure(0.5, **changes)])
    assert row.reference is None
    assert (row.verdict, row.difference, row.distance) == ("", None, "")
    assert row.in_summary, "the main metric is shown with nothing beside it"
    assert len(beside(row, [figure(0.5, **changes)])) == ("supervised" in changes.get("task", ""))


def test_results_of_another_folder_are_of_the_same_measurement() -> None:
    """The same data set, column and split; and of several ways the same, if it is there."""
    earlier = [
        result(value=0.1, column="animal", dataset="/data/own.lance"),
        result(value=0.2, column="size", dataset="/data/own.lance", protocol={"templates": "clip-7"}),
        result(value=0.3, column="size", dataset="/data/own.lance", protocol={"templates": "clip-80"}),
        result(value=0.4, column="size", split="held_out", dataset="/data/own.lance"),
        result(value=0.5, column="size", dataset="/data/other.lance"),
    ]
    figures = figures_of(earlier, "old")
    for again in earlier:
        [row] = compare([again], figures)
        assert row.difference == pytest.approx(0)
    [row] = compare([result(column="colour", dataset="/data/own.lance")], figures)
    assert row.reference is None
    [row] = compare([result(column="size", dataset="/data/own.lance", protocol={"templates": "name"})], figures)
    assert row.reference is figures[1]


def test_order_is_that_of_the_figures_then_of_names() -> None:
    results = [
        result("zebras"), result("coco", task="image-text retrieval"), result("imagenet", language="de"),
        result("imagenet"), result("imagenet", task="few-shot classification"), result("apes"), result("objectnet"),
    ]  # fmt: skip
    rows = compare(results, [figure(0.5, benchmark="objectnet"), figure(0.5)])
    assert [row.name for row in rows] == [
        "Objectnet", "Imagenet", "Imagenet (de)", "Apes", "Zebras", "Imagenet, few-shot", "Coco",
    ]  # fmt: skip


def test_ranks_are_not_percent() -> None:
    metrics = {"image_to_text/median_rank": Measure(2.0, 2.0, 3.0)}
    [row] = compare([result(metrics=metrics)], [figure(4.0, metric="image_to_text/median_rank")])
    assert row.words()[3:] == ("2", "2 to 3", "4", "other", "−2.0", "below")


def test_words() -> None:
    [row] = compare([result(value=0.7612)], [figure(0.757)])
    assert row.words() == (
        "Imagenet", "accuracy@1", "lit:L16L", "76.1", "75.1 to 77.1", "75.7", "other", "+0.4", "inside",
    )  # fmt: skip


def test_vtab_natural_is_the_mean_of_all_seven() -> None:
    parts = [result(name, value=0.1 * place, half=0.07) for place, name in enumerate(VTAB_NATURAL)]
    [*same, mean] = with_means(parts)
    assert same == parts
    assert mean.benchmark == "vtab-natural"
    assert mean.images == 700
    measure = mean.metrics["accuracy@1"]
    assert measure.value == pytest.approx(0.3)  # (0 + 0.1 + ... + 0.6) / 7
    assert measure.high - measure.value == pytest.approx(0.07 / math.sqrt(7))
    [*_, row] = compare([mean], [figure(0.31, benchmark="vtab-natural")])
    assert row.verdict == "inside"


def test_vtab_natural_needs_all_seven_of_one_model() -> None:
    parts = [result(name) for name in VTAB_NATURAL]
    assert with_means(parts[1:]) == parts[1:]
    mixed = [*parts[1:], result(VTAB_NATURAL[0], model={"name": "another"})]
    assert with_means(mixed) == mixed
    few = [*parts[1:], result(VTAB_NATURAL[0], task="few-shot classification")]
    assert with_means(few) == few


@given(st.lists(st.floats(0, 1), min_size=7, max_size=7), st.floats(0, 0.2))
def test_mean_lies_in_its_interval_which_is_no_wider_than_its_widest(values: list[float], half: float) -> None:
    parts = [result(name, value, half) for name, value in zip(VTAB_NATURAL, values, strict=True)]
    measure = with_means(parts)[-1].metrics["accuracy@1"]
    assert measure.low <= measure.value <= measure.high
    assert measure.high - measure.value <= half + 1e-9
    assert min(values) - 1e-9 <= measure.value <= max(values) + 1e-9
