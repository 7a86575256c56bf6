from __future__ import annotations

import os
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from lamplit.data.pairs import Pair
from lamplit.data.places.image_files import walk
from lamplit.data.skipped import Skipped
from lamplit.data.sources import read_pairs
from lamplit.errors import PairsError


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    touch(root / "a.jpg", root / "b" / "b.jpg", other / "c.jpg", other / "deep" / "d.png", root / ".hidden" / "h.jpg")
    (root / "linked").symlink_to(other)
    (other / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "b")
    (root / "file.jpg").symlink_to(other / "c.jpg")
    found = walk(root)
    names = ["a.jpg", "b/b.jpg", "file.jpg", "linked/c.jpg", "linked/deep/d.png"]
    assert [file.as_posix() for file in found.files] == names
    assert found.notes == [
        "again is a link to a folder that is read already", "linked/loop is a link to a folder that is read already",
    ]  # fmt: skip
    assert [pair.id for pair in read_pairs(root)] == names
    assert read_pairs(root).notes == found.notes


def test_what_leads_nowhere_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "closed" / "b.jpg")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "nothing.jpg").symlink_to(tmp_path / "gone.jpg")
    pairs = read_pairs(tmp_path)
    assert [pair.id for pair in pairs] == ["a.jpg", "closed/b.jpg", "nothing.jpg"]  # skipped when it is its turn
    assert pairs.problems == [Skipped("nothing", str(tmp_path / "nothing"), "a link that leads nowhere")]


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may read all")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "closed" / "b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        [problem] = walk(tmp_path).problems
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert (problem.id, problem.reason) == ("closed", "folder cannot be read (Permission denied)")


def test_texts_and_metadata_beside_an_image(tmp_path: Path) -> None:
    touch(*(tmp_path / "00000" / f"{n}.jpg" for n in range(4)))
    files = {
        "0.txt": "from the text", "0.json": '{"caption": "other", "width": 4}',
        "1.json": '{"caption": "from the json", "url": "u"}', "2.json": "{broken",
        "3.json": f'{{"a": "{"x" * 2**18}"}}',
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "00000" / name).write_text(content)
    touch(tmp_path / "00000.parquet", tmp_path / "00000_stats.json")
    pairs = read_pairs(tmp_path)
    folder = {"folder": "00000"}
    assert [(pair.texts, pair.metadata) for pair in pairs] == [
        (("from the text",), folder | {"caption": "other", "width": 4}),
        (("from the json",), folder | {"url": "u"}),
        ((), folder | {"json": "{broken"}),
        ((), folder),
    ]
    assert pairs.notes == [f"{tmp_path} is read as a folder of images; 00000.parquet is left out"]
    assert isinstance(next(iter(pairs)), Pair)


def test_a_store_below_the_images_is_left_alone(tmp_path: Path) -> None:
    """Lance lists deleted rows in `.arrow` files, and a folder with such a file was read by it."""
    (tmp_path / "a.png").touch()
    (tmp_path / "old" / "_versions").mkdir(parents=True)  # no table, though a folder has that name
    (tmp_path / "old" / "_versions" / "b.png").touch()
    lance.write_dataset(pa.table({"n": [1, 2]}), tmp_path / "photos.lance")
    lance.dataset(tmp_path / "photos.lance").delete("n = 1")
    assert list(tmp_path.rglob("*.arrow"))
    assert [file.as_posix() for file in walk(tmp_path).files] == ["a.png", "old/_versions/b.png"]
    assert [pair.id for pair in read_pairs(tmp_path)] == ["a.png", "old/_versions/b.png"]
    with pytest.raises(PairsError, match=r"is a table of Lance.*lamplit import .*photos\.lance --image-tower NAME"):
        read_pairs(tmp_path / "photos.lance")
