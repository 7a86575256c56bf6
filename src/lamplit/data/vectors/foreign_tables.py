"""Parquet files and Lance tables from any software: columns of vectors, and what is known about their images.

They are read as Arrow, in blocks: `datasets` would turn every vector into Python numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.data.tables.columns import ColumnNames, find_image_column, find_text_columns, metadata_cells
from lamplit.data.tables.readers import open_parquet, to_rows
from lamplit.data.tables.text_columns import path_texts, text_lists
from lamplit.errors import PairsError, UsageError
from lamplit.locations.paths import lance_options

BLOCK_ROWS = 4096
# Looked for in this order; else the only column that holds lists of floats is taken.
VECTOR_COLUMNS = (
    "vector", "vectors", "embedding", "embeddings", "image_embedding", "image_embeddings",
    "img_emb", "image_vector", "image_features", "features",
)  # fmt: skip
_WRITTEN_OUT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_temporal, pa.types.is_decimal)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


class ForeignTable(Protocol):
    """A table whose rows can be read again and again, in the same order."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns, without reading them."""

    def count(self) -> int:
        """Count the rows."""

    def batches(self, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        """Read some columns in blocks; for each, what to read of it: all, or one field of its structs."""


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file."""

    path: Path

    @property
    def schema(self) -> pa.Schema:
        """Its columns, from its footer."""
        with open_parquet(self.path) as opened:
            return opened.schema_arrow

    def count(self) -> int:
        """Count the rows, from its footer."""
        with open_parquet(self.path) as opened:
            return int(opened.metadata.num_rows)

    def batches(self, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        """Read some columns in blocks."""
        with open_parquet(self.path) as opened:
            yield from opened.iter_batches(BLOCK_ROWS, columns=list(columns.values()))


@dataclass(frozen=True)
class LanceTable:
    """A table of Lance or LanceDB, as it is when it is opened: what others write to it later is not read."""

    path: Path
    dataset: Any

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the table in a folder.

        Raises:
            OSError, ValueError: there is none, or it is damaged.
        """
        import lance  # whoever reads pairs or Parquet does without

        return cls(path, lance.dataset(str(path), storage_options=lance_options(path)))

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self.dataset.schema

    def count(self) -> int:
        """Count the rows that are not deleted."""
        return int(self.dataset.count_rows())

    def batches(self, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        """Read some columns in blocks."""
        names = {read: name for name, read in columns.items()}  # Lance calls a field `image.path`
        bounds = {"io_buffer_size": 1 << 24, "batch_readahead": 2}  # it would read up to 2 GiB ahead
        for batch in self.dataset.to_batches(columns=list(names), batch_size=BLOCK_ROWS, **bounds):
            yield batch.rename_columns([names[name] for name in batch.schema.names])


@dataclass(frozen=True)
class Described:
    """What a source says about the images of a block of vectors: B rows.

    Attributes:
        paths: (B,) text, as the source writes them; empty if it names none.
        texts: (B,) lists of text.
        metadata: (B,) cells by column: Arrow as the source has them, or a list of values that JSON can hold.
    """

    paths: pa.Array
    texts: pa.Array
    metadata: dict[str, pa.Array | list[Any]]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.paths)


@dataclass(frozen=True)
class Columns:
    """Which columns of some tables hold what."""

    image: str  # empty if there is none
    texts: tuple[str, ...]
    vector: str | None
    types: dict[str, pa.DataType | None]  # of the rest, which is metadata

    def batches(self, table: ForeignTable) -> Iterator[pa.RecordBatch]:
        """Read a table in blocks, without the bytes of images that may lie in it."""
        yield from table.batches({column.name: part for column in table.schema if (part := _readable(column))})

    def describe(self, batch: pa.RecordBatch) -> Described:
        """Return everything but the vector of each row."""
        others = [name for name in batch.schema.names if name != self.vector]
        batch.select(others).validate(full=True)  # text that is no UTF-8
        taken = (self.image, *self.texts)
        has_paths = self.image in others
        return Described(
            path_texts(batch[self.image]) if has_paths else pa.repeat(pa.scalar(""), len(batch)),
            text_lists({name: batch[name] for name in self.texts if name in others}, len(batch)),
            {name: batch[name] for name in others if name not in taken},
        )


def find_columns(name: str, tables: Sequence[ForeignTable], wanted: ColumnNames, vector: str | None = None) -> Columns:
    """Find what the columns of some tables hold, without reading them.

    Without a column of vectors they are clip-retrieval's metadata: `image_path`, and `caption` beside the `texts` that
    lamplit adds. With one, the columns are found as `read_pairs` finds them.

    Raises:
        PairsError: a table has two columns of one name, or no vectors.
        UsageError: a named column does not exist.
    """
    schemas = [table.schema for table in tables]
    for table, schema in zip(tables, schemas, strict=True):
        if twice := sorted(column for column, count in Counter(schema.names).items() if count > 1):
            raise PairsError(f"{table.path} has two columns named {twice[0]}")
        if vector is not None and (vector not in schema.names or not _holds_vectors(schema.field(vector).type)):
            raise PairsError(f"{table.path} has no vectors in column {vector!r}, but {tables[0].path} has")
    fields = [field for schema in schemas for field in schema if field.name != vector and _readable(field)]
    names = [dict.fromkeys(field.name for field in fields)]
    image = "image_path"
    texts: tuple[str, ...] = tuple(column for column in ("texts", "caption") if column in names[0])
    if vector is not None or wanted.image is not None:
        image = find_image_column(name, names, wanted.image, optional=True)
    if vector is not None or wanted.text is not None:
        texts = find_text_columns(name, names, wanted.text)
    kinds: dict[str, list[pa.DataType]] = {}
    for column in fields:
        if column.name not in (image, *texts):
            kinds.setdefault(column.name, []).append(column.type)
    return Columns(image, texts, vector, {column: _common_type(found) for column, found in kinds.items()})


def _readable(field: pa.Field) -> str | None:
    """Name what to read of a column: all of it, or only the path of an image of `datasets`; None for bytes."""
    kind = field.type
    if pa.types.is_struct(kind) and {child.name for child in kind} == {"bytes", "path"}:
        return f"{field.name}.path"
    is_bytes = any(is_kind(kind) for is_kind in _BYTES)
    return None if is_bytes else str(field.name)


def _common_type(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    """Find one type for a column that may have several in different tables; None if only its values can tell."""
    plain = [_plain_type(kind) for kind in kinds if not pa.types.is_null(kind)]
    if not plain:
        return pa.string()
    if None in plain:
        return None
    try:
        return pa.unify_schemas([pa.schema([("", kind)]) for kind in plain], promote_options="permissive").field(0).type
    except pa.ArrowException:  # numbers here and text there
        return pa.string()


def _plain_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of what `metadata_cells` makes of a column's values."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if any(is_kind(kind) for is_kind in _WRITTEN_OUT):
        return pa.string()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        value = _plain_type(kind.value_type)
        return None if value is None else pa.list_(value)
    if pa.types.is_struct(kind):
        inner = {child.name: _plain_type(child.type) for child in kind}
        return None if None in inner.values() else pa.struct(inner)
    return kind if pa.types.is_boolean(kind) or pa.types.is_integer(kind) else None


def plain_cells(cells: pa.Array) -> list[Any]:
    """Return cells of metadata as values that JSON can hold; None for bytes."""
    return [metadata_cells(row, ()).get("") for row in to_rows(pa.record_batch([cells], [""]))]


def find_vector_column(name: str, schema: pa.Schema, wanted: str | None) -> str:
    """Return the column of vectors: the one wanted, one with a known name, or the only one there is.

    Raises:
        PairsError: there is none, or more than one without a known name.
        UsageError: the wanted one does not exist, or holds something else.
    """
    found: list[str] = [column.name for column in schema if _holds_vectors(column.type)]
    if wanted is not None:
        if wanted in found:
            return wanted
        kind = f"is {schema.field(wanted).type}" if wanted in schema.names else "is not there"
        raise UsageError(f"column {wanted!r} of {name} {kind}; its columns of vectors: {', '.join(found) or 'none'}")
    named = [column for candidate in VECTOR_COLUMNS for column in found if column.casefold() == candidate]
    if named or len(found) == 1:
        return (named or found)[0]
    raise PairsError(
        f"{name} has {len(found) or 'no'} columns that may be the images' vectors: "
        f"{', '.join(found or schema.names)}; expected lists of floats, named with --vector-column NAME"
    )


def _holds_vectors(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def widths(table: ForeignTable, column: str) -> Iterator[int]:
    """Yield the width of every vector of a table; rows without one, or with an empty one, are left out."""
    for batch in table.batches({column: column}):
        yield from filter(None, pc.list_value_length(batch.column(0)).to_pylist())


def to_array(column: pa.Array, width: int) -> tuple[NDArray[Any], dict[int, str]]:
    """Return (B, width) floats, NaN where a vector has a gap or there is none; and why rows have none, by their place.

    A row has none if it is null or empty, or if its vector has another width.
    """
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    fits = lengths == width
    values = column.filter(pa.array(fits)).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    block = np.full((len(column), width), np.nan, values.dtype)
    block[fits] = values
    return block, {
        place: f"the vector is {lengths[place]} wide; the first is {width} wide" if lengths[place] else "no vector"
        for place in np.flatnonzero(~fits).tolist()
    }
