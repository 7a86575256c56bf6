"""Rows of tables, as they stand in their files.

Every format is read in small pieces by the standard library and pyarrow. Hugging Face `datasets` was measured losing
rows: its JSON reader fails if a column is null for the first 10 MB, and parses captions that look like dates.
"""

from __future__ import annotations

import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, repeat
from pathlib import Path, PurePath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from lamplit.data.json_text import parse_json
from lamplit.data.skipped import BadRows
from lamplit.data.tables.annotations import read_annotations
from lamplit.data.tables.columns import Cells
from lamplit.data.tables.delimited import DelimitedFile, require_distinct
from lamplit.data.tables.encodings import Encoding, find_encoding, open_text
from lamplit.errors import kind_of
from lamplit.locations.addresses import is_remote

# What a source raises that is damaged, or that may not be read.
READ_ERRORS = (OSError, ValueError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
_PACKED = ".gz"  # a table of text may end in it, too
_MAX_BATCH_BYTES = 2**24  # of the rows of a Parquet file that are in memory at once
_MAX_BATCH_ROWS = 4096
_NUM_NAMED_ROWS = 100  # of JSON, whose rows may lack a column each
_ARROW_ROWS = 64  # these files are mapped, and may hold images
_BUFFER_BYTES = 2**20  # of each column; without a buffer pyarrow reads a whole row group
_OBJECT_BUFFER_BYTES = 2**22  # in object storage, where every piece is a request


class TableFile(Protocol):
    """One file of a table; every method reads it anew, in small pieces. Images stay encoded."""

    @property
    def file(self) -> Path:
        """Where it is."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of it, in plain sentences."""

    def names(self) -> list[str]:
        """List the columns, of JSON those that the first rows have."""

    def rows(self, start: int = 0) -> Iterator[Cells]:
        """Yield the rows from `start` on; a ValueError says that the file is damaged, or two columns have one name."""

    def column(self, name: str) -> Iterator[Any]:
        """Yield the cells of one column, None where a row lacks it."""

    def count(self) -> int:
        """Count the rows, without reading their images."""


def suffix_of(file: PurePath) -> str:
    """Return the suffix that names the format of a table or an archive: `.csv` of `a.CSV` and of `a.csv.gz`.

    Example:
        >>> suffix_of(Path("a.csv.gz"))
        '.csv'
    """
    suffix = file.suffix.lower()
    inner = file.with_suffix("").suffix.lower()
    return inner if suffix == _PACKED and inner in (".csv", ".tsv", ".jsonl", ".json") else suffix


def open_table(
    file: Path, *, image_column: str | None = None, split: str | None = None, bad: BadRows | None = None
) -> TableFile:
    """Open a table in the format that its suffix names.

    Args:
        file: where it is.
        image_column: name of a column that it has, which helps to see what separates its cells.
        split: of annotations that name one for each image.
        bad: where to list the rows of a file of text that cannot be read; the others are.

    Raises:
        ValueError: it holds no rows of a known kind.
    """
    match suffix_of(file):
        case ".csv" | ".tsv" as suffix:
            return DelimitedFile.open(file, suffix, image_column, bad)
        case ".parquet":
            return _Parquet(file)
        case ".arrow":
            return _Arrow(file)
    encoding, bad = find_encoding(file), bad or BadRows(file)
    if suffix_of(file) == ".json" and (found := read_annotations(file, encoding, split, bad)):
        return _Listed(file, found.notes, found.rows)
    return _JsonLines(file, encoding, bad)


def open_parquet(file: Path, footer: parquet.FileMetaData | None = None) -> parquet.ParquetFile:
    """Open a Parquet file to be read in small pieces; by itself pyarrow would keep all bytes that it has read.

    Its footer is read unless it is given.
    """
    if is_remote(file):
        return parquet.ParquetFile(file.open("rb"), metadata=footer, buffer_size=_OBJECT_BUFFER_BYTES, pre_buffer=False)
    return parquet.ParquetFile(file, metadata=footer, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def record_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an open file of Arrow: a stream of them, as `datasets` writes it, or a file."""
    try:
        batches = iter(pa.ipc.open_stream(opened))
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(opened)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
    yield from batches


def to_rows(batch: pa.RecordBatch) -> list[Cells]:
    """Convert a batch to one dictionary a row, with times at microseconds: Python has nothing finer."""
    schema = pa.schema([field.with_type(_without_nanoseconds(field.type)) for field in batch.schema])
    if schema.types != batch.schema.types:
        batch = pa.Table.from_batches([batch]).cast(schema, safe=False).combine_chunks().to_batches()[0]
    rows: list[Cells] = batch.to_pylist()
    return rows


@dataclass(frozen=True)
class _Parquet:
    file: Path
    notes: tuple[str, ...] = ()

    def names(self) -> list[str]:
        with open_parquet(self.file) as opened:
            return list(opened.schema_arrow.names)

    def rows(self, start: int = 0) -> Iterator[Cells]:
        with open_parquet(self.file) as opened:
            require_distinct(opened.schema_arrow.names)
            groups = [opened.metadata.row_group(index) for index in range(opened.num_row_groups)]
            row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
            batch_rows = min(_MAX_BATCH_ROWS, max(1, _MAX_BATCH_BYTES // max(1, row_bytes)))
            ends = list(accumulate(group.num_rows for group in groups))
            skipped = bisect_right(ends, start)  # groups that end before it are not read
            start -= ends[skipped - 1] if skipped else 0
            for batch in opened.iter_batches(batch_rows, row_groups=range(skipped, len(groups))):
                yield from to_rows(batch.slice(start))
                start = max(0, start - batch.num_rows)

    def column(self, name: str) -> Iterator[Any]:
        with open_parquet(self.file) as opened:
            if name not in opened.schema_arrow.names:
                yield from repeat(None, opened.metadata.num_rows)
                return
            # Of an image as `datasets` writes it, the path alone.
            child = ".path" if pa.types.is_struct(opened.schema_arrow.field(name).type) else ""
            for batch in opened.iter_batches(_MAX_BATCH_ROWS, columns=[f"{name}{child}"]):
                cells = batch.column(0)
                yield from (pc.struct_field(cells, "path") if child else cells).to_pylist()

    def count(self) -> int:
        with open_parquet(self.file) as opened:
            return int(opened.metadata.num_rows)


@dataclass(frozen=True)
class _Arrow:
    """What `datasets` keeps on disk: a stream of Arrow's batches, or a file of them."""

    file: Path
    notes: tuple[str, ...] = ()

    def names(self) -> list[str]:
        return next((list(batch.schema.names) for batch in self._batches()), [])

    def rows(self, start: int = 0) -> Iterator[Cells]:
        for batch in self._batches():
            require_distinct(batch.schema.names)
            yield from to_rows(batch.slice(start))
            start = max(0, start - batch.num_rows)

    def column(self, name: str) -> Iterator[Any]:
        for batch in self._batches():
            if name in batch.schema.names:
                yield from batch.column(name).to_pylist()
            else:
                yield from repeat(None, batch.num_rows)

    def count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self.file.open("rb") if is_remote(self.file) else pa.memory_map(str(self.file)) as mapped:
            for batch in record_batches(mapped):
                for start in range(0, batch.num_rows, _ARROW_ROWS):
                    yield batch.slice(start, _ARROW_ROWS)


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


@dataclass(frozen=True)
class _Listed:
    """Rows that were read with the file they are in."""

    file: Path
    notes: tuple[str, ...]
    read: Callable[[], list[Cells]]

    def names(self) -> list[str]:
        return _names_of(self.rows())

    def rows(self, start: int = 0) -> Iterator[Cells]:
        yield from self.read()[start:]

    def column(self, name: str) -> Iterator[Any]:
        return (row.get(name) for row in self.read())

    def count(self) -> int:
        return len(self.read())


@dataclass(frozen=True)
class _JsonLines:
    file: Path
    encoding: Encoding
    bad: BadRows

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.encoding.note,) if self.encoding.note else ()

    def names(self) -> list[str]:
        return _names_of(self.rows())

    def rows(self, start: int = 0) -> Iterator[Cells]:
        return islice(self._rows(), start, None)

    def _rows(self) -> Iterator[Cells]:
        with open_text(self.file, self.encoding) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = parse_json(line) if line.strip() else None
                except ValueError as error:
                    self.bad.add(number, f"this is not JSON ({error})")
                    continue
                if isinstance(row, dict):
                    yield row
                elif row is not None:
                    self.bad.add(number, f"this is {kind_of(row)}; expected an object of columns")

    def column(self, name: str) -> Iterator[Any]:
        return (row.get(name) for row in self.rows())

    def count(self) -> int:
        return sum(1 for _ in self.rows())


def _names_of(rows: Iterator[Cells]) -> list[str]:
    return list(dict.fromkeys(name for row in islice(rows, _NUM_NAMED_ROWS) for name in row))
