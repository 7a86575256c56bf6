"""The store: pairs and the vectors of their images under one locked tower, in one Lance table.

The same table is the tuning cache, what a model is evaluated on, and the search index. It opens in everything
that reads Lance (LanceDB, DuckDB, Polars, Ray, Spark).

A row is known by its number: its place in the order of the ids, whatever order the rows were embedded in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lamplit.errors import StoreError, UsageError, kind_of, nearest_names
from lamplit.store import published_stores
from lamplit.store.store_parts import Part, split
from lamplit.store.table import table_writing
from lamplit.store.table.column_types import column_type
from lamplit.store.table.no_store import why_no_store, why_no_vectors
from lamplit.store.table.row_order import RowOrder
from lamplit.store.table.rows import COLUMNS, FIXED_COLUMNS, Row, number_contents, to_table
from lamplit.store.table.schema_changes import is_passing
from lamplit.store.table.store_metadata import KEY, StoreMetadata
from lamplit.store.table.table_opening import open_table, reading
from lamplit.store.table.text_cells import column_names, read_columns
from lamplit.store.unit_records import UnitRecords
from lamplit.store.where.conditions import parse_condition
from lamplit.towers.identity import TowerIdentity
from lamplit.unit_vectors import normalize

if TYPE_CHECKING:  # a search reads no tensor, and torch would take longer to import than all it does
    from torch import Tensor


class Store:
    """An open store: N images with vectors of width D.

    Attributes:
        path: where it is.

    Example:
        >>> store = lamplit.Store("stamps.lance")
        >>> store
        <Store stamps.lance: 701 × 1280 by demo:efficientnet-lite0>
        >>> store.vectors().shape
        torch.Size([701, 1280])
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store: its path or address (`s3://bucket/key`), or `hf:NAME` of one that is on the hub.

        Raises:
            StoreError: there is none, it is damaged, or a newer lamplit wrote it; or it cannot be fetched.
        """
        self.called = str(path)  # in messages
        path = published_stores.fetch(path)
        self.path = str(path)
        table = open_table(path)
        if table is None:
            raise StoreError(why_no_store(path))
        self._table = table
        self._metadata = StoreMetadata.read(table.schema, self.path)
        self._order = RowOrder(table)

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Tell whether there is a Lance table at `path`; `hf:NAME` is fetched."""
        return open_table(published_stores.fetch(path)) is not None

    @classmethod
    def create(
        cls,
        path: str | Path,
        tower: TowerIdentity,
        rows: Sequence[Row],
        *,
        backend: str,
        centered: bool = False,
        metadata_columns: Sequence[str] = (),
    ) -> Self:
        """Write a new store in one atomic commit: vectors that a `backend` made with a tower.

        The rows decide the types of the `metadata_columns`. From the vectors of a `centered` store their mean is
        subtracted when they are read, once `finish` has fixed it.

        Raises:
            StoreExistsError: there is one already.
            StoreError: the disk is full or cannot be written to.
        """
        types = {name: column_type(row.metadata.get(name) for row in rows) for name in metadata_columns}
        schema = StoreMetadata(tower, backend, centered).schema(types)
        return cls.write(path, schema, to_table(rows, schema).to_batches())

    @classmethod
    def write(cls, path: str | Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Self:
        """Write a new store of a `StoreMetadata.schema` in one atomic commit, in a stream; raises as `create` does."""
        table_writing.create_table(str(path), schema, batches)
        return cls(path)

    def __repr__(self) -> str:
        """Say in a line what it is."""
        return f"<Store {Path(self.path).name}: {len(self):,} × {self.tower.width} by {self.tower.spec}>"

    def __len__(self) -> int:
        """Count the images."""
        return int(self._table.count_rows())

    @property
    def tower(self) -> TowerIdentity:
        """The image tower that made the vectors."""
        return self._metadata.tower

    @property
    def backend(self) -> str:
        """What ran the tower when the store was made: torch, compile or onnx; imported if that is not known."""
        return self._metadata.backend

    @property
    def centered(self) -> bool:
        """Whether the mean of the vectors is to be subtracted from each vector that is read."""
        return self._metadata.centered

    @property
    def center(self) -> Tensor | None:
        """The (D,) mean of a centred store; None if it is not centred, or `finish` has not fixed it yet."""
        import torch

        return None if self._metadata.center is None else torch.tensor(self._metadata.center)

    @property
    def metadata_columns(self) -> list[str]:
        """Names of the columns that the pairs brought along."""
        return [name for name in self._table.schema.names if name not in COLUMNS and not is_passing(name)]

    @property
    def column_types(self) -> dict[str, pa.DataType]:
        """Types of the metadata columns."""
        return {name: self._table.schema.field(name).type for name in self.metadata_columns}

    @property
    def order(self) -> NDArray[np.int64]:
        """(N,) position in the table of each row."""
        return self._order.positions

    @property
    def row_at(self) -> NDArray[np.int32]:
        """(N,) row at each position in the table."""
        return self._order.by_position()

    @cached_property
    def version_digest(self) -> str:
        """Digest of the table's current fragments: any change to the rows changes it."""
        return Part.of(self.fragments()).digest

    @cached_property
    def parts(self) -> list[Part]:
        """The parts that files are derived from; a store of less than a million images is one."""
        return split(self.fragments())

    # Writing

    def replace(self, rows: Sequence[Row]) -> None:
        """Replace rows by id, in one atomic commit.

        A row without a vector keeps the one that is stored, and columns that no row names stay as they are.
        """
        if rows:
            table_writing.replace_rows(self._table, rows)
            self._refresh()

    def append_batches(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Add rows of the table's schema in one atomic commit. Hold `store_lock`, so that nobody adds the same ids."""
        table_writing.append_batches(self._table, batches)
        self._refresh()

    def append(self, rows: Sequence[Row]) -> int:
        """Add the rows whose ids are new, in one atomic commit; return how many that are."""
        if not rows:
            return 0
        added = table_writing.insert_rows(self._table, rows)
        self._refresh()
        return added

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows by id, in atomic commits of some thousands; unknown ids are ignored.

        Raises:
            StoreError: another process deletes or cleans up for more than a minute; the message names it.
        """
        table_writing.delete_rows(self._table, ids)
        self._refresh()

    def prepare_to_write(self) -> list[str]:
        """Make an older table, or one that other software changed, one to write to; return notes on what that took."""
        notes = table_writing.prepare_table(self._table)
        self._refresh()
        return notes

    def finish(self) -> None:
        """Fix the centre of a centred store once its first images are in, merge small fragments, give back space."""
        self._refresh()
        if self.centered and self._metadata.center is None:
            self._metadata = replace(self._metadata, center=self.vectors().mean(0).tolist())
            with table_writing.explained(self.path):
                self._table.update_schema_metadata({KEY: self._metadata.to_json()})
        table_writing.tidy(self._table, merges=not UnitRecords(self.path).staged())
        self._refresh()

    def build_index(self, partitions: int) -> None:
        """Build Lance's IVF index of the vectors anew; rows that are added later are searched without it."""
        how = {"metric": "cosine", "num_partitions": partitions, "replace": True}
        self._table = self._table.create_index("vector", "IVF_FLAT", **how)

    def add_columns(self, types: Mapping[str, pa.DataType]) -> pa.Schema:
        """Add the metadata columns of these types that are not there, empty; return the schema of all columns."""
        if new := [pa.field(name, kind) for name, kind in types.items() if name not in self._table.schema.names]:
            self._table.add_columns(pa.schema(new))
            self._refresh()
        return self._table.schema

    # Reading

    def column(self, name: str) -> list[Any]:
        """Return all values of one column, in the order of the ids.

        Raises:
            StoreError: there is no such column.
        """
        return list(self.arrow_column(name).to_pylist())

    def arrow_column(self, name: str) -> pa.Array:
        """Return what `column` does, with no Python object for each value."""
        self._require_column(name)
        return self._sorted(name)[name].combine_chunks()

    def batches(self, *columns: str, rows: int = 16384, fragments: Sequence[Any] | None = None) -> Iterator[Any]:
        """Yield some columns, as RecordBatches in the order of the table; `row_at` says which row each of them is."""
        for name in columns:
            self._require_column(name)
        how = {"batch_size": rows, "fragments": fragments, "io_buffer_size": 1 << 24, "batch_readahead": 2}
        with reading(self.path):  # by itself it would read up to 2 GiB ahead
            yield from self._table.scanner(columns=list(dict.fromkeys(columns)), **how).to_batches()

    def fragments(self) -> list[Any]:
        """Return Lance's fragments, in the order of the table."""
        return list(self._table.get_fragments())

    def contents(self) -> NDArray[np.int64]:
        """Return a number for the content of each image, (N,); images with the same bytes have the same number."""
        numbers: NDArray[np.int64] = number_contents(batch["hash"] for batch in self.batches("hash"))[self.order]
        return numbers

    def texts(self, column: str = "texts") -> list[list[str]]:
        """Return the texts of each image, from the pairs' own text column or metadata columns (commas between).

        Raises:
            StoreError: there is no such column, or it holds something else than text or lists of it.
        """
        names = column_names(column, self._table.schema.names)
        flat, counts = read_columns({name: self.arrow_column(name) for name in names}, self.called)
        ends = np.cumsum(counts).tolist()
        return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def vectors(self, center: Tensor | None = None) -> Tensor:
        """Return (N, D) float32 unit vectors; a (D,) `center` is subtracted first, and the rest made unit again."""
        import torch
        from torch.nn import functional as F

        halves = self._halves(self._sorted("vector")["vector"].combine_chunks())
        vectors = F.normalize(torch.from_numpy(halves.astype(np.float32)), dim=-1)
        return vectors if center is None else F.normalize(vectors - center.detach().to(vectors), dim=-1)

    def blocks(self, part: Part | None = None) -> Iterator[NDArray[np.float32]]:
        """Yield (n, D) float32 unit vectors in the order of the table; `order` says which row each of them is."""
        yield from map(normalize, self.half_blocks(part))

    def half_blocks(self, part: Part | None = None) -> Iterator[NDArray[np.float16]]:
        """Yield (n, D) vectors in the order of the table or of a part, to the bit as they are stored."""
        for batch in self.batches("vector", fragments=None if part is None else part.fragments):
            yield self._halves(batch["vector"])

    def rows(self, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return everything but the vectors of some rows, or of all."""
        names = [*FIXED_COLUMNS, *self.metadata_columns]
        table = self._sorted(*names) if rows is None else self.take(rows, names)
        return list(table.to_pylist())

    def take(self, rows: Sequence[int] | NDArray[Any], columns: Sequence[str] | None = None) -> pa.Table:
        """Return some rows as they are stored, with all columns or some."""
        return self._order.take(rows, columns or self._table.schema.names)

    def take_at(self, places: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return some columns of the rows at some positions in the table."""
        with reading(self.path):
            return self._table.take(places.tolist(), columns=list(columns))

    def vectors_at(self, rows: Sequence[int]) -> Tensor:
        """Return (K, D) float16 vectors of some rows, to the bit as they are stored."""
        import torch

        return torch.from_numpy(self._halves(self.take(rows, ["vector"])["vector"].combine_chunks()).copy())

    def vectors_of_contents(self, hashes: Sequence[str]) -> dict[str, Tensor]:
        """Return the (D,) float16 vectors of images with these contents, by hash; unknown ones are left out."""
        import torch

        listed = ", ".join(f"'{content_hash}'" for content_hash in dict.fromkeys(hashes))
        found = self._table.to_table(columns=["hash", "vector"], filter=f"hash IN ({listed})")
        vectors = torch.from_numpy(self._halves(found["vector"].combine_chunks()).copy())
        return dict(zip(found["hash"].to_pylist(), vectors, strict=True))

    def where(self, condition: str) -> NDArray[np.bool_]:
        """Return for each row, (N,), whether a condition on its columns holds.

        Args:
            condition: comparisons of columns with values, such as `year > 2019 and kind in ('bird', 'fish')`;
                `'a hat' in texts` asks whether a list has a value.

        Raises:
            UsageError: the condition cannot be read, or compares what cannot be compared; the message says what can.
        """
        holds = np.zeros(len(self), bool)
        holds[self._order.matching(parse_condition(condition, self._table.schema), condition)] = True
        return holds

    def near(self, vector: NDArray[np.float32], k: int, probes: int, condition: str | None = None) -> NDArray[np.int64]:
        """Return about the k rows nearest to a vector by Lance's index, ascending; all rows if there is no index.

        Args:
            vector: (D,) of unit length.
            k: how many rows.
            probes: how many of the index's partitions are looked at.
            condition: that the rows must meet, as in `where`.
        """
        condition = None if condition is None else parse_condition(condition, self._table.schema)
        nearest = {"column": "vector", "q": vector.astype(np.float16), "k": k, "nprobes": probes}
        found = self._table.to_table(
            columns=["_distance"], with_row_id=True, nearest=nearest, filter=condition, prefilter=condition is not None
        )
        return np.sort(self._order.from_lance(found["_rowid"].to_numpy().astype(np.int64)))

    def use_order(self, order: NDArray[np.int64]) -> None:
        """Take `order` from a file that was kept for this `version_digest`, to save the sorting of the ids.

        Raises:
            ValueError: it cannot be the order of this store's rows.
        """
        if order.shape != (len(self),):
            raise ValueError(f"the order of {len(self)} rows has shape {order.shape}")
        self._order = RowOrder(self._table, order)

    def require_tower(self, tower: TowerIdentity) -> None:
        """Raise if the vectors are those of another tower.

        Raises:
            StoreError: naming both towers and the way out.
        """
        self._metadata.require_tower(tower, self.path)

    def _refresh(self) -> None:
        self._table.checkout_latest()
        self._metadata = StoreMetadata.read(self._table.schema, self.path)
        self._order = RowOrder(self._table)
        vars(self).pop("version_digest", None)
        vars(self).pop("parts", None)

    def _require_column(self, name: str) -> None:
        if name not in self._table.schema.names:
            known = nearest_names(name, [*FIXED_COLUMNS, *self.metadata_columns])
            raise StoreError(f"{self.called} has no column {name!r}; it has: {known}")

    def _halves(self, column: Any) -> NDArray[np.float16]:
        if column.null_count:
            raise StoreError(why_no_vectors(self.called))
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float16).reshape(-1, self.tower.width)

    def _sorted(self, *columns: str) -> pa.Table:
        with reading(self.path):
            return self._table.to_table(columns=list(dict.fromkeys(["id", *columns]))).sort_by("id")


def as_store(store: str | Path | Store) -> Store:
    """Open the store at a path; return an open one as it is.

    Raises:
        StoreError: there is no store at the path, it is damaged, or a newer lamplit wrote it.
        UsageError: it is neither a path nor a store.
    """
    if isinstance(store, Store):
        return store
    if not isinstance(store, str | Path):
        raise UsageError(f"the store is {kind_of(store)}; expected its path, or an open lamplit.Store")
    return Store(store)
