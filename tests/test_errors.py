from __future__ import annotations

from lamplit.errors import first_line


def test_first_line() -> None:
    assert first_line(OSError("\nno such thing\nread the manual")) == "no such thing"
    assert first_line(KeyError()) == "KeyError"
