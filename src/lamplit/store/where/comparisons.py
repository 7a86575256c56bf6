"""Comparisons of a store's columns with values, as SQL that Lance takes and that says what was meant.

Lance refuses a value that is not of the column's own type (`year > 1.5`, `taken > '2020-01-01'`), so values are written
as that type, without changing which rows are meant.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NoReturn

import pyarrow as pa

from lamplit.errors import UsageError

_LEAST = -(2**63)
_NUMBERS = {
    "Int": pa.types.is_signed_integer,
    "UInt": pa.types.is_unsigned_integer,
    "Float": pa.types.is_floating,
}
_MOST_WHOLE = 2**53  # from here on doubles leave out whole numbers
MAX_DIGITS = 38  # of a number that a column of decimals is compared with
_COMPARABLE = ("text", "number", "boolean", "date")


@dataclass(frozen=True)
class Column:
    """A column, or a field of a structure: its name for messages and in SQL, and its type."""

    name: str
    sql: str
    type: pa.DataType

    @property
    def kind(self) -> str:
        """What it holds: text, number, boolean, date, list, or the name of another type."""
        kind = self.type.value_type if pa.types.is_dictionary(self.type) else self.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return "text"
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return "number"
        if pa.types.is_boolean(kind):
            return "boolean"
        if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
            return "date"
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return "list" if is_list else str(kind)

    def read_as(self, value: object) -> Column:
        """Read a column of text as what it is compared with, a number or a boolean: cells of CSV files are text.

        A text that is neither is as if it was not there.
        """
        if self.kind != "text" or not isinstance(value, Decimal | bool):
            return self
        if isinstance(value, bool):
            return Column(self.name, f"TRY_CAST({self.sql} AS BOOLEAN)", pa.bool_())
        if abs(value) >= _MOST_WHOLE:
            refuse(self, f"a number of so many digits is not told from its neighbours; put it in quotes: '{value:f}'")
        number = f"NULLIF(TRY_CAST({self.sql} AS DOUBLE), CAST('NaN' AS DOUBLE))"  # which would be larger than any
        return Column(self.name, number, pa.float64())


@dataclass(frozen=True)
class Literal:
    """A value, and how it was written."""

    value: str | Decimal | bool | datetime.date
    written: str


def compared(column: Column, operator: str, other: Column | Literal) -> str:
    """Compare a column with a value, or with another column that holds the same kind.

    Raises:
        UsageError: they cannot be compared; so do all functions here.
    """
    if isinstance(other, Column):
        if column.kind != other.kind or column.kind not in _COMPARABLE:
            refuse(column, f"it cannot be compared with {other.name}, which holds {other.kind}")
        return f"{column.sql} {operator} {other.sql}"
    column = column.read_as(other.value)
    if pa.types.is_integer(column.type) and isinstance(other.value, Decimal):
        return _with_whole(column, operator, other.value)
    return f"{column.sql} {operator} {_value(column, other)}"


def one_of(column: Column, values: Sequence[Literal], *, negated: bool) -> str:
    """Ask whether a column has one of some values, or none of them."""
    if len({type(each.value) for each in values}) == 1:
        column = column.read_as(values[0].value)
    if pa.types.is_integer(column.type):  # a number that no such column holds is equal to none
        values = [each for each in values if _fits(each.value, column.type)]
    sql = f"{column.sql} IN ({', '.join(_value(column, each) for each in values)})" if values else _never(column)
    # Two negated lists that share no value are simplified to TRUE, even where there is no value.
    return f"({column.sql} IS NOT NULL AND NOT ({sql}))" if negated else sql


def in_list(literal: Literal, column: Column) -> str:
    """Ask whether a column of lists has a value in its list."""
    if column.kind != "list":
        refuse(column, "a value IN a column takes a column of lists, such as texts")
    items = Column(column.name, column.sql, column.type.value_type)
    value = _value(items, literal)
    if pa.types.is_integer(items.type) and not _fits(literal.value, items.type):
        return _never(column)
    if kind := _arrow_name(items.type):  # a value of another type than the list's is not found, or refused
        value = f"arrow_cast({value}, '{kind}')"
    return f"array_has({column.sql}, {value})"


def like(column: Column, pattern: Literal, word: str) -> str:
    """Compare a column with a pattern: `%` is anything, `_` one character, ILIKE takes either case."""
    if column.kind != "text" or not isinstance(pattern.value, str):
        refuse(column, f"{word} compares a column of text with a text")
    return f"{column.sql} {word} {_quoted(pattern.value)}"


def refuse(column: Column, reason: str) -> NoReturn:
    """Say that a column cannot be asked so."""
    raise UsageError(f"the condition on {column.name}, which holds {column.kind}, cannot be used: {reason}")


def as_date(text: str, *, only_day: bool = False) -> datetime.date | None:
    """Read a day, or a day with a time; None if it is neither."""
    for kind in (datetime.date,) if only_day else (datetime.date, datetime.datetime):
        try:
            return kind.fromisoformat(text)
        except (ValueError, OverflowError):
            continue
    return None


def _value(column: Column, literal: Literal) -> str:
    """Write a value as one of the column's type."""
    value = literal.value
    if column.kind == "date":
        date = as_date(value) if isinstance(value, str) else value
        if isinstance(date, datetime.date):
            return _instant(column, date)
        refuse(column, f"{literal.written} is no date; expected one such as '2020-12-31' or '2020-12-31 23:59:00'")
    if column.kind == "text" and isinstance(value, str):
        return _quoted(value)
    if column.kind == "boolean" and isinstance(value, bool):
        return str(value).upper()
    if column.kind == "number" and isinstance(value, Decimal):
        if pa.types.is_decimal(column.type):
            return _decimal(column, value)
        return _whole(value) if pa.types.is_integer(column.type) else repr(float(value))
    if column.kind == "list":
        refuse(column, f"for the rows whose list has a value, type: {literal.written} IN {column.sql}")
    refuse(column, f"it cannot be compared with {literal.written}")


def _instant(column: Column, value: datetime.date) -> str:
    if not pa.types.is_timestamp(column.type):
        if isinstance(value, datetime.datetime):
            refuse(column, "it holds days without a time, such as '2020-12-31'")
        return f"DATE '{value.isoformat()}'"
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    if value.tzinfo is not None:
        value = value.astimezone(datetime.UTC).replace(tzinfo=None)
    return f"TIMESTAMP '{value.isoformat(' ', 'microseconds')}'"


def _with_whole(column: Column, operator: str, value: Decimal) -> str:
    """Compare a column of whole numbers with any number, which Lance refuses unless it is one of them, too."""
    if _fits(value, column.type):
        return f"{column.sql} {operator} {_whole(value)}"
    low, high = _bounds(column.type)
    if operator in ("=", "!="):
        return _never(column) if operator == "=" else _always(column)
    is_above = operator in (">", ">=")
    if value < low or value > high:
        return _always(column) if is_above == (value < low) else _never(column)
    return f"{column.sql} {'>' if is_above else '<='} {math.floor(value)}"


def _whole(value: Decimal) -> str:
    """Write a whole number; Lance reads the least one as the negative of a number that is too large, and so as real."""
    return str(int(value)) if value != _LEAST else f"CAST('{_LEAST}' AS BIGINT)"


def _decimal(column: Column, value: Decimal) -> str:
    """Write a number with all its digits, which a column of fewer is compared with as they are."""
    places = max(0, -int(value.normalize().as_tuple().exponent))
    if len(f"{abs(value):f}") > MAX_DIGITS:
        refuse(column, f"a number may have {MAX_DIGITS} digits")
    return f"arrow_cast('{value:f}', 'Decimal128({MAX_DIGITS}, {places})')"


def _arrow_name(kind: pa.DataType) -> str:
    """Return the name that `arrow_cast` has for a type of numbers or times; "" for others."""
    if pa.types.is_timestamp(kind):
        unit = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}[kind.unit]
        zone = f'Some("{kind.tz}")' if kind.tz else "None"
        return f"Timestamp({unit}, {zone})"
    if pa.types.is_date64(kind):
        return "Date64"
    if pa.types.is_decimal(kind):
        return f"Decimal{kind.bit_width}({kind.precision}, {kind.scale})"
    for name, is_one in _NUMBERS.items():
        if is_one(kind):
            return f"{name}{kind.bit_width}"
    return ""


def _never(column: Column) -> str:
    """Write what no row meets; like any comparison it is unknown, not false, where there is no value."""
    return f"{column.sql} != {column.sql}"


def _always(column: Column) -> str:
    return f"{column.sql} = {column.sql}"


def _bounds(kind: pa.DataType) -> tuple[int, int]:
    bits = kind.bit_width
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if pa.types.is_signed_integer(kind) else (0, 2**bits - 1)


def _fits(value: object, kind: pa.DataType) -> bool:
    """Tell whether a column of whole numbers can hold a value; what is no number is refused elsewhere."""
    if not isinstance(value, Decimal):
        return True
    low, high = _bounds(kind)
    return low <= value <= high and value == value.to_integral_value()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
