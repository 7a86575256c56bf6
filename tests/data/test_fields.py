from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lamplit.data.fields import FieldError, Fields


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it holds a list; expected an object"),
        ("[" * 100_000, "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
    ],
)
def test_parse_refuses(text: str | bytes, told: str) -> None:
    with pytest.raises(FieldError, match=told):
        Fields.parse(text)


READERS: dict[str, Callable[[Fields], Any]] = {
    "text": lambda fields: fields.text("key"),
    "choice": lambda fields: fields.choice("key", ("a", "b")),
    "flag": lambda fields: fields.flag("key"),
    "integer": lambda fields: fields.integer("key", least=2),
    "number": lambda fields: fields.number("key"),
    "numbers": lambda fields: fields.numbers("key", 2),
    "inside": lambda fields: fields.inside("key").values,
}


@pytest.mark.parametrize(
    ("reader", "good", "bad"),
    [
        ("text", ["", "å"], [None, 1, "\ud83d", ["a"]]),
        ("choice", ["a"], ["c", None, 1]),
        ("flag", [True, False], [0, 1, None, "true"]),
        ("integer", [2, 10**30], [1, 2.0, True, None, "2"]),
        ("number", [0, -1.5], [float("nan"), float("inf"), True, "1", None]),
        ("numbers", [[0, 1.5]], [[1], [1, 2, 3], [1, None], [1, float("nan")], "12", None]),
        ("inside", [{}, {"a": 1}], [[], None, "a"]),
    ],
)
def test_values(reader: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert READERS[reader](Fields({"key": value})) == value
    for value in bad:
        with pytest.raises(FieldError, match=r"^outer\.key "):
            READERS[reader](Fields({"key": value}, "outer"))
    with pytest.raises(FieldError, match=r"^key is missing$"):
        READERS[reader](Fields({}))


def test_keys_inside_are_named_in_full() -> None:
    inside = Fields({"a": {"b": {"c": 1}}}).inside("a").inside("b")
    with pytest.raises(FieldError, match=r"a\.b\.c is 1; expected a text"):
        inside.text("c")
    with pytest.raises(FieldError, match=r"a\.b\.c is unknown; expected d, e"):
        inside.require_known(("d", "e"))


def test_error_can_be_printed_and_is_short() -> None:
    with pytest.raises(FieldError) as caught:
        Fields({"key": "\ud83d" * 1000}).flag("key")
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 120
