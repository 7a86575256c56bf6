from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, write_store
from torch import Tensor

import lamplit
from lamplit.errors import StoreError, TowerError, UsageError
from lamplit.metrics.calibration import (
    expected_calibration_error,
    fit_temperature,
    halves,
    label_thresholds,
    none_threshold,
)
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.images.image_tower import ImageTower
from lamplit.zeroshot.calibration_report import CalibrationReport
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.class_making import make_classes

NAMES = list(SHAPES)
THREE = ["circle", "square", "ring"]


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path, towers="text")


def relabelled(store: Store, path: Path, labels: Sequence[object]) -> Store:
    """Copy a store, with labels of other names."""
    ids, vectors = store.column("id"), store.vectors()
    rows = [Row(ids[i], ids[i], ids[i], [], vectors[i], {"label": label}) for i, label in enumerate(labels)]
    return Store.create(path, store.tower, rows, backend="torch", metadata_columns=["label"])


@pytest.fixture
def with_others(store: Store, tmp_path: Path) -> Store:
    """Crosses and triangles are none of the three classes; the first image has no label."""
    labels = [shape if shape in THREE else "none" for shape in store.column("shape")]
    return relabelled(store, tmp_path / "others.lance", [None, *labels[1:]])


def made(model: LiT, *args: object, **options: object) -> tuple[ClassList, CalibrationReport]:
    classes = make_classes(model, *args, **options)  # type: ignore[arg-type]
    assert classes.report is not None
    return classes, classes.report


def test_without_a_sample_it_is_the_model_as_it_is(model: LiT) -> None:
    classes = make_classes(model, NAMES, templates=["a {}"])
    assert classes.report is None
    assert (classes.names, classes.templates, classes.thresholds) == (NAMES, ["a {}"], None)
    assert (classes.logit_multiplier, classes.space) == (
        float(model.logit_multiplier.detach()),
        model.identity.fingerprint,
    )


def test_what_is_fitted_to_the_whole_sample(model: LiT, store: Store) -> None:
    classes, report = made(model, NAMES, sample=store, label_column="shape")
    cosines = store.vectors() @ classes.vectors.T
    labels = torch.tensor([NAMES.index(shape) for shape in store.column("shape")])
    right = cosines.argmax(1) == labels
    assert report.accuracy == pytest.approx(float(right.double().mean()))
    assert classes.logit_multiplier == report.scale_after == pytest.approx(fit_temperature(cosines, labels))
    threshold = none_threshold(cosines.max(1).values, right, torch.zeros(60, dtype=torch.bool))
    assert classes.thresholds == [pytest.approx(threshold)] * 5
    assert report.threshold == classes.thresholds[0]
    before = expected_calibration_error((10 * cosines).softmax(1).max(1).values, right)
    assert report.error_before == pytest.approx(before, abs=1e-5)
    assert (report.images, report.out_of_class, report.unlabelled, report.rejected) == (60, 0, 0, None)
    assert sum(int(row["images"]) for row in report.reliability) == 60
    gaps = sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in report.reliability)
    assert report.error_after == pytest.approx(gaps / 60)
    # Made from a path of the store, it is the same.
    again, same = made(model, NAMES, sample=store.path, label_column="shape")
    assert same == report
    assert again.thresholds == classes.thresholds


def test_figures_after_are_of_images_that_were_not_fitted_to(model: LiT, store: Store, tmp_path: Path) -> None:
    """Labels by chance: nothing can be learned from one half that holds for the other, nor for the whole."""
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    shapes = store.column("shape")
    chance = relabelled(store, tmp_path / "chance.lance", [shapes[i] for i in order])
    classes, report = made(model, NAMES, sample=chance)
    cosines = chance.vectors() @ classes.vectors.T
    labels = torch.tensor([NAMES.index(label) for label in chance.column("label")])
    confidences = (classes.logit_multiplier * cosines).softmax(1).max(1).values
    to_itself = expected_calibration_error(confidences, cosines.argmax(1) == labels)
    assert report.error_after > to_itself
    assert report.kept is not None
    assert report.kept != pytest.approx(0.95, abs=0.01)


def test_out_of_class_images_choose_the_threshold(model: LiT, with_others: Store) -> None:
    classes, report = made(model, THREE, sample=with_others)
    assert (report.images, report.out_of_class, report.unlabelled) == (35, 24, 1)
    rows, truth = classes.read_labels(with_others.column("label"))
    cosines = classes.cosines(with_others.vectors()[rows])
    right = truth.gather(1, cosines.argmax(1, keepdim=True))[:, 0]
    expected = none_threshold(cosines.max(1).values, right, ~truth.any(1))
    assert classes.thresholds == [pytest.approx(expected)] * 3
    assert report.kept is not None
    assert report.rejected is not None
    assert 0 <= report.kept <= 1
    known = truth.any(1)
    assert report.scale_after == pytest.approx(fit_temperature(cosines[known], truth[known].long().argmax(1)))
    # Who asks for a share gets it, whatever else is in the sample.
    strict, _ = made(model, THREE, sample=with_others, keep_rate=1.0)
    assert strict.thresholds is not None
    assert strict.given(cosines).any(1)[right].all()


def test_report_of_each_class(model: LiT, with_others: Store) -> None:
    _, report = made(model, THREE, sample=with_others)
    assert [score.name for score in report.per_class] == THREE
    assert sum(score.images for score in report.per_class) == 35
    for score in report.per_class:
        missed = round(score.images * (1 - (score.recall or 0)))
        assert 0 <= score.mistakes <= missed
        assert (score.mistaken_for is None) == (missed == 0)
        assert score.mistaken_for != score.name


def test_templates_are_suggested_by_the_sample(model: LiT, store: Store) -> None:
    sets = {"bad": ["zzz {} zzz zzz", "qqq {}"], "captions": ["A large red {}.", "A small blue {}."], "name": ["{}"]}
    classes, report = made(model, NAMES, sample=store, label_column="shape", templates="suggest", template_sets=sets)
    assert set(report.template_sets) == set(sets)
    for name, texts in sets.items():
        _, alone = made(model, NAMES, sample=store, label_column="shape", templates=texts)
        assert report.template_sets[name] == alone.accuracy
        assert alone.template_sets == {}
    best = max(sets, key=lambda name: report.template_sets[name])
    assert next(iter(report.template_sets)) == best
    assert (classes.templates, report.accuracy) == (sets[best], report.template_sets[best])
    by_name, _ = made(model, NAMES, sample=store, label_column="shape", templates="name", template_sets=sets)
    assert by_name.templates == ["{}"]


def test_independent_labels(model: LiT, store: Store, tmp_path: Path) -> None:
    pairs = [text[0].split() for text in store.texts()]
    names = ["large", "red", "circle", "square"]
    labels = ["; ".join(name for name in names if name in words or f"{name}." in words) or "none" for words in pairs]
    sample = relabelled(store, tmp_path / "several.lance", labels)
    classes, report = made(model, names, sample=sample, multi_label=True)
    assert classes.multi_label
    assert report.error_before is None, "a model of the softmax has no probabilities of single labels"
    assert [score.images for score in report.per_class] == [30, 10, 12, 12]
    probabilities, given = classes.classify(sample.vectors())
    _, truth = classes.read_labels(labels)
    cosines, held_out = classes.cosines(sample.vectors()), torch.zeros_like(truth)
    for fit_on, judge in halves(60):
        thresholds = torch.tensor(label_thresholds(cosines[fit_on], truth[fit_on]), dtype=torch.float64)
        held_out[judge] = cosines[judge].double() >= thresholds
    assert report.accuracy == pytest.approx(label_f1(held_out, truth)) != label_f1(given, truth)
    assert float(probabilities.mean()) == pytest.approx(float(truth.double().mean()), abs=0.02)
    assert sum(int(row["images"]) for row in report.reliability) == 240
    suggested = made(model, names, sample=sample, multi_label=True, templates="suggest")[1]
    assert suggested.accuracy < max(suggested.template_sets.values()), (
        "chosen on the sample, measured on held-out halves"
    )


def test_f1_of_labels_by_chance(model: LiT, store: Store, tmp_path: Path) -> None:
    """Nothing can be learned from one half that holds for the other, though thresholds fit the whole."""
    shown, fitted = [], []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(60, 5, generator=generator) < 0.2
        labels = [
            "; ".join(name for name, has in zip(NAMES, row, strict=True) if has) or "none" for row in drawn.tolist()
        ]
        sample = relabelled(store, tmp_path / f"chance{seed}.lance", labels)
        classes, report = made(model, NAMES, sample=sample, multi_label=True)
        shown.append(report.accuracy)
        fitted.append(label_f1(classes.given(classes.cosines(sample.vectors())), drawn))
    assert max(shown) < 2 * 0.2 / (1 + 0.2) + 0.05, "what one gets who gives every label, and a little luck"
    assert min(fitted) > max(shown)


def label_f1(given: Tensor, truth: Tensor) -> float:
    return 2 * int((given & truth).sum()) / (int(given.sum()) + int(truth.sum()))


def test_multi_label_without_sample_needs_sigmoid_model(model: LiT) -> None:
    with pytest.raises(UsageError, match="tuned with a softmax, which compares classes"):
        make_classes(model, NAMES, multi_label=True)
    sigmoid = LiT(model.text_tower, model.identity, logit_multiplier=5.0, logit_bias=-2.0).eval()
    classes = make_classes(sigmoid, NAMES, multi_label=True)
    assert classes.logit_bias == -2
    assert classes.thresholds == pytest.approx([0.4] * 5)
    assert classes.probabilities(torch.tensor([[0.4] * 5])).tolist()[0] == pytest.approx([0.5] * 5)


def test_one_class_alone(model: LiT, with_others: Store) -> None:
    labels = ["none" if label != "ring" else "ring" for label in with_others.column("label")]
    sample = relabelled(with_others, Path(with_others.path).with_name("rings.lance"), labels)
    classes, report = made(model, ["ring"], sample=sample)
    assert (report.images, report.out_of_class, report.accuracy) == (12, 48, 1)
    assert report.scale_after == report.scale_before
    assert 0 < int(classes.given(classes.cosines(sample.vectors())).sum()) < 60


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_samples(model: LiT, store: Store, tmp_path: Path, count: int) -> None:
    labels = [*store.column("shape")[:count], *[None] * (60 - count)]
    classes, report = made(model, NAMES, sample=relabelled(store, tmp_path / "tiny.lance", labels))
    assert (report.images, report.unlabelled) == (count, 60 - count)
    assert 0 <= report.error_after <= 1
    assert classes.thresholds is not None


def test_sample_of_files_is_embedded(model_path: Path, image_folder: Path, tmp_path: Path) -> None:
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["shape"] in ("ring", "cross")][:6]
    for row in rows:
        shutil.copy(image_folder / row["path"], tmp_path)
    (tmp_path / "broken.png").write_text("no image")
    with (tmp_path / "sample.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "kind"])
        writer.writerows([row["path"], row["caption"], row["shape"]] for row in rows)
        writer.writerows([["broken.png", "broken", "ring"], [rows[0]["path"], "again"]])
    both = lamplit.load(model_path)
    _, report = made(both, ["ring", "cross"], sample=tmp_path / "sample.csv", label_column="kind")
    assert report.images == 6
    assert [Path(item.path).name for item in report.skipped] == ["broken.png"]
    assert report.notes == ["1 row of sample.csv has fewer cells than the header; the missing ones are empty"]
    with pytest.raises(TowerError, match="open without its image tower to embed it"):
        make_classes(lamplit.load(model_path, towers="text"), ["ring"], sample=tmp_path / "sample.csv")


def test_from_paths(model: LiT, model_path: Path, store_path: Path) -> None:
    classes = make_classes(model_path, NAMES, templates="a {}", sample=store_path, label_column="shape", device="cpu")
    expected, report = made(model, NAMES, templates=["a {}"], sample=Store(store_path), label_column="shape")
    assert classes.report == report
    assert torch.equal(classes.vectors, expected.vectors)
    with pytest.raises(UsageError, match="the model is open on cpu"):
        make_classes(model, NAMES, device="meta")


def test_class_names_are_a_list(model: LiT) -> None:
    for names in ("cat,dog", "cat"):
        with pytest.raises(UsageError, match=f"the classes are one text, '{names}'; expected a list of names"):
            make_classes(model, names)
    with pytest.raises(UsageError, match="text 1 is 3, an int; expected a str"):
        make_classes(model, ["cat", 3])  # type: ignore[list-item]


def test_what_cannot_be_meant_is_refused(model: LiT, store: Store, tmp_path: Path) -> None:
    for options, message in (
        ({"templates": "suggest"}, "give --sample SOURCE"),
        ({"templates": "clip-81"}, "there are no templates 'clip-81'; expected prompts with {}, suggest, or one of"),
        ({"sample": store, "label_column": "shape", "keep_rate": 0.0}, "keep_rate is 0.0"),
        ({"sample": relabelled(store, tmp_path / "none.lance", ["none"] * 60)}, "no image of any of the classes"),
    ):
        with pytest.raises(UsageError, match=message):
            make_classes(model, NAMES, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="labels that are not among the classes: cross, triangle"):
        make_classes(model, THREE, sample=store, label_column="shape")
    with pytest.raises(StoreError, match="has no column 'label'"):
        make_classes(model, NAMES, sample=store)


def test_sample_of_another_tower_is_refused(model: LiT, tmp_path: Path, image_tower: ImageTower) -> None:
    other = write_store(tmp_path / "other.lance", torch.rand(3, image_tower.width), [[]] * 3, [{"label": "ring"}] * 3)
    with pytest.raises(StoreError, match=r"was embedded by module:made\.up"):
        make_classes(model, NAMES, sample=other)


def test_saved_list_needs_no_text_tower(model: LiT, store: Store, model_path: Path, tmp_path: Path) -> None:
    classes, _ = made(model, NAMES, sample=store, label_column="shape")
    classes.save(tmp_path / "classes.json")
    read = ClassList.load(tmp_path / "classes.json")
    image_only = lamplit.load(model_path, towers="image")
    assert image_only.text_tower is None
    paths = store.column("path")[:4]
    predictions = lamplit.classify(image_only, paths, read, top=2)
    assert predictions.skipped == []
    _, given = classes.classify(store.vectors()[:4])
    for prediction, row in zip(predictions, given.tolist(), strict=True):
        assert prediction.given == [name for name, yes in zip(NAMES, row, strict=True) if yes]
    strict = replace(read, thresholds=[1.1] * 5)
    assert [p.given for p in lamplit.classify(image_only, paths, strict)] == [[]] * 4
