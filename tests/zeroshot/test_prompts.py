from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.errors import UsageError
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES, canonicalize, fill


def test_class_name_goes_into_every_template() -> None:
    assert fill("tree frog", ["{}", "a photo of a {}."]) == ["tree frog", "a photo of a tree frog."]


def test_name_is_put_in_as_it_is() -> None:
    assert fill("{0} {name}", ["{} or {}"]) == ["{0} {name} or {0} {name}"]


def test_defaults_have_a_place_for_the_name() -> None:
    assert all("cat" in prompt for prompt in fill("cat", DEFAULT_TEMPLATES))
    assert "cat" in fill("cat", DEFAULT_TEMPLATES)


@pytest.mark.parametrize("template", ["a photo", "", "a {class}"])
def test_template_without_a_place_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match=r"has no place for the class name; put \{\} there"):
        fill("cat", ["{}", template])


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        ("a photo of a {}.", "{}", "a photo of a {}"),
        ("A close-up photo of the {}.", "{}", "a closeup photo of the {}"),
        (" test  {}...", "{}", "test {}"),
        ("test {}  {}  {}", "{}", "test {} {} {}"),
        ("{ or } alone, {0}", "{}", "or alone 0"),
        ("golf___course", ",", "golf course"),
        ("kite (bird of prey)", ",", "kite bird of prey"),
        ("Crane, a bird {}", ",", "crane, a bird"),
        ("potter's\nwheel", ",", "potters wheel"),
        ("Čeština – «{}»", "{}", "čeština – «{}»"),
        ("", "{}", ""),
    ],
)
def test_canonical_texts(text: str, keep: str, expected: str) -> None:
    assert canonicalize(text, keep) == expected


@given(st.text(), st.sampled_from(["{}", ","]))
def test_canonical_texts_stay_as_they_are(text: str, keep: str) -> None:
    once = canonicalize(text, keep)
    assert canonicalize(once, keep) == once
    assert once == " ".join(once.split())
    assert not set(once.replace(keep, "")) & set(string.punctuation)


@given(st.text(), st.text())
def test_places_for_the_name_stay(before: str, after: str) -> None:
    text = f"{before}{{}}{after}"
    assert canonicalize(text).count("{}") == text.count("{}")
