from __future__ import annotations

import os
import sys
from pathlib import Path, PurePath
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.places.file_names import NameFinder, place_of
from lamplit.data.sources import read_pairs


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take both forms, or backslashes")
def test_names_from_other_systems_are_found(tmp_path: Path) -> None:
    names = NameFinder()
    apart = Path(normalize("NFD", "été")) / normalize("NFD", "ä.jpg")
    (tmp_path / apart).parent.mkdir()
    (tmp_path / apart).write_bytes(b"")
    (tmp_path / "odd\\name.jpg").write_bytes(b"")
    name = normalize("NFC", "été/ä.jpg")
    assert names.find(tmp_path, name) == (name, tmp_path / apart)
    assert names.find(tmp_path, name.replace("/", "\\")) == (name, tmp_path / apart)
    assert names.find(tmp_path, "odd\\name.jpg") == ("odd\\name.jpg", tmp_path / "odd\\name.jpg")
    assert names.find(tmp_path, "gone\\ö.jpg") == ("gone/ö.jpg", tmp_path / "gone/ö.jpg")
    assert names.find(tmp_path, str(tmp_path / name))[1] == tmp_path / apart


def test_a_caption_beside_an_image_may_have_the_other_form(tmp_path: Path) -> None:
    for stem in ("Tür", "plain"):
        (tmp_path / f"{normalize('NFD', stem)}.png").touch()
        (tmp_path / f"{normalize('NFC', stem)}.txt").write_text("A door.")
    assert [pair.texts for pair in read_pairs(tmp_path)] == [("A door.",)] * 2


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[object] = []
    list_folder = os.listdir

    def listing(folder: Path) -> list[str]:
        listed.append(folder)
        return list_folder(folder)

    monkeypatch.setattr(os, "listdir", listing)
    names = NameFinder()
    for number in range(5):
        names.find(tmp_path, f"ä{number}.jpg")
        names.find(tmp_path, f"a{number}.jpg")
    assert listed == [tmp_path]


def test_one_spelling_for_one_file() -> None:
    names = ["a/ä.jpg", "./a/ä.jpg", "a\\ä.jpg", "a/b/../ä.jpg", normalize("NFD", "a/ä.jpg")]
    assert {place_of(name) for name in names} == {"a/ä.jpg"}


@given(st.text("ab./\\é", max_size=8))
def test_names_are_spelled_as_paths_are(name: str) -> None:
    folder = Path("/nowhere")
    spelled, file = NameFinder().find(folder, name)
    assert spelled == PurePath(name.replace("\\", "/")).as_posix()
    assert file == folder / name.replace("\\", "/")
