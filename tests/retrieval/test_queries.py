from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.errors import UsageError
from lamplit.retrieval.queries import Term, parse_query


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("a red ring", [("a red ring", 1)]),
        ("", [("", 1)]),
        ("a dog - not a cat", [("a dog - not a cat", 1)]),
        ('the "Mona Lisa"', [('the "Mona Lisa"', 1)]),
        ("2 dogs + 3 cats", [("2 dogs + 3 cats", 1)]),
        ("- dogs", [("- dogs", 1)]),
        ('"beach"', [("beach", 1)]),
        ('"beach" - "people"', [("beach", 1), ("people", -1)]),
        ('"beach"-"people"', [("beach", 1), ("people", -1)]),
        ('-"people" + "beach"', [("people", -1), ("beach", 1)]),
        ('0.5 * "red" + "car"', [("red", 0.5), ("car", 1)]),
        ('"red" * 2. - .5*"a"*4', [("red", 2), ("a", -2)]),
        (r'"say \"hi\" \\ now" + ""', [('say "hi" \\ now', 1), ("", 1)]),
        ('"a - b" - "c + d"\n', [("a - b", 1), ("c + d", -1)]),
    ],
)
def test_query(query: str, terms: list[tuple[str, float]]) -> None:
    assert parse_query(query) == [Term(text, weight) for text, weight in terms]


@pytest.mark.parametrize(
    ("query", "reason", "place"),
    [
        ('"beach" "people"', r"expected \+ or -", 8),
        ('"beach" - people', r"expected words in quotes", 10),
        ('"beach" -', r"expected words in quotes", 9),
        ('"beach" + - "people"', "expected words in quotes", 10),
        ('"beach', "this quote is not closed", 0),
        ('"a" + "beach', "this quote is not closed", 6),
        ('"a" + 2 "b"', r"expected \* and words in quotes", 8),
        ('"a" * "b"', "expected a number", 6),
        ('"Mona Lisa" painting', "expected words in quotes", 12),
    ],
)
def test_error_points_at_the_place(query: str, reason: str, place: int) -> None:
    with pytest.raises(UsageError, match=reason) as raised:
        parse_query(query)
    _, shown, caret = str(raised.value).split("\n")
    assert shown == "  " + query
    assert caret == "  " + " " * place + "^"


weights = st.floats(0.001, 100).map(lambda value: round(value, 3))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=8), weights, st.booleans(), st.booleans()), min_size=1, max_size=4))
def test_what_is_written_is_read(parts: list[tuple[str, float, bool, bool]]) -> None:
    query, terms = "", []
    for text, weight, negative, before in parts:
        quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        query += " - " if negative else " + "
        query += f"{weight} * {quoted}" if before else f"{quoted} * {weight}"
        terms.append(Term(text, -weight if negative else weight))
    assert parse_query(query) == terms


@given(st.text(alphabet='ab "*+-.05\\\n\t', max_size=20))
def test_any_query_is_read_or_explained(query: str) -> None:
    with suppress(UsageError):
        assert parse_query(query)
