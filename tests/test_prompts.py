from __future__ import annotations

import pytest

from lamplit.errors import UsageError
from lamplit.prompts import DEFAULT_TEMPLATES, fill


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
