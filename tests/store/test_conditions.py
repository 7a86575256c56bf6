"""Conditions: what they mean, against a slow reference, and what is refused."""

from __future__ import annotations

import datetime as dt
import operator
import re
import time
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.errors import UsageError
from lamplit.store.where.conditions import MAX_DEPTH, MAX_LENGTH, MAX_PARTS, parse_condition

DAYS = [dt.date(1969, 12, 31), dt.date(2020, 2, 29), dt.date(2024, 1, 1)]
COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "whole": (pa.int64(), [0, 1, -3, 7, 2**62, -(2**63)]),
    "Short": (pa.int32(), [0, 1, -3, 7, 2**31 - 1]),
    "unsigned": (pa.uint8(), [0, 1, 7, 255]),
    "real": (pa.float64(), [0.0, 0.5, -2.25, 7.0, 1e300, float("inf")]),
    "half": (pa.float32(), [0.0, 0.5, -2.25, 7.0]),
    "word": (pa.string(), ["", "a", "B", "it's", 'say "a"', "100%", "ä", "猫", "a\nb"]),
    "cell": (
        pa.string(),
        ["", "0", "7", "-2.25", "7.0", "300", "1e300", "nan", "true", "false", "TRUE", "Yes", "7 cm"],
    ),
    "Größe in cm": (pa.int16(), [0, 1, 7]),
    "kept": (pa.bool_(), [True, False]),
    "day": (pa.date32(), DAYS),
    "moment": (pa.timestamp("us"), [dt.datetime.combine(day, dt.time(12, 30)) for day in DAYS]),
    "texts": (pa.list_(pa.string()), [[], ["a"], ["a", "it's"], ["猫", None]]),
    "marks": (pa.list_(pa.int64()), [[], [1], [1, 7]]),
}
NUMBERS = ["whole", "Short", "unsigned", "real", "half", "Größe in cm"]
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
Row = dict[str, Any]
Test = Callable[[Row], bool | None]  # None: unknown, as SQL has it where a value is missing
Condition = tuple[str, Test]


def name(column: str) -> str:
    return column if column.isidentifier() else f"`{column}`"


def number(value: float) -> str:
    return repr(value) if not isinstance(value, float) else f"{value:.17g}"


def text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'" if len(value) % 2 else '"' + value.replace('"', '""') + '"'


def known(column: str, test: Callable[[Any], bool]) -> Test:
    return lambda row: None if row[column] is None else test(row[column])


numbers = st.sampled_from([0, 1, -3, 7, 8, 300, 2**31, -(2**63), 2**64, 0.5, -2.25, 1e300, 6.999])
few_digits = numbers.filter(lambda value: abs(value) < 2**53)
words = st.sampled_from([*COLUMNS["word"][1], "no such"])


def turned(negation: str, holds: bool) -> bool:
    return holds != bool(negation)


negations = st.sampled_from(["", "not "])


@st.composite
def of_numbers(draw: Any) -> Condition:
    column, value, other = draw(st.sampled_from(NUMBERS)), draw(numbers), draw(numbers)
    written, negation = draw(st.sampled_from(sorted(OPERATORS))), draw(negations)
    test = OPERATORS[written]
    if draw(st.booleans()):
        compared: Condition = draw(
            st.sampled_from(
                [
                    (f"{number(value)} {written} {name(column)}", known(column, lambda cell: test(value, cell))),
                    (f"{name(column)}{written}{number(value)}", known(column, lambda cell: test(cell, value))),
                ]
            )
        )
        return compared
    if draw(st.booleans()):
        between = f"{name(column)} {negation}between {number(value)} and {number(other)}"
        return between, known(column, lambda cell: turned(negation, value <= cell <= other))
    listed = f"({number(value)}, {number(other)})"
    return f"{name(column)} {negation}in {listed}", known(column, lambda cell: turned(negation, cell in (value, other)))


@st.composite
def of_texts(draw: Any) -> Condition:
    word, others, negation = draw(words), draw(st.lists(words, min_size=1, max_size=3)), draw(negations)
    written = draw(st.sampled_from(sorted(OPERATORS)))
    if draw(st.booleans()):
        return f"word {written} {text(word)}", known("word", lambda cell: OPERATORS[written](cell, word))
    if draw(st.booleans()):
        listed = ", ".join(map(text, others))
        return f"word {negation}in ({listed})", known("word", lambda cell: turned(negation, cell in others))
    pattern = draw(st.lists(st.sampled_from(["%", "_", "a", "b", "'", "B", "猫", "\n"]), max_size=4).map("".join))
    either = draw(st.booleans())
    regex = "".join({"%": ".*", "_": "."}.get(letter, re.escape(letter)) for letter in pattern)
    found = re.compile(regex, re.DOTALL | (re.IGNORECASE if either else 0)).fullmatch
    like = f"word {negation}{'ILIKE' if either else 'LIKE'} {text(pattern)}"
    return like, known("word", lambda cell: turned(negation, found(cell) is not None))


@st.composite
def of_cells(draw: Any) -> Condition:
    """Of text that is compared with what it is not, as all cells of a CSV file are text."""
    value, written, negation = draw(few_digits), draw(st.sampled_from(sorted(OPERATORS))), draw(negations)

    def read(test: Callable[[float], bool]) -> Test:
        def is_met(row: Row) -> bool | None:
            try:
                cell = float(row["cell"])
            except (TypeError, ValueError):  # nothing, or no number
                return None
            return None if cell != cell else test(cell)

        return is_met

    def flag(row: Row) -> bool | None:
        return {"true": True, "yes": True, "false": False, "0": False}.get((row["cell"] or "").lower())

    drawn: Condition = draw(
        st.sampled_from(
            [
                (f"cell {written} {number(value)}", read(lambda cell: OPERATORS[written](cell, float(value)))),
                (f"{number(value)} {written} cell", read(lambda cell: OPERATORS[written](float(value), cell))),
                (f"cell {negation}in ({number(value)}, 7)", read(lambda cell: turned(negation, cell in (value, 7)))),
                (f"cell {negation}between 1 and 300", read(lambda cell: turned(negation, 1 <= cell <= 300))),
                ("cell", flag),
                ("cell = true", flag),
                ("cell is false", lambda row: flag(row) is False),
                ("cell is not true", lambda row: flag(row) is not True),
            ]
        )
    )
    return drawn


@st.composite
def of_others(draw: Any) -> Condition:
    """Of dates, booleans, lists, missing values and two columns."""
    word, value, day, negation = draw(words), draw(numbers), draw(st.sampled_from(DAYS)), draw(negations)
    written, column = draw(st.sampled_from(sorted(OPERATORS))), draw(st.sampled_from(sorted(COLUMNS)))
    other = draw(st.sampled_from(["Short", "Größe in cm", "unsigned"]))
    test, midnight = OPERATORS[written], dt.datetime.combine(day, dt.time())

    def compare_columns(row: Row) -> bool | None:
        return None if None in (row["whole"], row[other]) else test(row["whole"], row[other])

    drawn: Condition = draw(
        st.sampled_from(
            [
                (f"day {written} '{day}'", known("day", lambda cell: test(cell, day))),
                (f"moment {written} DATE '{day}'", known("moment", lambda cell: test(cell, midnight))),
                ("kept", known("kept", bool)),
                ("kept = true", known("kept", bool)),
                (f"kept is {negation}true", lambda row: turned(negation, row["kept"] is True)),
                (f"{name(column)} is {negation}null", lambda row: turned(negation, row[column] is None)),
                (f"{text(word)} {negation}in texts", known("texts", lambda cell: turned(negation, word in cell))),
                (f"{number(value)} {negation}IN marks", known("marks", lambda cell: turned(negation, value in cell))),
                (f"whole {written} {name(other)}", compare_columns),
            ]
        )
    )
    return drawn


def both(left: bool | None, right: bool | None) -> bool | None:
    return False if False in (left, right) else None if None in (left, right) else True


def opposite(value: bool | None) -> bool | None:
    return None if value is None else not value


def combined(parts: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
    def join(two: tuple[Condition, Condition, str]) -> Condition:
        (first, left), (second, right), word = two
        if word == "and":
            return f"({first}) and ({second})", lambda row: both(left(row), right(row))
        return f"({first}) OR ({second})", lambda row: opposite(both(opposite(left(row)), opposite(right(row))))

    def negate(part: Condition) -> Condition:
        return f"not ({part[0]})", lambda row: opposite(part[1](row))

    return st.tuples(parts, parts, st.sampled_from(["and", "or"])).map(join) | parts.map(negate)


conditions = st.recursive(of_numbers() | of_texts() | of_cells() | of_others(), combined, max_leaves=6)
tables = st.lists(
    st.fixed_dictionaries({column: st.none() | st.sampled_from(cells) for column, (_, cells) in COLUMNS.items()}),
    min_size=1,
    max_size=12,
)
SCHEMA = pa.schema({column: kind for column, (kind, _) in COLUMNS.items()})


def rows_of(table: Any, condition: str) -> list[int]:
    sql = parse_condition(condition, table.schema)
    found: list[int] = table.to_table(columns=[], filter=sql, with_row_id=True)["_rowid"].to_pylist()
    return found


@settings(max_examples=40)
@given(tables, st.lists(conditions, min_size=6, max_size=6))
def test_rows_are_those_of_a_slow_reference(rows: list[Row], asked: list[Condition]) -> None:
    table = lance.write_dataset(pa.Table.from_pylist(rows, SCHEMA), "memory://")
    for condition, test in asked:
        expected = [place for place, row in enumerate(rows) if test(row) is True]
        assert rows_of(table, condition) == expected, (condition, parse_condition(condition, SCHEMA))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64(), pa.uint8()])
def test_least_and_largest(kind: pa.DataType) -> None:
    """Lance reads the least whole number as a real one."""
    bits, signed = kind.bit_width, pa.types.is_signed_integer(kind)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    cells = [low, low + 1, 1, high - 1, high]
    columns = {"n": pa.array(cells, kind), "marks": pa.array([[cell] for cell in cells], pa.list_(kind))}
    table = lance.write_dataset(pa.table(columns), "memory://")
    for value in [low - 1, *cells, high + 1]:
        for written, holds in OPERATORS.items():
            assert rows_of(table, f"n {written} {value}") == [i for i, cell in enumerate(cells) if holds(cell, value)]
        same = [i for i, cell in enumerate(cells) if cell == value]
        assert rows_of(table, f"n in ({value}, {value})") == rows_of(table, f"{value} in marks") == same
        assert rows_of(table, f"n between {value} and {high}") == [i for i, cell in enumerate(cells) if cell >= value]


NEW_YEAR = dt.datetime(2020, 1, 1)
KINDS = [
    *[(kind, 1, "1") for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())],
    *[(kind, 1, "1") for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())],
    *[(kind, 0.1, "0.1") for kind in (pa.float32(), pa.float64())],
    (pa.float16(), 0.5, "0.5"),
    (pa.decimal128(5, 2), Decimal("1.25"), "1.250"),
    (pa.bool_(), True, "TRUE"),
    *[(kind, NEW_YEAR.date(), "'2020-01-01'") for kind in (pa.date32(), pa.date64())],
    *[(pa.timestamp(unit), NEW_YEAR, "'2020-01-01'") for unit in ("s", "ms", "us", "ns")],
    (pa.timestamp("s", "UTC"), NEW_YEAR.replace(tzinfo=dt.UTC), "'2020-01-01 00:00Z'"),
]


@pytest.mark.parametrize(("kind", "value", "written"), KINDS, ids=str)
def test_every_type_alone_and_in_lists(kind: pa.DataType, value: Any, written: str) -> None:
    lists = {"many": pa.list_(kind), "large": pa.large_list(kind), "fixed": pa.list_(kind, 1)}
    columns = {"one": pa.array([value, None], kind)} | {
        name: pa.array([[value], None], of) for name, of in lists.items()
    }
    table = lance.write_dataset(pa.table(columns), "memory://")
    asked = [f"one {operator} {written}" for operator in ("=", ">=", "<=", "in (")]
    for condition in [condition + ")" * condition.count("(") for condition in asked] + [
        f"{written} in {name}" for name in lists
    ]:
        assert rows_of(table, condition) == [0], condition
    assert rows_of(table, f"one != {written}") == rows_of(table, f"{written} not in many") == []


def test_decimals() -> None:
    cells = [Decimal("1.25"), Decimal("-1.30"), None]
    table = lance.write_dataset(pa.table({"price": pa.array(cells, pa.decimal128(5, 2))}), "memory://")
    assert rows_of(table, "price > 1.254") == []
    assert rows_of(table, "price > 1.2499999999999999999999") == [0]
    assert rows_of(table, "price < 1e20") == [0, 1]
    with pytest.raises(UsageError, match="may have 38 digits"):
        rows_of(table, "price < 1e60")


ROW = {column: cells[1] for column, (_, cells) in COLUMNS.items()} | {"inner": {"Year": 3, "deep": {"x y": "z"}}}


@pytest.fixture(scope="module")
def table() -> Any:
    kinds = {column: kind for column, (kind, _) in COLUMNS.items()}
    kinds |= {"inner": pa.struct({"Year": pa.int64(), "deep": pa.struct({"x y": pa.string()})})}
    kinds |= {"zoned": pa.timestamp("us", "UTC"), "tagged": pa.dictionary(pa.int32(), pa.string())}
    kinds |= {
        "missing": pa.int64(),
        "bytes": pa.binary(),
        "vector": pa.list_(pa.float16(), 4),
        "single": pa.float32(),
        "odd`name": pa.int64(),
    }
    noon = dt.datetime(2020, 2, 29, 12, tzinfo=dt.UTC)
    row = ROW | {"zoned": noon, "tagged": "b", "bytes": b"b", "vector": np.ones(4, np.float16), "single": 0.1}
    return lance.write_dataset(pa.Table.from_pylist([row], pa.schema(kinds)), "memory://")


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("inner.year = 3 AND inner.deep.`x y` like 'z'", True),
        ("WHOLE = 1 and `whole` = +1.0", True),  # a name of other case, if there is only one
        ("single = 0.1", True),  # as it is stored, not as 0.1 in more digits
        ("zoned > '2020-02-29 13:00+02:00'", True),
        ("zoned > timestamp '2020-02-29 12:00:00Z'", False),
        ("moment = '2020-02-29T12:30'", True),
        ("tagged in ('a', 'b') and tagged like '_'", True),
        ("bytes is not null", True),
        ("real > -.5e-1 and 1 < 2 or whole = 1", None),
        ("not not not not whole = 1", True),
        ("word = 'a' or word = 'b' and word = 'c'", True),  # AND binds more tightly
        ("not word = 'b' and word = 'a'", True),  # and NOT most
        ("missing not in (0) or missing not in (1)", False),  # unknown, though no number is both
        ("not (missing in (0) and missing in (1))", False),
        ("not missing not in (0)", False),
        ("not (whole not in (0) and whole not in (2))", False),
        ("word='a'AND(whole)=1", None),
        ("'a' in texts and not 'b' in texts and 'b' not in texts", True),
    ],
)  # fmt: skip
def test_meaning(table: Any, condition: str, holds: bool | None) -> None:
    if holds is None:
        with pytest.raises(UsageError, match="condition"):
            parse_condition(condition, table.schema)
    else:
        assert rows_of(table, condition) == [0] * holds


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("length/**/(repeat/**/('a', 200000000)) > 5", "compares columns with values"),
        ("`length`(`repeat`('a', 400000000)) > 5", "no functions"),
        ("`repeat`(word,2000000)='b'", "no functions"),
        ("repeat/**/('a',1000000000)='b'", "compares columns with values"),
        ("word = repeat('a', 9)", "no functions"),
        ("\"repeat\"(word, 9) = 'b'", "expected a comparison"),
        ("word = 'a' -- and", "expected AND, OR or the end"),
        ("word = 'a'; drop table x", "compares columns with values"),
        ("word = 'a' || 'b'", "compares columns with values"),
        ("whole + 1 = 2", "expected a comparison"),
        ("(select 1) = 1", "'select', which is not there"),
        ("whole in (select 1)", "expected a value"),
        ("case when kept then true end", "is not there|expected"),
        ("cast(whole as text) = 'a'", "no functions"),
        ("whole::text = 'a'", "compares columns with values"),
        ("array_has(texts, 'a')", "no functions"),
        ("inner['year'] = 3", "compares columns with values"),
        ("word = E'a'", "'E', which is not there"),
        ("word = 'a' collate x", "expected AND, OR or the end"),
        ("word like 'a' escape 'b'", "expected AND, OR or the end"),
        ("wrod = 'a'", r"'wrod', which is not there; there are: word"),
        ("inner.yaer = 3", r"there are: Year"),
        ("word.year = 3", r"'word.year', which is not there; there are: nothing, for word has no fields"),
        ("vector is null", "'vector', which is not there"),
        ("_rowid = 1", "'_rowid', which is not there"),
        ("`odd`name = 1", "is not there|expected"),
        ("real", "expected a comparison"),
        ("1 = 1", "one side must be a column"),
        ("true", "expected a comparison"),
        ("kept = 3", "kept, which holds boolean, cannot be used: it cannot be compared with 3"),
        ("word = 9007199254740992", "put it in quotes: '9007199254740992'"),
        ("word in (3, 'a')", "word, which holds text, cannot be used: it cannot be compared with 3"),
        ("whole = '3'", "whole, which holds number, cannot be used: it cannot be compared with '3'"),
        ("whole = word", "it cannot be compared with word, which holds text"),
        ("whole like '3'", "LIKE compares a column of text"),
        ("texts = 'a'", "'a' IN `texts`"),
        ("texts like '%a%'", "LIKE compares a column of text"),
        ("'a' in word", "takes a column of lists"),
        ("word in texts", r"expected \("),
        ("word in ()", "expected a value"),
        ("word = null", "IS NULL"),
        ("whole is true", "expected NULL"),
        ("day > '2020-13-01'", "is no date"),
        ("day > '2020-01-01 05:00'", "days without a time"),
        ("day > timestamp 'soon'", "this is no date"),
        ("whole > 1e400", "too large"),
        ("whole > - - 1", "expected a number"),
        ("whole > 1a", "compares columns with values"),
        ("word = 'a", "this quote is not closed"),
        ("whole =", r"expected a value.*; there are: whole, Short"),
        ("", "expected a value"),
        ("whole = 1 and", "expected a value"),
        ("(" * 5 + "whole = 1" + ")" * 4, r"expected \)"),
        ("whole = 1)", "expected AND, OR or the end"),
        ("inner = 3", "it cannot be compared with 3"),
        ("bytes = 'b'", "binary"),
        ("not", "expected a value"),
        ("whole not = 1", "expected IN, LIKE or BETWEEN"),
        ("whole = 1\0", "compares columns with values"),
    ],
)
def test_what_is_refused(table: Any, condition: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"condition.*({sentence})"):
        parse_condition(condition, table.schema)


def test_bounds(table: Any) -> None:
    for condition in (
        "(" * (MAX_DEPTH + 1) + "whole = 1" + ")" * (MAX_DEPTH + 1),
        "(" * 10_000,
        " or ".join(["whole = 1"] * (MAX_PARTS // 2 + 1)),
        f"whole in ({', '.join(['1'] * (MAX_PARTS + 1))})",
        "word = '" + "a" * MAX_LENGTH + "'",
    ):
        with pytest.raises(UsageError, match=r"the condition .*(deep|may have 2000|20000 are allowed)"):
            parse_condition(condition, table.schema)


def test_largest_conditions_are_answered_soon(table: Any) -> None:
    """Lance needs minutes for 40 nested NOTs, and its own parser ends at 50 brackets."""
    began = time.monotonic()
    assert rows_of(table, "not " * 4000 + "kept") == []
    assert rows_of(table, "not (" * MAX_DEPTH + "whole = 1" + ")" * MAX_DEPTH) == [0]
    deep = "whole = 1"
    for level in range(MAX_DEPTH):
        deep = f"not (whole = {level + 2} {'or' if level % 2 else 'and'} {deep})"
    assert rows_of(table, deep) == []
    assert rows_of(table, f"NOT {deep}") == [0]
    assert rows_of(table, " or ".join(["whole = 1"] * (MAX_PARTS // 2))) == [0]
    assert rows_of(table, f"whole in ({', '.join(map(str, range(MAX_PARTS - 1)))})") == [0]
    assert time.monotonic() - began < 30


@settings(max_examples=300)
@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["whole", "(", ")", "'", "in", "not", ".", "1", "=", "`", "-"])).map(" ".join)
)
def test_any_text_is_read_or_explained(condition: str) -> None:
    with suppress(UsageError):
        parse_condition(condition, SCHEMA)
