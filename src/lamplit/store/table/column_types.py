"""Which type a column of metadata has: the narrowest that gives back every value it was given, else text.

The types that lamplit makes are booleans, int64, float64, text, lists of one of these and structs. Columns of other
types were made elsewhere: they keep their type, and take the values that fit them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa

from lamplit.data.valid_text import valid_text

# Until a column is settled, an int64 stands for whole numbers that a float64 cannot hold, and an int32 for the others.
_LARGE, _SMALL = pa.int64(), pa.int32()
_EXACT_IN_FLOATS = 2**53
_MOST_FIELDS = 64  # of a struct; a dictionary with more keys is a map, and kept as text
_DEEPEST = 8


class UnfitError(ValueError):
    """A value does not come back equal from a column of this type."""


class ColumnType:
    """Finds the narrowest type that gives back all values that are added; text if they are of several kinds."""

    def __init__(self) -> None:
        self._kind = pa.null()

    def add(self, value: Any) -> None:
        """Take one more value."""
        if value is not None:
            self._kind = _joined(self._kind, _type_of(value))

    def settled(self) -> pa.DataType:
        """Return the type so far; text if all values are missing."""
        return _settled(self._kind)


def column_type(values: Iterable[Any]) -> pa.DataType:
    """Find the narrowest type that gives all values back; text if they are of several kinds, or all missing."""
    kind = ColumnType()
    for value in values:
        kind.add(value)
    return kind.settled()


def is_ours(kind: pa.DataType) -> bool:
    """Tell whether a type is one of those that `column_type` gives, so that it may be widened."""
    if pa.types.is_list(kind):
        return is_ours(kind.value_type)
    if pa.types.is_struct(kind):
        return all(is_ours(field.type) for field in kind)
    return kind in (pa.bool_(), pa.int64(), pa.float64(), pa.string())


def fitted(value: Any, kind: pa.DataType) -> Any:
    """Return what a column of a type keeps of a value: the value itself, or its text in a column of text.

    Raises:
        UnfitError: what came back would be another value.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return as_text(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if isinstance(value, list | tuple):
            return [fitted(item, kind.value_type) for item in value]
    elif pa.types.is_struct(kind):
        if isinstance(value, Mapping):
            return _fitted_fields(value, kind)
    elif pa.types.is_boolean(kind) == isinstance(value, bool):
        return _fitted_scalar(value, kind)
    raise UnfitError(f"{value!r:.50} does not fit a column of {kind}")


def becomes_text(value: Any, kind: pa.DataType) -> bool:
    """Tell whether a column keeps only the text of a value that is no text, or of something in it."""
    if value is None or isinstance(value, str):
        return False
    if pa.types.is_list(kind):
        return any(becomes_text(item, kind.value_type) for item in value)
    if pa.types.is_struct(kind):
        return any(becomes_text(value.get(field.name), field.type) for field in kind)
    return bool(pa.types.is_string(kind))


def is_same(value: Any, stored: Any) -> bool:
    """Tell whether two values of one column are equal, NaN included."""
    return value == stored or (value is not None and stored is not None and str(value) == str(stored))


def as_text(value: Any) -> str:
    """Return the text of a value: of lists and dictionaries their JSON; equal numbers have equal texts."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return str(int(value))
    if isinstance(value, list | tuple | Mapping):
        return valid_text(json.dumps(value, ensure_ascii=False, default=str))
    return valid_text(str(value))


def _fitted_fields(value: Mapping[Any, Any], kind: pa.DataType) -> dict[str, Any]:
    named = {valid_text(str(name)): item for name, item in value.items() if item is not None}
    if any(kind.get_field_index(name) < 0 for name in named):
        raise UnfitError(f"{value!r:.50} has other fields than {kind}")
    return {field.name: fitted(named.get(field.name), field.type) for field in kind}


def _fitted_scalar(value: Any, kind: pa.DataType) -> Any:
    try:
        stored = pa.scalar(value, kind).as_py()
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        raise UnfitError(f"{value!r:.50} does not fit a column of {kind}") from None
    if stored == value or (stored != stored and value != value):
        return stored
    raise UnfitError(f"{value!r:.50} would become {stored!r:.50} in a column of {kind}")


def _type_of(value: Any, depth: int = 0) -> pa.DataType:
    match value.item() if isinstance(value, np.generic) else value:
        case None:
            return pa.null()
        case bool():
            return pa.bool_()
        case int():
            return _SMALL if abs(value) <= _EXACT_IN_FLOATS else _LARGE if -(2**63) <= value < 2**63 else pa.string()
        case float():
            return pa.float64()
        case str():
            return pa.string()
        case list() | tuple() if depth < _DEEPEST:
            return pa.list_(reduce(_joined, (_type_of(item, depth + 1) for item in value), pa.null()))
        case Mapping() if depth < _DEEPEST and len(value) <= _MOST_FIELDS and all(map(_is_field_name, value)):
            return pa.struct({valid_text(str(name)): _type_of(item, depth + 1) for name, item in value.items()})
    return pa.string()


def _is_field_name(name: Any) -> bool:
    """Tell whether a field of a struct can have this name: Lance reads `a.b` as a field inside a field.

    Arrow passes names on as C does, up to a zero.
    """
    return isinstance(name, str) and name != "" and not any(sign in name for sign in ".`\0")


def _joined(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Find the narrowest type that holds what two types hold."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(_joined(a.value_type, b.value_type))
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = {field.name: field.type for field in a}
        for field in b:
            fields[field.name] = _joined(fields.get(field.name, pa.null()), field.type)
        return pa.struct(fields) if len(fields) <= _MOST_FIELDS else pa.string()
    return _NUMBERS.get(frozenset((a, b)), pa.string())


_NUMBERS = {frozenset((_SMALL, _LARGE)): _LARGE, frozenset((_SMALL, pa.float64())): pa.float64()}


def _settled(kind: pa.DataType) -> pa.DataType:
    """Give what is still open a type that a table can have: text where nothing is known."""
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if pa.types.is_struct(kind) and kind.num_fields:
        return pa.struct({field.name: _settled(field.type) for field in kind})
    return pa.int64() if kind == _SMALL else pa.string() if pa.types.is_null(kind) or pa.types.is_struct(kind) else kind
