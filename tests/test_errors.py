from __future__ import annotations

import re

from lamplit import errors
from lamplit.errors import first_line


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
