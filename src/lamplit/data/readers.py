"""Rows of tables and samples of tars, as they stand in their files.

CSV and Parquet are read by Hugging Face `datasets`, streaming. JSON lines and tars are read by the standard
library, because `datasets` 5.2 loses rows there: its webdataset reader wants every sample of a tar to have
the same types of files (one PNG among JPEGs comes back as nothing), and its JSON reader fails where a column
is null for the first 10 MB and turns captions that look like dates into dates.
"""

from __future__ import annotations

import csv
import glob
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from lamplit.data.columns import Cells

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_TEXT_FIELDS = frozenset(("txt", "text", "caption", "title", "transcript", "cls", "id"))  # of a tar's sample


def table_rows(file: Path) -> Iterator[Cells]:
    """Yield the rows of a table, by its suffix; images stay encoded."""
    match file.suffix.lower():
        case ".csv":
            yield from _csv_rows(file, ",")
        case ".tsv":
            yield from _csv_rows(file, "\t")
        case ".parquet":
            yield from _load("parquet", file).decode(False)
        case _:
            yield from _json_rows(file)


def tar_samples(file: Path) -> Iterator[tuple[str, Cells]]:
    """Yield the key and the fields of each sample of a webdataset tar.

    Neighbours that share their path up to the first dot of the file name are one sample. What stands in a
    `.json` becomes fields of its own; files of unknown endings stay bytes.
    """
    key = ""
    fields: Cells = {}
    with tarfile.open(file, "r|*") as archive:
        for member in archive:
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            stem, _, ending = base.partition(".")
            content = archive.extractfile(member) if member.isfile() and stem and ending else None
            if content is None:
                continue
            name = f"{folder}/{stem}" if folder else stem
            if name != key and fields:
                yield key, fields
                fields = {}
            key = name
            fields |= _field(ending.lower(), content.read())
    if fields:
        yield key, fields


def _csv_rows(file: Path, separator: str) -> Iterator[Cells]:
    # Every cell stays the text that it is: pandas would turn "007" into 7 and "NA" into nothing, and decide
    # so anew for each block of rows.
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines, delimiter=separator), [])
    if len(set(header)) < len(header):
        raise ValueError(f"two columns have one name: {', '.join(header)}")
    if header:
        names = [column or f"Unnamed: {place}" for place, column in enumerate(header)]  # as pandas calls them
        features = datasets.Features({name: datasets.Value("string") for name in names})
        yield from _load("csv", file, sep=separator, features=features, na_filter=False)


def _load(reader: str, file: Path, **options: Any) -> Any:
    return datasets.load_dataset(reader, data_files=[glob.escape(str(file))], split="train", streaming=True, **options)


def _json_rows(file: Path) -> Iterator[Cells]:
    with file.open(encoding="utf-8-sig") as lines:
        is_array = lines.read(1) == "["
        lines.seek(0)
        rows = enumerate(json.load(lines) if is_array else map(_json_line, lines, range(1, 1 << 62)), start=1)
        for number, row in rows:
            if isinstance(row, dict):
                yield row
            elif row is not None:
                raise ValueError(f"row {number} is a {type(row).__name__}; expected an object of columns")


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line) if line.strip() else None
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error


def _field(ending: str, content: bytes) -> Cells:
    if ending == "json":
        try:
            value = json.loads(content)
        except ValueError:  # one bad sidecar among a million is kept as it is, and ends nothing
            return {"json": content.decode("utf-8", "replace")}
        return value if isinstance(value, dict) else {"json": value}
    return {ending: content.decode("utf-8", "replace") if ending in _TEXT_FIELDS else content}
