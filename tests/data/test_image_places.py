"""The paths of images inside files: written, read again, and told from the names of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.places.image_places import RowPlace, TarPlace, image_name, parse_place, place_in_table
from lamplit.locations.paths import path_of

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
numbers = st.integers(0, 10**18 - 1)


@given(names, numbers, numbers, names)
def test_a_tar_s_place_is_read_as_it_was_written(file: str, first: int, last: int, name: str) -> None:
    place = TarPlace(file, first, last, name)
    assert parse_place(str(place)) == place
    assert parse_place(str(TarPlace(file, first, last))) == TarPlace(file, first, last)


@given(names, numbers, names)
def test_a_row_s_place_is_read_as_it_was_written(file: str, row: int, column: str) -> None:
    assert parse_place(str(RowPlace(file, row, column))) == RowPlace(file, row, column)


@given(names, names)
def test_what_stands_in_a_tar_or_a_table_leads_to_no_other_file(column: str, name: str) -> None:
    """Whoever made the archive chose these names; the file is found by what stands before them, by every path."""
    for place in (RowPlace("/data/a.parquet", 1, column), TarPlace("/data/a.tar", 512, 600, name)):
        written = str(place)
        assert written.count("#") == written.count("/") - 1 == 1
        assert str(Path(written)) == written
        assert str(path_of(f"s3:/{written}")) == f"s3:/{written}"
        assert not any(ord(letter) < 32 for letter in written)


@pytest.mark.parametrize(
    "path",
    [
        "", "#", "a.jpg", "owl #2.jpg", "a#2", "#bytes=0-1,name=a", "a.tar#bytes=1-", "a.tar#bytes=-5-7",
        "a.tar#bytes=1-2,", "a.tar#bytes=1-2,name=b/c", "a.tar#bytes=1-2,name=b#c", "a.tar#bytes=1-2 ",
        "a.tar#bytes=\u0661-\u0662", "a.tar#bytes=1-2\n", "a.parquet#row=1", "a.parquet#row=1,column=",
        "a.parquet#row=-1,column=b", "a.parquet#row=1e3,column=b", f"a.parquet#row={'9' * 19},column=b",
        "a.parquet#row=1,column=b/../c",
    ],
)  # fmt: skip
def test_other_text_is_the_name_of_a_file(path: str) -> None:
    assert parse_place(path) is None


def test_the_last_hash_ends_the_name_of_the_file() -> None:
    place = parse_place("/a#row=1,column=b/c.parquet#row=2,column=d")
    assert place == RowPlace("/a#row=1,column=b/c.parquet", 2, "d")


def test_only_tables_that_can_be_read_at_random_have_places() -> None:
    assert place_in_table(Path("/a/b.PARQUET"), 7, "image") == "/a/b.PARQUET#row=7,column=image"
    assert place_in_table(Path("/a/b.arrow"), 7, "a/b#c%") == "/a/b.arrow#row=7,column=a%2Fb%23c%25"
    assert place_in_table(path_of("s3://a/b.parquet"), 7, "image") == "s3://a/b.parquet#row=7,column=image"
    for file in ("/a/b.csv", "/a/b.jsonl.gz", "/a/b.json"):
        assert place_in_table(Path(file), 7, "image") == ""
    assert place_in_table(path_of("s3://a/b.arrow"), 7, "image") == ""


def test_people_read_names_without_folders() -> None:
    assert image_name("/home/ann/owl #2.jpg") == "owl #2.jpg"
    assert image_name("/home/ann/a.tar#bytes=512-600,name=owl.jpg") == "owl.jpg in a.tar"
    assert image_name("/home/ann/a.tar#bytes=512-600") == "bytes 512-600 of a.tar"
    assert image_name("/home/ann/a.parquet#row=7,column=image") == "row 7 of a.parquet"
    assert image_name("000123") == "000123"
