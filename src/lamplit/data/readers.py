"""Rows of tables, as they stand in their files.

Every format is read in small pieces by the standard library and pyarrow. Hugging Face `datasets` was measured losing
rows: its JSON reader fails if a column is null for the first 10 MB, and parses captions that look like dates.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from lamplit.data.columns import Cells
from lamplit.errors import kind_of

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_MAX_BATCH_BYTES = 2**24  # of the rows of a Parquet file that are in memory at once
_MAX_BATCH_ROWS = 4096
_BUFFER_BYTES = 2**20  # of each column; without a buffer pyarrow reads a whole row group


def table_rows(file: Path) -> Iterator[Cells]:
    """Yield the rows of a table in the format that its suffix names; images stay encoded.

    Raises:
        ValueError: the file is damaged, or its columns have no distinct names.
    """
    match file.suffix.lower():
        case ".csv" | ".tsv":
            yield from _csv_rows(file)
        case ".parquet":
            yield from _parquet_rows(file)
        case _:
            yield from _json_rows(file)


def count_rows(file: Path) -> int | None:
    """Count the rows of a table without reading its images; None if that is not possible."""
    match file.suffix.lower():
        case ".parquet":
            return int(parquet.read_metadata(file).num_rows)
        case ".jsonl":
            with file.open("rb") as lines:
                return sum(not line.isspace() for line in lines)
        case ".csv" | ".tsv":
            return max(0, sum(1 for _ in _csv_lines(file, errors="replace")) - 1)
    return None


def to_rows(batch: pa.RecordBatch) -> list[Cells]:
    """Convert a batch to one dictionary a row, with times at microseconds: Python has nothing finer."""
    schema = pa.schema([field.with_type(_without_nanoseconds(field.type)) for field in batch.schema])
    if schema.types != batch.schema.types:
        batch = pa.Table.from_batches([batch]).cast(schema, safe=False).combine_chunks().to_batches()[0]
    rows: list[Cells] = batch.to_pylist()
    return rows


def _csv_rows(file: Path) -> Iterator[Cells]:
    # Every cell stays the text that it is: "007" is not 7, and "NA" is not None.
    lines = _csv_lines(file)
    _, header = next(lines, (0, []))
    names = [column or f"Unnamed: {index}" for index, column in enumerate(header)]  # as pandas names them
    _require_distinct(names)
    for number, cells in lines:
        if len(cells) > len(names):
            raise ValueError(f"expected {len(names)} cells in line {number}, as in the header, and found {len(cells)}")
        yield dict.fromkeys(names, "") | dict(zip(names, cells, strict=False))


def _csv_lines(file: Path, *, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line on which a row ends, and its cells; blank lines are left out."""
    has_ended = False

    def until_end(lines: Iterable[str]) -> Iterator[str]:
        nonlocal has_ended
        yield from lines
        has_ended = True

    with file.open(encoding="utf-8-sig", newline="", errors=errors) as lines:
        reader = csv.reader(until_end(lines), delimiter=_SEPARATORS[file.suffix.lower()])
        start = 1
        try:
            for cells in reader:
                if has_ended:  # the reader wanted another line to complete this row
                    raise ValueError(f"a quote in the row that begins in line {start} is never closed")
                if cells and not (len(cells) == 1 and cells[0].isspace()):
                    yield reader.line_num, cells
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is not a row ({error})") from error


def _parquet_rows(file: Path) -> Iterator[Cells]:
    with parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES) as opened:
        _require_distinct(opened.schema_arrow.names)
        groups = [opened.metadata.row_group(index) for index in range(opened.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        batch_rows = min(_MAX_BATCH_ROWS, max(1, _MAX_BATCH_BYTES // max(1, row_bytes)))
        for batch in opened.iter_batches(batch_rows):
            yield from to_rows(batch)


def _require_distinct(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")


def _without_nanoseconds(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_nanoseconds(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_nanoseconds(field.type)) for field in kind])
    return kind


def _json_rows(file: Path) -> Iterator[Cells]:
    with file.open(encoding="utf-8-sig") as lines:
        is_array = lines.read(1) == "["
        lines.seek(0)
        rows = enumerate(json.load(lines) if is_array else map(_json_line, lines, range(1, 1 << 62)), start=1)
        for number, row in rows:
            if isinstance(row, dict):
                yield row
            elif row is not None:
                raise ValueError(f"row {number} is {kind_of(row)}; expected an object of columns")


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line) if line.strip() else None
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error
