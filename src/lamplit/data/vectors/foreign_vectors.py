"""Vectors of images that other software made: clip-retrieval's folders, `.npy` files, columns of Parquet and of Lance.

They are read in blocks, so that memory does not grow with their number. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lamplit.data.pairs import Pair, Pairs, unreadable
from lamplit.data.places.image_files import is_lance
from lamplit.data.sources import read_pairs
from lamplit.data.tables.columns import ColumnNames
from lamplit.data.tables.readers import READ_ERRORS
from lamplit.data.valid_text import valid_id, valid_text
from lamplit.data.vectors.foreign_tables import (
    BLOCK_ROWS,
    Described,
    ForeignTable,
    LanceTable,
    ParquetTable,
    find_columns,
    find_vector_column,
    to_array,
    widths,
)
from lamplit.errors import PairsError, UsageError
from lamplit.locations.paths import path_of, require_local

# What numpy raises on a file that is not a .npy, or a damaged one; its header is Python text.
_NPY_ERRORS = (OSError, ValueError, OverflowError, tokenize.TokenError)
_END = object()  # comes after the last row of a table

# (B, D) floats as in the file, NaN for missing ones; why rows have no vector, by their place; what is known of each
Block = tuple[NDArray[Any], dict[int, str], Described]


@dataclass(frozen=True)
class ForeignVectors:
    """The vectors of one source; iterating again reads them again, in the same order."""

    source: str
    count: int | None  # None if it cannot be known without reading everything
    width: int
    types: dict[str, pa.DataType | None]  # of the metadata columns that are known before reading
    read: Callable[[], Iterator[Block]] = field(repr=False, compare=False)
    notes: list[str] = field(default_factory=list, compare=False)  # what to know about the table beside them

    def __iter__(self) -> Iterator[Block]:
        try:
            yield from self.read()
        except READ_ERRORS as error:
            raise unreadable(self.source, error) from error


def read_vectors(
    source: str | Path,
    *,
    pairs: str | Path | None = None,
    vector_column: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> ForeignVectors:
    """Open vectors with what is known about their images, reading headers only.

    Args:
        source: clip-retrieval's folder (`img_emb/img_emb_0.npy` and so on, with `metadata/metadata_0.parquet`), a
            `.npy` file of shape (N, D), a Parquet file or a folder of them with a column of vectors, or a table of
            Lance or LanceDB with one.
        pairs: for a `.npy`: what `read_pairs` reads, or a table of texts alone, in the order of the vectors.
        vector_column: of Parquet or Lance; by default found by its name, or as the only one.
        image_column: column with the images' paths; by default found by its name, and may be missing.
        text_column: column (or columns, with commas between) with the texts; by default found by its name.

    Raises:
        PairsError: there are no vectors, they cannot be read, or do not match their metadata.
        UsageError: a named column does not exist, or an option is not for this kind of source.
    """
    name, path = str(source), path_of(os.path.expanduser(source))
    wanted = ColumnNames(image_column, text_column, need_images=False)
    is_parts, is_array = (path / "img_emb").is_dir(), path.is_file() and path.suffix.lower() == ".npy"
    if pairs is not None and not is_array:
        raise UsageError(f"{name} brings its own texts or has none; --pairs is for a .npy file")
    if vector_column is not None and (is_parts or is_array):
        raise UsageError(f"{name} has no columns of vectors; --vector-column is for Parquet and Lance")
    if is_parts or is_array:
        require_local(name, "an array of vectors")
    try:
        if is_parts:
            return _open_parts(name, path, wanted)
        if is_array:
            return _open_array(name, path, pairs, wanted)
        if is_lance(path):
            return _open_tables(name, [LanceTable.open(path)], vector_column, wanted)
        files = sorted(path.glob("*.parquet"), key=_natural) if path.is_dir() else [path]
        if files and all(file.is_file() and file.suffix.lower() == ".parquet" for file in files):
            return _open_tables(name, list(map(ParquetTable, files)), vector_column, wanted)
    except READ_ERRORS as error:
        raise unreadable(name, error) from error
    if tables := sorted(str(table) for table in path.glob("*.lance") if is_lance(table)):
        raise PairsError(f"{name} is a folder of Lance tables; name one of them: {', '.join(tables)}")
    raise PairsError(
        f"{name} holds no vectors; expected a folder with img_emb/img_emb_0.npy and metadata/metadata_0.parquet as "
        "clip-retrieval writes it, a .npy file, or Parquet or a table of Lance with a column of vectors"
    )


# clip-retrieval's folders and single arrays


def _open_parts(name: str, folder: Path, wanted: ColumnNames) -> ForeignVectors:
    arrays, tables = _numbered(folder / "img_emb", "npy"), _numbered(folder / "metadata", "parquet")
    if alone := sorted(arrays.keys() ^ tables.keys()):
        there, missing = ("img_emb", "metadata") if alone[0] in arrays else ("metadata", "img_emb")
        raise PairsError(f"{name} is not whole: part {alone[0]} is in {there}/ but not in {missing}/")
    if not arrays:
        raise PairsError(f"{name} holds no img_emb/img_emb_0.npy with metadata/metadata_0.parquet")
    parts = [(arrays[number], ParquetTable(tables[number])) for number in sorted(arrays)]
    shapes = [_shape(array) for array, _ in parts]
    width = shapes[0][1]
    for (array, table), (rows, its_width) in zip(parts, shapes, strict=True):
        if rows != (described := table.count()):
            raise PairsError(f"{array} has {rows} vectors, but {table.path} has {described} rows")
        if its_width != width:
            raise PairsError(f"{array} has vectors {its_width} wide, but those of {parts[0][0]} are {width} wide")
    columns = find_columns(name, [table for _, table in parts], wanted)

    def read() -> Iterator[Block]:
        for array, table in parts:
            start = 0
            for batch in columns.batches(table):
                yield _read_rows(array, start, start + len(batch)), {}, columns.describe(batch)
                start += len(batch)

    return ForeignVectors(name, sum(rows for rows, _ in shapes), width, columns.types, read)


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Return files such as `img_emb/img_emb_007.npy`, by their number."""
    found: dict[int, Path] = {}
    for file in sorted(folder.glob(f"*.{suffix}")):
        if match := re.fullmatch(rf"{folder.name}_(\d+)\.{suffix}", file.name):
            if (number := int(match[1])) in found:
                raise PairsError(f"{found[number]} and {file.name} have one number; remove one of them")
            found[number] = file
    return found


def _open_array(name: str, file: Path, pairs: str | Path | None, wanted: ColumnNames) -> ForeignVectors:
    count, width = _shape(file)
    if pairs is None:
        if wanted.image or wanted.text:
            raise UsageError(f"{name} has no columns; name the table that has them with --pairs FILE")
        described = None
    else:
        described = read_pairs(pairs, image_column=wanted.image, text_column=wanted.text, need_images=False)
        if described.count not in (None, count):
            raise _other_number(name, count, f"{pairs} has {described.count} rows", described)

    def read() -> Iterator[Block]:
        rows = iter(repeat(None, count) if described is None else described)
        for start in range(0, count, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, count)
            block = list(islice(rows, stop - start))
            if len(block) < stop - start:
                raise _other_number(name, count, f"{pairs} has {start + len(block)} rows", described)
            yield _read_rows(file, start, stop), {}, describe_pairs(block)
        if next(rows, _END) is not _END:
            raise PairsError(f"{name} has {count} vectors, but {pairs} has more rows")

    return ForeignVectors(name, count, width, {}, read, described.notes if described else [])


def _other_number(name: str, count: int, found: str, described: Pairs | None) -> PairsError:
    """Make the error of a table with more or fewer rows than vectors, some of which may be unreadable."""
    bad = described.problems[0] if described and described.problems else None
    return PairsError(f"{name} has {count} vectors, but {found}{f'; {bad.id}: {bad.reason}' if bad else ''}")


def describe_pairs(pairs: Sequence[Pair | None]) -> Described:
    """Make columns of a block of pairs; None for a vector of which nothing is known."""
    names = dict.fromkeys(name for pair in pairs if pair for name in pair.metadata)
    return Described(
        pa.array([valid_id(_path(pair)) for pair in pairs], pa.string()),
        pa.array([[valid_text(text) for text in pair.texts] if pair else [] for pair in pairs], pa.list_(pa.string())),
        {name: [pair.metadata.get(name) if pair else None for pair in pairs] for name in names},
    )


def _path(pair: Pair | None) -> str:
    if pair is None:
        return ""
    if isinstance(pair.image, bytes):
        return pair.id if pair.image else ""
    return str(pair.image)


def _shape(file: Path) -> tuple[int, int]:
    array = _map_array(file)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise PairsError(
            f"{file} has shape {array.shape} and type {array.dtype}; expected (number, width) of float16, 32 or 64"
        )
    rows, width = array.shape
    return rows, width


def _read_rows(file: Path, start: int, stop: int) -> NDArray[Any]:
    # Mapped again for each block: all pages of one long map would count as this process's memory.
    return np.array(_map_array(file)[start:stop])


def _map_array(file: Path) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(file, mode="r")  # which never unpickles
    except _NPY_ERRORS as error:
        raise unreadable(str(file), error) from error


# tables with a column of vectors


def _open_tables(
    name: str, tables: Sequence[ForeignTable], vector_column: str | None, wanted: ColumnNames
) -> ForeignVectors:
    vector = find_vector_column(name, tables[0].schema, vector_column)
    columns = find_columns(name, tables, wanted, vector)
    width = next((width for table in tables for width in widths(table, vector)), None)
    if width is None:
        raise PairsError(f"{name} holds no vectors: its column {vector!r} is empty")

    def read() -> Iterator[Block]:
        for table in tables:
            for batch in columns.batches(table):
                yield *to_array(batch[vector], width), columns.describe(batch)

    return ForeignVectors(name, sum(table.count() for table in tables), width, columns.types, read)


def _natural(file: Path) -> list[int | str]:
    """Sort part 10 after part 2."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]
