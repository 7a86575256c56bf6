"""Values of a JSON file, checked as they are read: a damaged file gives one error that names the key."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from lamplit.data.json_text import parse_json
from lamplit.errors import kind_of


class FieldError(ValueError):
    """A value is missing, or is not what it must be; the text names the key. The reader of the file adds the file."""


@dataclass(frozen=True)
class Fields:
    """A JSON object; each method returns the value of one key, or raises if it is not of that type.

    Example:
        >>> Fields({"width": 0}).integer("width", least=1)
        FieldError: width is 0; expected a whole number of at least 1
    """

    values: Mapping[str, Any]
    name: str = ""  # of the object in its file, such as "tower.preprocessing"

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read the text of a file.

        Raises:
            FieldError: it is not JSON, or not an object.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise FieldError(f"it is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise FieldError(f"it holds {kind_of(values)}; expected an object of keys and values")
        return cls(values)

    def has(self, key: str) -> bool:
        """Tell whether the key is there, and its value is not null."""
        return self.values.get(key) is not None

    def text(self, key: str) -> str:
        """Return a text that can be printed."""
        value = self._value(key)
        if not isinstance(value, str):
            raise self.error(key, "a text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FieldError(f"{self._full(key)} holds half of a surrogate pair; expected a text") from None
        return value

    def choice(self, key: str, choices: Collection[str]) -> str:
        """Return one of some texts."""
        if (value := self._value(key)) not in choices:
            raise self.error(key, " or ".join(choices))
        return str(value)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self._value(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def integer(self, key: str, *, least: int = 0, most: int | None = None) -> int:
        """Return a whole number of at least `least`, and at most `most`."""
        value = self._value(key)
        limit = "" if most is None else f" and at most {most}"
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not least <= value <= (value if most is None else most)
        ):
            raise self.error(key, f"a whole number of at least {least}{limit}")
        return value

    def number(self, key: str) -> float:
        """Return a finite number, as it stands (a whole one stays whole)."""
        value = self._value(key)
        if not _is_number(value):
            raise self.error(key, "a number")
        return value  # type: ignore[no-any-return]

    def numbers(self, key: str, length: int) -> list[Any]:
        """Return a list of `length` finite numbers, as they stand."""
        value = self._value(key)
        if not isinstance(value, list | tuple) or len(value) != length or not all(map(_is_number, value)):
            raise self.error(key, f"a list of {length} numbers")
        return list(value)

    def inside(self, key: str) -> Fields:
        """Return an object inside this one."""
        value = self._value(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object of keys and values")
        return Fields(value, self._full(key))

    def require_known(self, known: Collection[str]) -> None:
        """Raise if there is a key that is not one of `known`."""
        if unknown := next((key for key in self.values if key not in known), None):
            raise FieldError(f"{self._full(str(unknown))} is unknown; expected {', '.join(known)}")

    def error(self, key: str, expected: str) -> FieldError:
        """Make the error of a value that is not what was expected."""
        found = repr(self.values[key])
        return FieldError(f"{self._full(key)} is {ascii(found)[1:-1][:60]}; expected {expected}")

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise FieldError(f"{self._full(key)} is missing")
        return self.values[key]

    def _full(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
