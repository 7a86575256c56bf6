from __future__ import annotations

import re

import numpy as np

from lamplit import errors
from lamplit.errors import first_line, kind_of, nearest_names


def test_first_line() -> None:
    assert first_line(OSError("\nno such thing\nread the manual")) == "no such thing"
    assert first_line(KeyError()) == "KeyError"


def test_docstring_lists_every_class_once() -> None:
    listed = re.findall(r"^(?:[├└]── )?(\w+Error)\b", errors.__doc__ or "", re.M)
    defined = [
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert listed == defined
    assert all(issubclass(getattr(errors, name), errors.LamplitError) for name in defined)


def test_kind_of() -> None:
    assert [kind_of(value) for value in (3, "x", None, {}, np.zeros(1))] == [
        "an int",
        "a str",
        "None",
        "a dict",
        "an ndarray",
    ]


def test_nearest_names() -> None:
    names = [f"column{i}" for i in range(79)] + ["labels"]
    found = nearest_names("label", names)
    assert found.startswith("labels, column0, column1, ")
    assert found.endswith(", column8 and 70 more")
    assert nearest_names("", ["b", "a"]) == "b, a"
