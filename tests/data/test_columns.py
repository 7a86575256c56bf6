from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.tables.columns import text_cells


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ('["a", "b"]', ("a", "b")),
        ("['a', \"it's\"]", ("a", "it's")),
        ("['a' 'b'\n 'c']", ("a", "b", "c")),  # as pandas writes an array of numpy
        ("['one']", ("one",)),
        ("['\\d odd']", ("\\d odd",)),
        ("[an owl]", ("[an owl]",)),
        ("['a', 1]", ("['a', 1]",)),
        ("[ ]", ()),
        ('[{"raw": "a", "sentid": 1}, {"raw": "b", "sentid": 2}]', ("a", "b")),
        ('[{"n": 1}]', ('[{"n": 1}]',)),
        ("[1, 2]", ("[1, 2]",)),
        ("['a] and [b']", ("a] and [b",)),
        ("['broken", ("['broken",)),
        ({"en": "a", "de": "b", "it": None, "fr": ["c"]}, ("a", "b", "c")),
        ([{"raw": "a", "tokens": ["a"]}, {"raw": "b"}], ("a", "b")),
        ([{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "An owl."}], ("An owl.",)),
        (
            [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": [{"type": "text", "text": "An owl."}, {"type": "image"}]},
            ],
            ("An owl.",),
        ),
    ],
)
def test_a_cell_that_holds_several_texts(cell: Any, texts: tuple[str, ...]) -> None:
    assert text_cells({"c": cell}, ["c"]) == texts


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_lists_that_json_and_python_write(texts: list[str]) -> None:
    expected = tuple(stripped for text in texts if (stripped := text.strip()))
    for written in (json.dumps(texts), json.dumps(texts, ensure_ascii=False), repr(texts)):
        assert text_cells({"c": written}, ["c"]) == expected
