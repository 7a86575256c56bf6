"""Contact sheets of captions that people write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamplit.errors import UsageError
from lamplit.retrieval.contact_sheet import contact_sheet
from lamplit.retrieval.picture_files import font_for, one_line
from lamplit.retrieval.searcher import Hit


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (40, 30), "green").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def drawn(folder: Path, picture: str, query: str, caption: str) -> np.ndarray:
    """Draw one hit; return where the sheet is not white, title and caption apart from the picture."""
    contact_sheet({query: [Hit(0.5, "a", picture, [caption], {})]}, folder / "new" / "sheet.png")
    with Image.open(folder / "new" / "sheet.png") as sheet:
        dark = (np.asarray(sheet.convert("L")) < 200).astype(int)
    return np.concatenate([dark[:40], dark[235:]])


def test_line_breaks_are_spaces(tmp_path: Path, picture: str) -> None:
    broken = drawn(tmp_path, picture, "a boat\non a lake", "A boat.\r\nOn\ta lake.")
    assert (broken == drawn(tmp_path, picture, "a boat on a lake", "A boat. On a lake.")).all()
    assert one_line(" a \n\n b ") == "a b"


@pytest.mark.parametrize("texts", ["Лягушка", "βάτραχος", "a frog", ""])
def test_letters_are_drawn(texts: str) -> None:
    """Each by a shape of its own, where a font without it would draw one box for all."""
    font = font_for(texts, 24)
    if "truetype" not in type(font).__name__.lower() and not hasattr(font, "getname"):
        pytest.skip("Pillow is built without FreeType")
    if texts and ord(texts[0]) > 0x24F and font.getname()[0].startswith("Aileron"):
        pytest.skip("this system has no font with these letters")
    shapes = {bytes(font.getmask(letter)) for letter in set(texts) - {" "}}
    assert len(shapes) == len(set(texts) - {" "})


def test_what_is_refused(tmp_path: Path, picture: str) -> None:
    hits = [Hit(0.5, "a", picture, [], {})]
    with pytest.raises(UsageError, match=r"a contact sheet takes hits by their query; these are a list"):
        contact_sheet(hits, tmp_path / "a.png")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"a.xyz cannot be written as a picture; expected a name that ends in .png"):
        contact_sheet({"a": hits}, tmp_path / "a.xyz")
    contact_sheet({}, tmp_path / "nothing.webp")
    assert (tmp_path / "nothing.webp").is_file()
