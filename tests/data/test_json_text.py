from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.json_text import DEEPEST, parse_json
from lamplit.data.sources import read_pairs

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('[]{}"\\a')),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
)


def depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth, items), default=0)


def nested(value: Any, times: int) -> str:
    return "[" * times + json.dumps(value) + "]" * times


@given(VALUES, st.integers(0, 2 * DEEPEST))
def test_what_is_not_too_deep_is_what_json_says(value: Any, times: int) -> None:
    text = nested(value, times)
    for written in (text, text.encode()):
        if times + depth(value) <= DEEPEST:
            assert parse_json(written) == json.loads(text)
        else:
            with pytest.raises(ValueError, match="more than 100 lists and objects lie inside each other"):
                parse_json(written)


def test_no_depth_is_a_traceback() -> None:
    with pytest.raises(ValueError, match="inside each other"):
        parse_json(nested("a", 100_000))
    assert parse_json(json.dumps("[" * 100_000)) == "[" * 100_000


@pytest.mark.parametrize("times", [DEEPEST + 1, 600, 100_000])
def test_one_deep_row_ends_no_reading(tmp_path: Path, times: int) -> None:
    """At 600 it was Python that called itself too often, behind the parser."""
    deep = nested("a", times)
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    rows = ['{"image": "a.png", "text": "A"}', f'{{"image": "b.png", "text": {deep}}}', '{"image": "c.png", "m": 1}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    pairs = read_pairs(tmp_path / "rows.jsonl")
    assert [pair.id for pair in pairs] == ["a.png", "c.png"]
    assert [problem.id for problem in pairs.problems] == ["rows.jsonl, line 2"]
    (tmp_path / "rows.csv").write_text(f"image,text\na.png,A\nb.png,{deep}\n".replace('"', ""))
    cells = [pair.texts for pair in read_pairs(tmp_path / "rows.csv")]
    assert [len(texts) for texts in cells] == [1, 1]
    (tmp_path / "rows.csv").unlink()
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "b.json").write_text(f'{{"m": {deep}}}')
    assert [pair.texts for pair in read_pairs(tmp_path)] == [(), (), ()]
