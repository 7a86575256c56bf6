from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamplit.data.pairs import Pairs
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.babel import babel_tasks, translated_tasks
from lamplit.evaluation.protocols.tasks import ImageSet, Labelled


@pytest.fixture
def validation() -> Labelled:
    """Five images of ImageNet's validation split, of the classes 0, 1, 1, 5 and 999."""
    ids = [f"n{label:08}/{number}.JPEG" for number, label in enumerate((0, 1, 1, 5, 999))]
    image_folder = ImageSet("imagenet-val", Path("/data"), Pairs("/data", 5, None, (), lambda: iter(())), ids)
    return Labelled(image_folder, dict(zip(ids, [(0,), (1,), (1,), (5,), (999,)], strict=True)))


BABEL = {
    "EN": [[0, 1], ["tench", "goldfish"]],
    "DE": [[1, 5, 700], ["Goldfisch", "Zitterrochen", "Goldfisch"]],
    "BR": [[999], ["paper"]],
}
PROMPTS = {"DE": ["ein Foto von  {} .", "{}"], "EN": ["a photo of {}"]}


def write(folder: Path, **files: object) -> None:
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def test_babel(tmp_path, validation):
    write(tmp_path, babel_imagenet=BABEL, nllb_dist13b_prompts=PROMPTS)
    breton, german = babel_tasks(validation, tmp_path)
    assert (german.benchmark, german.title, german.language) == ("babel-imagenet", "Babel-ImageNet", "de")
    assert list(german.class_names) == [("Goldfisch",), ("Zitterrochen",), ("Goldfisch",)]
    # Class 1 is its class 0, and class 5 its class 1; images of other classes do not count.
    assert german.test.labels == {
        "n00000001/1.JPEG": (0,),
        "n00000001/2.JPEG": (0,),
        "n00000005/3.JPEG": (1,),
    }
    assert german.test.images is validation.images is breton.test.images
    assert german.template_texts == ["ein Foto von  {} .", "{}"]
    assert german.split == "validation, 3 images of 3 classes"
    assert german.notes == ("1 of the 3 names is another class's too (Goldfisch), and does not tell the two apart",)
    assert breton.test.labels == {"n00000999/4.JPEG": (0,)}
    assert (breton.language, breton.template_texts) == ("br", ["{}"])
    assert breton.notes == ("there are no prompts in this language: the names alone",)


def test_a_image_of_several_classes_keeps_those_that_have_names(tmp_path, validation):
    write(tmp_path, babel_imagenet={"DE": [[5, 1], ["a", "b"]]}, nllb_dist13b_prompts=PROMPTS)
    several = Labelled(validation.images, {"x": (0, 1, 5), "y": (0,)})
    [task] = babel_tasks(several, tmp_path)
    assert task.test.labels == {"x": (1, 0)}


@pytest.mark.parametrize(
    ("names", "prompts", "message"),
    [
        ({"DE": [[1, 2], ["a"]]}, PROMPTS, "babel_imagenet.json is not laid out as expected.*2 classes with 1 names"),
        ({"DE": [[1, 1], ["a", "b"]]}, PROMPTS, "must be different ones from 0 to 999"),
        ({"DE": [[1000], ["a"]]}, PROMPTS, "must be different ones from 0 to 999"),
        ({"DE": [["1"], ["a"]]}, PROMPTS, "expected a list of int"),
        ({"DE": [1, "a", 2]}, PROMPTS, "ValueError: too many values"),
        ({"DE": [[1], ["a"]]}, {"DE": ["no place"]}, "nllb_dist13b_prompts.json is not .*has no {}"),
        ({"DE": [[1], ["a"]]}, [], "nllb_dist13b_prompts.json is not laid out"),
        ([], PROMPTS, "babel_imagenet.json is not laid out"),
        ({"DE": [[700], ["a"]]}, PROMPTS, "no image of .* has a class of Babel-ImageNet in language de"),
        ("{", PROMPTS, "babel_imagenet.json cannot be read"),
    ],
)
def test_broken_babel(tmp_path, validation, names, prompts, message):
    write(tmp_path, babel_imagenet=names, nllb_dist13b_prompts=prompts)
    with pytest.raises(PairsError, match=message):
        babel_tasks(validation, tmp_path)


def test_missing_babel(tmp_path, validation):
    with pytest.raises(PairsError, match=r"no babel_imagenet\.json and no nllb_dist13b_prompts\.json; copy"):
        babel_tasks(validation, tmp_path)
    write(tmp_path, babel_imagenet=BABEL)
    with pytest.raises(PairsError, match=r"has no nllb_dist13b_prompts\.json; copy"):
        babel_tasks(validation, tmp_path)


def test_translated(tmp_path, validation):
    names = [f"名{number}" for number in range(1000)]
    write(tmp_path, jp_classnames={"imagenet1k": names})
    with pytest.raises(PairsError, match=r"no jp_zeroshot_classification_templates\.json"):
        translated_tasks(validation, tmp_path)
    write(tmp_path, jp_zeroshot_classification_templates={"imagenet1k": ["{c}の写真", "{c}"]})
    [task] = translated_tasks(validation, tmp_path)
    assert (task.benchmark, task.language) == ("imagenet-translated", "ja")
    assert task.template_texts == ["{}の写真", "{}"]
    assert list(task.class_names) == [(name,) for name in names]
    assert task.test.labels == validation.labels
    assert task.notes == ()


@pytest.mark.parametrize(
    ("names", "prompts", "message"),
    [
        (["one"], ["{c}"], "1000 classes with 1 names"),
        (["a"] * 1000, ["{}"], "has no {c}"),
        (None, ["{c}"], "expected a list of str"),
    ],
)
def test_broken_translation(tmp_path, validation, names, prompts, message):
    write(tmp_path, ar_classnames={"imagenet1k": names})
    write(tmp_path, ar_zeroshot_classification_templates={"imagenet1k": prompts})
    with pytest.raises(PairsError, match=message):
        translated_tasks(validation, tmp_path)


def test_no_translation(tmp_path, validation):
    with pytest.raises(PairsError, match=r"none of ar_classnames\.json, it_classnames\.json, jp_"):
        translated_tasks(validation, tmp_path)
