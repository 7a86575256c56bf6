from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lamplit.retrieval.copies import Copies


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=30), st.booleans())
def test_against_loops(rows: list[tuple[int, bool]], is_condition: bool) -> None:
    contents = [content for content, _ in rows]
    holds = [not is_condition or flag for _, flag in rows]
    allowed = np.array(holds, bool) if is_condition else None
    copies = Copies.of(np.array(contents, np.int64))
    assert copies.rows.tolist() == [row for row, content in enumerate(contents) if contents.count(content) > 1]
    first = copies.first_only(len(rows), allowed)
    expected = [
        holds[row] and not any(holds[i] and contents[i] == contents[row] for i in range(row))
        for row in range(len(rows))
    ]
    assert (np.ones(len(rows), bool) if first is None else first).tolist() == expected
    others = copies.of_rows(np.arange(len(rows)))
    assert [found.tolist() for found in others] == [
        [i for i in range(len(rows)) if i != row and contents[i] == contents[row]] for row in range(len(rows))
    ]


def test_a_store_without_copies_needs_no_mask() -> None:
    assert Copies.of(np.arange(5)).first_only(5) is None
