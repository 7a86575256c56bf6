from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lamplit.data.tables.delimited import DelimitedFile

# Quotes, delimiters, line ends and spaces are far likelier than in any text.
cells = st.text(st.sampled_from("\"'a,;\t|\n\r é") | st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def opened(path: Path, content: str, name: str = "a.csv") -> DelimitedFile:
    file = path / name
    file.write_bytes(content.encode())
    return DelimitedFile.open(file, file.suffix)


@settings(max_examples=300)
@given(
    st.sampled_from([(".csv", ","), (".csv", ";"), (".csv", "\t"), (".csv", "|"), (".tsv", "\t"), (".tsv", ",")]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.tuples(cells, cells, cells), max_size=5),
)
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[str, str],
    quoting: int,
    end: str,
    rows: list[tuple[str, str, str]],
) -> None:
    suffix, delimiter = kind
    names = ("file_name", "text, or; words|", "n")
    # Between tabs and bars, lines that are rows by themselves are not taken for one cell.
    is_lenient = delimiter in "\t|"
    assume(not is_lenient or not any(delimiter in cell and {"\n", "\r"} & set(cell) for row in rows for cell in row))
    # The writer quotes a carriage return only where lines end in one.
    assume(end != "\n" or quoting != csv.QUOTE_MINIMAL or not any("\r" in cell for row in rows for cell in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
    writer.writerow(names)
    writer.writerows(rows)
    table = opened(tmp_path_factory.getbasetemp(), text.getvalue(), f"given{suffix}")
    expected = [dict(zip(names, row, strict=True)) for row in rows]
    assert table.delimiter == delimiter
    assert list(table.rows()) == expected
    assert list(table.column("n")) == [row["n"] for row in expected]
    assert table.count() == len(rows)


@pytest.mark.parametrize(
    ("content", "delimiter", "row"),
    [
        ("filepath;title\na.jpg;An owl, asleep\n", ";", {"filepath": "a.jpg", "title": "An owl, asleep"}),
        ("filepath\ttitle\na.jpg\tAn owl\n", "\t", {"filepath": "a.jpg", "title": "An owl"}),
        ("image_name| n| comment\na.jpg| 0| An owl .\n", "|", {"image_name": "a.jpg", "n": "0", "comment": "An owl ."}),
        ("sep=;\r\nimage;text\r\na.jpg;b\r\n", ";", {"image": "a.jpg", "text": "b"}),
        ("words;more,image\na;b,c\n", ",", {"words;more": "a;b", "image": "c"}),
        ("filepath, title\na.jpg, An owl\n", ",", {"filepath": "a.jpg", "title": "An owl"}),
        ('image, "text"\na.jpg, "b, c"\n', ",", {"image": "a.jpg", "text": "b, c"}),
        ("image\na;b.jpg\n", ",", {"image": "a;b.jpg"}),
    ],
)
def test_the_header_says_what_separates(tmp_path: Path, content: str, delimiter: str, row: dict[str, str]) -> None:
    table = opened(tmp_path, content)
    assert (table.delimiter, list(table.rows())) == (delimiter, [row])
    words = {";": "semicolons", "\t": "tabs", "|": "bars"}
    assert table.notes == ((f"a.csv is separated by {words[delimiter]}",) if delimiter != "," else ())


def test_a_quote_that_begins_a_caption_is_a_character(tmp_path: Path) -> None:
    content = (
        'image\ttext\na\t"the red one is big\nb\t5" wide cross\nc\t"quoted"\nd\t"open\ne\t"two" words\nf\tclose"\n'
    )
    texts = ['"the red one is big', '5" wide cross', "quoted", '"open', '"two" words', 'close"']
    table = opened(tmp_path, content, "a.tsv")
    assert [row["text"] for row in table.rows()] == list(table.column("text")) == texts
    long = 'image\ttext\na\t"open\n' + "b\tc\n" * 500 + 'd\tclose"\n'
    assert opened(tmp_path, long, "b.tsv").count() == 502


def test_a_packed_table(tmp_path: Path) -> None:
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(b"image;text\na.jpg;b\n"))
    assert list(DelimitedFile.open(file, ".csv").rows()) == [{"image": "a.jpg", "text": "b"}]
