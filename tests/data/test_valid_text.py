from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.decoding.images import open_bytes
from lamplit.data.pairs import Pairs
from lamplit.data.skipped import Skipped
from lamplit.data.sources import read_pairs
from lamplit.data.valid_text import file_named, valid_id, valid_text, valid_value
from lamplit.errors import ImageError

any_text = st.text(st.characters() | st.characters(categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.integers() | any_text, lambda inner: st.lists(inner) | st.dictionaries(any_text, inner)
)


@pytest.mark.parametrize(
    ("text", "valid"), [("half \ud83d surrogate", "half \ufffd surrogate"), ("\udcff", "\ufffd"), ("ß 😀", "ß 😀")]
)
def test_half_a_character_is_replaced(text: str, valid: str) -> None:
    assert valid_text(text) == valid


@pytest.mark.parametrize(("name", "valid"), [("a\udcff1.png", "a\\xff1.png"), ("\ud83d", "\\ud83d"), ("ß", "ß")])
def test_ids_tell_which_bytes_a_name_has(name: str, valid: str) -> None:
    assert valid_id(name) == valid


@given(any_text, json_values)
def test_what_is_valid_can_be_encoded_and_stays(text: str, value: Any) -> None:
    for made in (valid_text(text), valid_id(text), json.dumps(valid_value(value), ensure_ascii=False)):
        made.encode("utf-8")
        assert valid_text(made) == valid_id(made) == made


def test_rows_that_are_not_unicode_give_valid_pairs(tmp_path: Path) -> None:
    row = {"image": "a\ud83d.png", "text": "half \ud83d", "who": {"\udcff": ["x\udfff"]}, "\ud83d": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    [pair] = read_pairs(tmp_path / "a.jsonl")
    assert (pair.id, pair.texts) == ("a\\ud83d.png", ("half \ufffd",))
    assert pair.metadata == {"who": {"\ufffd": ["x\ufffd"]}, "\ufffd": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_whose_name_is_not_utf8_has_a_valid_id_and_opens(tmp_path: Path) -> None:
    file = os.path.join(os.fsencode(tmp_path), b"a\xff1.png")
    with open(file, "wb") as opened:
        opened.write(b"content")
    [pair] = read_pairs(tmp_path)
    assert pair.id == "a\\xff1.png"
    assert isinstance(pair.image, Path)
    assert pair.image.read_bytes() == b"content"
    stored = valid_id(str(pair.image))  # as the page, contact sheets and tuning on images have it
    assert file_named(stored) == str(pair.image) == file_named(str(pair.image))
    assert open_bytes(Path(stored)) == b"content"
    Path(stored).write_bytes(b"of this name itself")
    assert open_bytes(Path(stored)) == b"of this name itself"
    with pytest.raises(ImageError, match="file not found"):
        open_bytes(tmp_path / "none\\xff.png")


def test_notes_and_problems_are_those_of_one_source() -> None:
    first, second = (Pairs("a", 0, None, (), lambda: iter(())) for _ in range(2))
    first.notes.append("read as Latin-1")
    assert not second.notes
    assert not second.problems
    assert first == second


def test_what_is_skipped_can_be_written(tmp_path: Path) -> None:
    # Half a pair stands for no byte, so no system call takes such a path.
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a\ud83d.png"}) + "\n")
    [pair] = read_pairs(tmp_path / "a.jsonl")
    with pytest.raises(ImageError, match="file not found"):
        open_bytes(pair.image)
    skipped = Skipped(pair.id, str(pair.image), "file not found")
    assert skipped.path == f"{tmp_path}/a\\ud83d.png"
    assert Skipped("a\udcff", "b\udcff", "c\udcff") == Skipped("a\\xff", "b\\xff", "c\\xff")
