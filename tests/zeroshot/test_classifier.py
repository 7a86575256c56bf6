from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import lamplit
from lamplit.errors import TowerError, UsageError
from lamplit.model import LiT
from lamplit.zeroshot.classifier import class_list, class_vectors, classify, predict_proba
from lamplit.zeroshot.names import templates as template_set
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

CLASSES = ["circle", "square", "triangle", "red ring"]


def drawing(image_folder: Path, name: str) -> Path:
    [file] = image_folder.glob(f"{name}.*")
    return file


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


@pytest.mark.parametrize("templates", [DEFAULT_TEMPLATES, ["{}"], ["a {} drawing", "small {}"]])
def test_class_vector_is_the_mean_of_its_prompts(model: LiT, templates: list[str]) -> None:
    found = class_vectors(model, CLASSES, templates)
    for name, vector in zip(CLASSES, found, strict=True):
        prompts = [model.encode_texts([template.replace("{}", name)])[0] for template in templates]
        mean = sum(prompts, torch.zeros(model.identity.width)) / len(prompts)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-3)


def test_probabilities_by_hand() -> None:
    class Scaled:
        logit_multiplier = torch.tensor(2.0)

    zimg = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=-1)
    classes = torch.eye(2)
    found = predict_proba(Scaled(), zimg, classes)  # type: ignore[arg-type]
    expected = torch.tensor([[torch.e**2 / (torch.e**2 + 1), 1 / (torch.e**2 + 1)], [0.5, 0.5]])
    assert torch.allclose(found, expected)


def test_prediction_is_the_nearest_class_text(model: LiT, image_folder: Path) -> None:
    files = [drawing(image_folder, "large_red_circle"), drawing(image_folder, "small_blue_square")]
    predictions = classify(model, files, CLASSES)
    assert predictions.skipped == []
    for file, prediction in zip(files, predictions, strict=True):
        assert prediction.path == str(file)
        assert sorted(prediction.classes) == sorted(CLASSES)
        assert sum(prediction.probabilities) == pytest.approx(1)
        assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)
        zimg = model.encode_images([file])[0]
        by_class = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        logits = {}
        for name in CLASSES:
            prompts = model.encode_texts([template.replace("{}", name) for template in DEFAULT_TEMPLATES])
            logits[name] = float(model.logit_multiplier.detach()) * float(zimg @ F.normalize(prompts.mean(0), dim=-1))
        expected = torch.tensor([logits[name] for name in CLASSES]).softmax(0)
        for name, probability in zip(CLASSES, expected.tolist(), strict=True):
            assert by_class[name] == pytest.approx(probability, rel=1e-2)


def test_captions_the_head_was_fitted_on_are_told_apart(model: LiT, image_folder: Path) -> None:
    names = ["A large red square.", "A large black ring.", "A small green triangle."]
    files = [image_folder / f"{name[2:-1].replace(' ', '_')}" for name in names]
    found = [next(image_folder.glob(f"{file.name}.*")) for file in files]
    predictions = classify(model, found, names, templates=["{}"], top=1)
    assert [prediction.classes for prediction in predictions] == [[name] for name in names]


def test_images_come_in_any_form(model: LiT, image_folder: Path) -> None:
    file = drawing(image_folder, "large_green_ring")
    forms = [file, str(file), file.read_bytes(), Image.open(file)]
    predictions = classify(model, forms, CLASSES, top=2)
    assert [prediction.path for prediction in predictions] == [str(file), str(file), "image 2", "image 3"]
    assert all(prediction.classes == predictions[0].classes for prediction in predictions)
    assert all(len(prediction.classes) == 2 for prediction in predictions)


def test_bad_images_are_skipped_with_their_reasons(model: LiT, image_folder: Path, tmp_path: Path) -> None:
    good = next(image_folder.glob("*.png"))
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    files = [tmp_path / "none.png", good, tmp_path / "empty.png", tmp_path / "cut.png", tmp_path]
    result = classify(model, files, CLASSES, batch_size=2)
    predictions, skipped = result.predictions, result.skipped
    assert [prediction.path for prediction in predictions] == [str(good)]
    assert [item.path for item in skipped] == [str(file) for file in files if file != good]
    assert skipped[0].reason == "file not found"
    assert all(item.reason for item in skipped)


def test_result(model: LiT, image_folder: Path) -> None:
    files = sorted(image_folder.glob("*.png"))[:5]
    with Image.open(files[3]) as opened:
        pixels = np.array(opened.convert("RGB"))
    mixed = [files[0], b"no image", str(files[1]), files[2].read_bytes(), pixels]
    result = classify(model, mixed, CLASSES, batch_size=2, top=1)
    assert len(result) == 4
    assert list(result) == result.predictions
    assert [prediction.path for prediction in result] == [str(files[0]), str(files[1]), "image 3", "image 4"]
    assert [(item.path, item.reason) for item in result.skipped] == [("image 1", "not an image")]
    assert result.class_names == CLASSES
    zimg = model.encode_images(files[:4])
    expected = predict_proba(model, zimg, class_vectors(model, CLASSES))
    assert torch.allclose(result.probabilities, expected, atol=1e-6)
    assert [prediction.probabilities[0] for prediction in result] == result.probabilities.amax(1).tolist()
    assert "tensor" not in repr(result)
    empty = classify(model, [], CLASSES)
    assert (len(empty), empty.probabilities.shape) == (0, (0, 4))


def test_one_image(model: LiT, image_folder: Path) -> None:
    file = drawing(image_folder, "large_red_circle")
    with Image.open(file) as opened:
        for image in (file, str(file), opened, np.array(opened.convert("RGB"))):
            assert len(classify(model, image, CLASSES)) == 1
    [skipped] = classify(model, "owl.png", CLASSES).skipped
    assert (skipped.path, skipped.reason) == ("owl.png", "file not found")
    with pytest.raises(UsageError, match="image 1 is a float; expected a path"):
        classify(model, [file, 0.5], CLASSES)  # type: ignore[list-item]


def test_batches_and_workers_give_the_same(model: LiT, model_path: Path, image_folder: Path) -> None:
    files = sorted(image_folder.glob("*.png"))[:7]
    alone = classify(model, files, CLASSES, batch_size=1)
    for other in (
        classify(model_path, files, CLASSES, batch_size=3, workers=1, device="cpu"),
        classify(model, [np.array(Image.open(file).convert("RGB")) for file in files], CLASSES, batch_size=4),
    ):
        assert torch.allclose(other.probabilities, alone.probabilities, atol=1e-6)
        assert [prediction.classes for prediction in other] == [prediction.classes for prediction in alone]


def test_progress(
    model: LiT, image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamplit.progress._MOMENT", 0)  # bars of short stages stay
    classify(model, [next(image_folder.glob("*.png")), b""], CLASSES, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "1 skipped" in captured.err


def test_one_template(model: LiT, image_folder: Path) -> None:
    file = drawing(image_folder, "large_red_circle")
    one, several = (classify(model, file, CLASSES, templates=templates) for templates in ("A {}.", ["A {}."]))
    assert one.predictions == several.predictions


def test_numbers_below_one(model: LiT) -> None:
    for name in ("top", "batch_size"):
        with pytest.raises(UsageError, match=f"^{name} is 0; expected at least 1$"):
            classify(model, [], CLASSES, **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], ["{}"], "no classes to choose from"),
        (["cat", "dog", "cat", "dog", "cow"], ["{}"], "classes given twice: cat, dog"),
        (["cat"], ["a photo"], "has no place for the class name"),
        (["cat"], [], "no templates"),
        (["cat", " "], ["{}"], "class name 1 is empty"),
        (
            ["cat"],
            "clip-81",
            "there are no templates 'clip-81'; expected prompts with {}, or one of: lamplit, .*clip-80",
        ),
        ("cat,dog", ["{}"], "the classes are one text, 'cat,dog'; expected a list of names"),
    ],
)
def test_what_cannot_be_meant_is_refused(model: LiT, classes: list[str], templates: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        classify(model, [], classes, templates=templates)


def test_templates_by_the_name_of_a_set(model: LiT, image_folder: Path) -> None:
    file = drawing(image_folder, "large_red_circle")
    by_name = classify(model, file, CLASSES, templates="clip-80").probabilities
    assert torch.equal(by_name, classify(model, file, CLASSES, templates=template_set("clip-80")).probabilities)


def test_missing_tower_is_said(model_path: Path, image_folder: Path) -> None:
    with pytest.raises(TowerError, match="open without its image tower"):
        classify(lamplit.load(model_path, towers="text"), [next(image_folder.glob("*.png"))], CLASSES)
    with pytest.raises(TowerError, match="open without its text tower"):
        classify(lamplit.load(model_path, towers="image"), [], CLASSES)


# --- A class list


def test_class_list_answers_as_its_names_do_and_without_the_text_tower(
    model: LiT, model_path: Path, image_folder: Path
) -> None:
    files = [drawing(image_folder, "large_red_circle"), drawing(image_folder, "small_blue_square")]
    classes = class_list(model, CLASSES)
    by_names = classify(model, files, CLASSES).predictions
    assert [prediction.given for prediction in by_names] == [None, None]
    assert classify(lamplit.load(model_path, towers="image"), files, classes).predictions == by_names


def test_what_is_below_its_threshold_is_none_of_these(model: LiT, image_folder: Path) -> None:
    files = [drawing(image_folder, "large_red_circle"), drawing(image_folder, "small_blue_square")]
    classes = class_list(model, CLASSES)
    cosines = classes.cosines(model.encode_images(files))
    best = cosines.max(1).values.tolist()
    between = replace(classes, thresholds=[sum(best) / 2] * 4)
    predictions = classify(model, files, between, top=1)
    for prediction, cosine in zip(predictions, best, strict=True):
        assert prediction.given == (prediction.classes if cosine == max(best) else [])
        assert len(prediction.probabilities) == 1, "shown all the same"
    independent = replace(classes, thresholds=[-1.0, 1.0, -1.0, -1.0], logit_bias=-3.0)
    prediction = classify(model, files[0], independent, top=1)[0]
    order = [CLASSES[i] for i in cosines[0].argsort(descending=True).tolist()]
    assert prediction.given == [name for name in order if name != "square"], "all that are, whatever `top` says"
    assert prediction.probabilities[0] == pytest.approx(
        float((classes.logit_multiplier * cosines[0].max() - 3).sigmoid())
    )


def test_class_list_of_another_tower_or_with_templates_is_refused(model: LiT, image_folder: Path) -> None:
    classes = class_list(model, CLASSES)
    with pytest.raises(UsageError, match="a class list has templates of its own"):
        classify(model, [], classes, templates=["{}"])
    with pytest.raises(TowerError, match="was made for images of"):
        classify(model, [], replace(classes, space="c" * 32))
