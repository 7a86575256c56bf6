"""The store: pairs and the vectors of their images under one locked tower, in one Lance table.

The same table is the tuning cache, what a model is evaluated on, and the search index. It opens in everything
that reads Lance (LanceDB, DuckDB, Polars, Ray, Spark).

A row is known by its number: its place in the order of the ids, whatever order the rows were embedded in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lamplit.errors import LamplitError, StoreError, UsageError, kind_of, nearest_names
from lamplit.store.conditions import parse_condition
from lamplit.store.no_store import why_no_store
from lamplit.store.row_order import RowOrder
from lamplit.store.rows import COLUMNS, FIXED_COLUMNS, Row, column_type, fitted, to_table
from lamplit.store.store_metadata import KEY, StoreMetadata
from lamplit.towers.identity import TowerIdentity
from lamplit.unit_vectors import normalize

if TYPE_CHECKING:  # a search reads no tensor, and torch would take longer to import than all it does
    from torch import Tensor

_DELETED_TOGETHER = 4096  # ids in one condition


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
        """Open a store.

        Raises:
            StoreError: there is none, it is damaged, or a newer lamplit wrote it.
        """
        self.path = str(path)
        table = _open_table(path)
        if table is None:
            raise StoreError(why_no_store(path))
        self._table = table
        self._metadata = StoreMetadata.read(table.schema, self.path)
        self._order = RowOrder(table)

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Tell whether there is a Lance table at `path`."""
        return _open_table(path) is not None

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
        metadata_types: Mapping[str, pa.DataType] | None = None,
        more: Iterable[Sequence[Row]] = (),
    ) -> Self:
        """Write a new store in one atomic commit.

        Args:
            path: where to.
            tower: what made the vectors.
            rows: the first rows. They decide the types of the metadata columns that are not in `metadata_types`.
            backend: what ran the tower.
            centered: subtract the mean of the vectors from each that is read, once `finish` has fixed it.
            metadata_columns: names of the columns beside ids, paths, hashes, texts and vectors.
            metadata_types: types of some of these.
            more: more blocks of rows, for the same commit.
        """
        types = dict(metadata_types or {})
        for name in metadata_columns:
            types.setdefault(name, column_type([row.metadata.get(name) for row in rows]))
        columns = FIXED_COLUMNS | {name: types[name] for name in metadata_columns}
        columns["vector"] = pa.list_(pa.float16(), tower.width)
        metadata = StoreMetadata(tower, backend, centered)
        _write_table(str(path), pa.schema(columns, {KEY: metadata.to_json()}), chain([rows], more))
        store = cls(path)
        # Removes what a run that was killed before its commit left; the new table refers to none of it.
        store._table.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
        return store

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
        return [name for name in self._table.schema.names if name not in COLUMNS]

    @property
    def order(self) -> NDArray[np.int64]:
        """(N,) position in the table of each row."""
        return self._order.positions

    @property
    def version_digest(self) -> str:
        """Digest of the table's current fragments: any change to the rows changes it."""
        fragments = [
            (fragment.fragment_id, [file.path for file in fragment.data_files()], str(fragment.deletion_file()))
            for fragment in self._table.get_fragments()
        ]
        return hashlib.blake2b(repr(sorted(fragments)).encode(), digest_size=8).hexdigest()

    # Writing

    def replace(self, rows: Sequence[Row]) -> None:
        """Replace rows by id, in one atomic commit; a row without a vector keeps the one that is stored."""
        for kept in (True, False):
            some = [row for row in rows if (row.vector is None) == kept]
            if some:
                schema = self._table.schema
                columns = [name for name in schema.names if not (kept and name == "vector")]
                table = to_table(some, schema, columns)
                self._table.merge_insert("id").when_matched_update_all().execute(table)
        self._refresh()

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows whose ids are new, in one atomic commit."""
        if rows:
            lance.write_dataset(to_table(rows, self._table.schema), self.path, mode="append")
            self._refresh()

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows by id, in atomic commits of some thousands; unknown ids are ignored."""
        for start in range(0, len(ids), _DELETED_TOGETHER):
            listed = ", ".join("'" + name.replace("'", "''") + "'" for name in ids[start : start + _DELETED_TOGETHER])
            self._table.delete(f"id IN ({listed})")
        self._refresh()

    def finish(self) -> None:
        """Fix the centre of a centred store once its first images are in, and merge small fragments."""
        if self.centered and self._metadata.center is None:
            self._metadata = replace(self._metadata, center=self.vectors().mean(0).tolist())
            self._table.update_schema_metadata({KEY: self._metadata.to_json()})
        self._table.optimize.compact_files()
        self._refresh()

    def build_index(self, partitions: int) -> None:
        """Build Lance's IVF index of the vectors anew; rows that are added later are searched without it."""
        self._table = self._table.create_index(
            "vector", index_type="IVF_FLAT", metric="cosine", num_partitions=partitions, replace=True
        )

    # Reading

    def column(self, name: str) -> list[Any]:
        """Return all values of one column, in the order of the ids.

        Raises:
            StoreError: there is no such column.
        """
        if name not in self._table.schema.names:
            raise StoreError(f"{self.path} has no column {name!r}; it has: {self._listed_columns(name)}")
        values: list[Any] = self._sorted(name)[name].to_pylist()
        return values

    def texts(self, column: str = "texts") -> list[list[str]]:
        """Return the texts of each image, from the pairs' own text column or a metadata column of text.

        Raises:
            StoreError: there is no such column, or it holds something else than text or lists of it.
        """
        texts = []
        for value in self.column(column):
            cells = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(cell, str) for cell in cells):
                raise StoreError(f"column {column!r} of {self.path} holds no text: {value!r}")
            texts.append([cell.strip() for cell in cells if cell.strip()])
        return texts

    def vectors(self, center: Tensor | None = None) -> Tensor:
        """Return (N, D) float32 unit vectors; a (D,) `center` is subtracted first, and the rest made unit again."""
        import torch
        from torch.nn import functional as F

        halves = self._halves(self._sorted("vector")["vector"].combine_chunks())
        vectors = F.normalize(torch.from_numpy(halves.astype(np.float32)), dim=-1)
        return vectors if center is None else F.normalize(vectors - center.detach().to(vectors), dim=-1)

    def blocks(self, rows: int = 16384) -> Iterator[NDArray[np.float32]]:
        """Yield (n, D) float32 unit vectors in the order of the table; `order` says which row each of them is."""
        for batch in self._table.to_batches(columns=["vector"], batch_size=rows):
            yield normalize(self._halves(batch["vector"]))

    def rows(self, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return everything but the vectors of some rows, or of all."""
        names = [name for name in self._table.schema.names if name != "vector"]
        table = self._sorted(*names) if rows is None else self.take(rows, names)
        found: list[dict[str, Any]] = table.to_pylist()
        return found

    def take(self, rows: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Return some rows as they are stored, with all columns or some."""
        return self._order.take(rows, columns or self._table.schema.names)

    def vectors_at(self, rows: Sequence[int]) -> Tensor:
        """Return (K, D) float16 vectors of some rows, to the bit as they are stored."""
        import torch

        return torch.from_numpy(self._halves(self.take(rows, ["vector"])["vector"].combine_chunks()).copy())

    def as_stored(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the columns of this store keep of a row's metadata."""
        schema = self._table.schema
        return {name: fitted(metadata.get(name), schema.field(name).type) for name in self.metadata_columns}

    # Searching

    def where(self, condition: str) -> NDArray[np.bool_]:
        """Return for each row, (N,), whether a condition on its columns holds.

        Args:
            condition: comparisons of columns with values, such as `year > 2019 and kind in ('bird', 'fish')`;
                `'a hat' in texts` asks whether a list has a value.

        Raises:
            UsageError: the condition cannot be read, or compares what cannot be compared; the message says what can.
        """
        sql = parse_condition(condition, self._table.schema)
        try:
            rows = self._order.matching(sql)
        except (ValueError, OSError, RuntimeError) as error:  # a RuntimeError if Lance's planner breaks
            reason = re.split(r"\. Valid fields are|, \S+\.rs:\d", str(error).strip())[0]
            raise UsageError(f"the condition {condition!r} cannot be used ({reason})") from error
        holds = np.zeros(len(self), bool)
        holds[rows] = True
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
        if tower.fingerprint == self.tower.fingerprint:
            return
        way_out = "Embed the images again with: lamplit embed SOURCE"
        if tower.imported:
            way_out = "Import vectors of that tower, by that name, with: lamplit import SOURCE"
        raise StoreError(
            f"{self.path} was {'imported, made' if self.tower.imported else 'embedded'} by {self.tower.spec} "
            f"(fingerprint {self.tower.fingerprint}), not by {tower.spec} (fingerprint {tower.fingerprint}): "
            f"their vectors cannot be compared. {way_out} --image-tower {tower.spec} --out ANOTHER.lance"
        )

    def _refresh(self) -> None:
        self._table.checkout_latest()
        self._order = RowOrder(self._table)

    def _listed_columns(self, wanted: str = "") -> str:
        return nearest_names(wanted, (name for name in self._table.schema.names if name != "vector"))

    def _halves(self, column: Any) -> NDArray[np.float16]:
        halves: NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.tower.width)
        return halves

    def _sorted(self, *columns: str) -> pa.Table:
        names = list(dict.fromkeys(["id", *columns]))
        return self._table.to_table(columns=names).sort_by("id")


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


def _open_table(path: str | Path) -> Any:
    if not isinstance(path, str | Path) or Path(path).is_file():  # of a file, Lance would try for seconds
        return None
    try:
        return lance.dataset(str(path))
    except (ValueError, OSError):
        return None


def _write_table(path: str, schema: pa.Schema, blocks: Iterable[Sequence[Row]]) -> None:
    failures: list[LamplitError] = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for block in blocks:
                yield from to_table(block, schema).to_batches()
        except LamplitError as error:  # Lance raises an error of its own instead
            failures.append(error)
            raise

    try:
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), path, schema=schema)
    except OSError:
        if failures:
            raise failures[0] from None
        raise
