from __future__ import annotations

import json
from importlib import resources

import pytest

from lamplit.errors import UsageError
from lamplit.zeroshot.names import (
    class_keys,
    class_name_sets,
    class_name_source,
    class_names,
    listed,
    plain,
    template_sets,
    template_source,
    templates,
)
from lamplit.zeroshot.prompts import fill

NUM_TEMPLATES = {
    "big_vision-8": 8, "big_vision-81": 81, "clip-7": 7, "clip-80": 80, "clip-caltech101": 34, "clip-cifar": 18,
    "clip-dtd": 8, "clip-eurosat": 3, "clip-flowers102": 1, "clip-pets": 1, "clip-resisc45": 18, "clip-sun397": 2,
    "name": 1, "paper-camelyon": 6, "paper-dtd": 1, "paper-eurosat": 6, "paper-flowers": 1, "paper-pets": 1,
    "paper-resisc45": 4, "paper-svhn": 6, "photo": 1,
}  # fmt: skip
NUM_CLASSES = {
    "caltech101": 101, "cifar10": 10, "cifar100": 100, "dtd": 47, "eurosat": 10, "fashion-mnist": 10,
    "flowers102": 102, "imagenet": 1000, "paper-camelyon": 2, "paper-eurosat": 10, "paper-resisc45": 45,
    "paper-svhn": 10, "pets": 37, "resisc45": 45, "sun397": 397, "svhn": 10,
}  # fmt: skip


def test_template_sets_have_the_numbers_that_their_sources_say() -> None:
    assert {name: len(templates(name)) for name in template_sets()} == NUM_TEMPLATES


@pytest.mark.parametrize("name", sorted(NUM_TEMPLATES))
def test_templates_have_a_place_for_the_name_and_a_source(name: str) -> None:
    assert len(fill("cat", templates(name))) == len(set(templates(name)))
    assert all(template_source(name))


def test_big_vision_adds_the_name_alone() -> None:
    assert templates("big_vision-81") == [*templates("clip-80"), "{}"]
    assert templates("big_vision-8") == [*templates("clip-7"), "{}"]
    stored = json.loads(resources.files("lamplit.zeroshot").joinpath("facts/templates.json").read_text("utf-8"))
    assert stored["big_vision-81"]["templates"] == ["{}"], "computed, not repeated"


def test_class_name_sets_have_the_numbers_of_their_data_sets() -> None:
    assert {name: len(class_names(name)) for name in class_name_sets()} == NUM_CLASSES


@pytest.mark.parametrize("name", sorted(NUM_CLASSES))
def test_class_names_are_clean_and_have_a_source(name: str) -> None:
    names = class_names(name)
    assert all(text == text.strip() != "" for entry in names for text in entry)
    assert len(set(class_keys(name))) == len(names) or name == "imagenet"
    assert all(class_name_source(name))


def test_names_stand_at_their_labels() -> None:
    imagenet = class_names("imagenet")
    assert [imagenet[label] for label in (0, 65, 134, 517, 639, 999)] == [
        ("tench",), ("sea snake",), ("crane bird",), ("construction crane",), ("one-piece bathing suit",),
        ("toilet paper",),
    ]  # fmt: skip
    assert class_names("paper-svhn")[7] == ("7", "seven")
    assert class_names("paper-eurosat")[9] == ("an ocean", "a water", "a sea", "a reservoir")
    assert class_names("paper-resisc45")[2] == ("baseball diamond", "baseball court", "baseball", "baseball field")
    assert class_names("flowers102")[76] == ("passion flower",)


def test_only_two_names_of_imagenet_stand_for_two_classes() -> None:
    names = class_names("imagenet")
    twice = {name: [label for label, other in enumerate(names) if other == name] for name in names}
    assert {name[0]: labels for name, labels in twice.items() if len(labels) > 1} == {
        "missile": [657, 744], "sunglasses": [836, 837],
    }  # fmt: skip


def test_sets_of_one_data_set_have_its_classes_in_one_order() -> None:
    assert class_keys("eurosat") == class_keys("paper-eurosat")
    assert class_keys("eurosat")[:2] == ["annualcrop", "forest"]
    assert class_keys("resisc45") == class_keys("paper-resisc45")
    assert class_keys("caltech101")[:5] == ["faces", "faces easy", "leopards", "motorbikes", "accordion"]


@pytest.mark.parametrize(
    ("folder", "words"),
    [("a/apse/indoor", "a apse indoor"), ("golf_course", "golf course"), ("Egyptian_Mau", "egyptian mau"), ("", "")],
)
def test_plain_words(folder: str, words: str) -> None:
    assert plain(folder) == words


def test_unknown_sets_are_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no templates are called 'clip-81'; there are big_vision-8, big_vision-81"):
        templates("clip-81")
    with pytest.raises(UsageError, match=r"no class names are called 'food101'; there are caltech101, cifar10"):
        class_names("food101")


def test_long_lists_are_cut() -> None:
    assert listed("ab") == "a, b"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
