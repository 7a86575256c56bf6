"""The store: pairs and the vectors of their images under one locked tower, in one Lance table.

The same table is the tuning cache, what a model is evaluated on, and the search index. It opens in anything
that reads Lance (LanceDB, DuckDB, Polars, Ray, Spark).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.errors import LamplitError, StoreError, UsageError
from lamplit.store.rows import COLUMNS, Row, column_type, fitted, to_table
from lamplit.towers.identity import TowerIdentity
from lamplit.unit_vectors import normalize

if TYPE_CHECKING:  # a search reads no tensor, and torch would take longer to import than all it does
    from torch import Tensor

FORMAT = 1
_METADATA_KEY = "lamplit"


class Store:
    """An open store. Rows come in the order of their ids, whatever order they were embedded in."""

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises:
            StoreError: there is none, or it was written by a newer lamplit.
        """
        self.path = str(path)
        table = _open_table(path)
        if table is None:
            raise StoreError(f"no store at {path}; make one with: lamplit embed SOURCE --out {path}")
        self._table = table
        described = (self._table.schema.metadata or {}).get(_METADATA_KEY.encode())
        if described is None:
            raise StoreError(f"{path} is a Lance table, but not one that lamplit embed made")
        values = json.loads(described)
        if values["format"] > FORMAT:
            raise StoreError(f"{path} has format {values['format']}; this lamplit reads up to {FORMAT}: upgrade it")
        self.tower = TowerIdentity.from_dict(values["tower"])
        self.backend: str = values["engine"]
        self.centered: bool = values["centered"]
        self._center: list[float] | None = values["center"]

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
        """Write a new store with its first rows, and with `more` blocks of them in the same atomic commit.

        The first rows decide the types of the metadata columns, but for those in `metadata_types`.
        """
        values = {
            "format": FORMAT,
            "tower": tower.to_dict(),
            "engine": backend,
            "centered": centered,
            "center": None,
        }
        known = metadata_types or {}
        types = [
            (name, known.get(name) or column_type([row.metadata.get(name) for row in rows]))
            for name in metadata_columns
        ]
        fixed = [
            ("id", pa.string()),
            ("path", pa.string()),
            ("hash", pa.string()),
            ("texts", pa.list_(pa.string())),
        ]
        vector = pa.list_(pa.float16(), tower.width)
        schema = pa.schema([*fixed, *types, ("vector", vector)], metadata={_METADATA_KEY: json.dumps(values)})
        failures: list[LamplitError] = []

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                for block in chain([rows], more):
                    yield from to_table(block, schema).to_batches()
            except LamplitError as error:  # Lance makes an error of its own out of it
                failures.append(error)
                raise

        try:
            lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(path), schema=schema)
        except OSError:
            if failures:
                raise failures[0] from None
            raise
        store = cls(path)
        # What a run that was killed before its commit has left; the new table refers to none of it.
        store._table.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
        return store

    @property
    def center(self) -> Tensor | None:
        """The (D,) mean of a centred store, once `finish` has fixed it."""
        import torch

        return None if self._center is None else torch.tensor(self._center)

    def __len__(self) -> int:
        """Count the images."""
        return int(self._table.count_rows())

    @property
    def metadata_columns(self) -> list[str]:
        """Names of the columns that the pairs brought along."""
        return [name for name in self._table.schema.names if name not in COLUMNS]

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
        """Delete rows by id, in atomic commits of some thousands; ids that are not there do not matter."""
        for start in range(0, len(ids), 4096):
            listed = ", ".join("'" + name.replace("'", "''") + "'" for name in ids[start : start + 4096])
            self._table.delete(f"id IN ({listed})")
        self._refresh()

    def finish(self) -> None:
        """Fix the centre of a centred store once its first images are in, and merge small fragments."""
        if self.centered and self._center is None:
            self._center = self.vectors().mean(0).tolist()
            values = json.loads(self._table.schema.metadata[_METADATA_KEY.encode()])
            values["center"] = self._center
            self._table.update_schema_metadata({_METADATA_KEY: json.dumps(values)})
        self._table.optimize.compact_files()
        self._refresh()

    def as_stored(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the columns of this store keep of a row's metadata."""
        schema = self._table.schema
        return {name: fitted(metadata.get(name), schema.field(name).type) for name in self.metadata_columns}

    def hashes(self) -> dict[str, str]:
        """Content hash of every image, by id."""
        table = self._table.to_table(columns=["id", "hash"])
        return dict(zip(table["id"].to_pylist(), table["hash"].to_pylist(), strict=True))

    def paths(self) -> dict[str, str]:
        """Path of every image as it was when it was embedded, by id."""
        table = self._table.to_table(columns=["id", "path"])
        return dict(zip(table["id"].to_pylist(), table["path"].to_pylist(), strict=True))

    def texts_and_metadata(self) -> dict[str, tuple[list[str], dict[str, Any]]]:
        """Texts and metadata of every image, by id."""
        names = self.metadata_columns
        rows = self._table.to_table(columns=["id", "texts", *names]).to_pylist()
        return {row["id"]: (row["texts"], {name: row[name] for name in names}) for row in rows}

    def column(self, name: str) -> list[Any]:
        """All values of one column, in the order of the ids.

        Raises:
            StoreError: no such column.
        """
        if name not in self._table.schema.names:
            there = ", ".join(n for n in self._table.schema.names if n != "vector")
            raise StoreError(f"{self.path} has no column {name!r}; it has: {there}")
        values: list[Any] = self._sorted(name)[name].to_pylist()
        return values

    def texts(self, column: str = "texts") -> list[list[str]]:
        """Texts of each image, from the pairs' own text column or a metadata column of text (or lists of it).

        Raises:
            StoreError: no such column, or one that holds no text.
        """
        texts = []
        for value in self.column(column):
            cells = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(cell, str) for cell in cells):
                raise StoreError(f"column {column!r} of {self.path} holds no text: {value!r}")
            texts.append([cell.strip() for cell in cells if cell.strip()])
        return texts

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Everything but the vectors of the rows at `places` (in the order of the ids)."""
        names = [name for name in self._table.schema.names if name != "vector"]
        found: list[dict[str, Any]] = self.take(places, names).to_pylist()
        return found

    def take(self, places: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows at `places` (in the order of the ids) as they are stored, with all columns or some."""
        names = list(columns or self._table.schema.names)
        return self._table.take(self.order[list(places)].tolist(), columns=names)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Where each row lies in the table, by its place in the order of the ids."""
        positions: NDArray[np.int64] = pc.sort_indices(self._table.to_table(columns=["id"])["id"]).to_numpy()
        return positions

    def where(self, condition: str) -> NDArray[np.bool_]:
        """Tell for each row, in the order of the ids, whether an SQL condition on its columns holds.

        Raises:
            UsageError: Lance cannot read the condition; the message names the columns.
        """
        try:
            matching = self._row_ids(condition)
        except (ValueError, OSError, RuntimeError) as error:  # the last where Lance's planner breaks
            names = ", ".join(name for name in self._table.schema.names if name != "vector")
            reason = re.split(r"\. Valid fields are|, \S+\.rs:\d", str(error).strip())[0]
            raise UsageError(f"the condition {condition!r} cannot be used ({reason}); there are: {names}") from error
        holds = np.zeros(len(self), bool)
        holds[self._places_of(matching)] = True
        return holds

    def build_index(self, partitions: int) -> None:
        """Build Lance's IVF index of the vectors, or build it again; rows that are added later are searched without."""
        self._table = self._table.create_index(
            "vector", index_type="IVF_FLAT", metric="cosine", num_partitions=partitions, replace=True
        )

    def near(self, vector: NDArray[np.float32], k: int, probes: int, condition: str | None = None) -> NDArray[np.int64]:
        """Places (ascending) of about the k rows nearest to a (D,) vector, by the index, of those where a condition is.

        `probes` of the index's partitions are looked at. Without an index it is every row.
        """
        nearest = {"column": "vector", "q": vector.astype(np.float16), "k": k, "nprobes": probes}
        found = self._table.to_table(
            columns=["_distance"], with_row_id=True, nearest=nearest, filter=condition, prefilter=condition is not None
        )
        return np.sort(self._places_of(found["_rowid"].to_numpy().astype(np.int64)))

    def blocks(self, rows: int = 16384) -> Iterator[NDArray[np.float32]]:
        """Vectors in the order of the table (`order` tells the places), in blocks: (n, D) float32 unit vectors."""
        for batch in self._table.to_batches(columns=["vector"], batch_size=rows):
            yield normalize(self._halves(batch["vector"]))

    @property
    def state(self) -> str:
        """Name the rows as they are now: another store, or the same one changed, has another name."""
        fragments = [
            (fragment.fragment_id, [file.path for file in fragment.data_files()], str(fragment.deletion_file()))
            for fragment in self._table.get_fragments()
        ]
        return hashlib.blake2b(repr(sorted(fragments)).encode(), digest_size=8).hexdigest()

    def vectors_at(self, places: Sequence[int]) -> Tensor:
        """(K, D) float16 vectors of the rows at `places` (in the order of the ids), to the bit as they are stored."""
        import torch

        return torch.from_numpy(self._halves(self.take(places, ["vector"])["vector"].combine_chunks()).copy())

    def vectors(self, center: Tensor | None = None) -> Tensor:
        """(N, D) float32 unit vectors; with a (D,) `center`, that is subtracted and they are made unit again."""
        import torch
        from torch.nn import functional as F

        halves = self._halves(self._sorted("vector")["vector"].combine_chunks())
        vectors = F.normalize(torch.from_numpy(halves.astype(np.float32)), dim=-1)
        return vectors if center is None else F.normalize(vectors - center, dim=-1)

    def require_tower(self, tower: TowerIdentity) -> None:
        """Refuse vectors of another tower.

        Raises:
            StoreError: naming both towers and the way out.
        """
        if tower.fingerprint != self.tower.fingerprint:
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
        for name in ("order", "_place_of_row_id"):
            self.__dict__.pop(name, None)

    def _places_of(self, row_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        known, places = self._place_of_row_id
        found: NDArray[np.int64] = places[np.searchsorted(known, row_ids)]
        return found

    @cached_property
    def _place_of_row_id(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lance's ids of all rows, ascending, and the places of these rows."""
        row_ids = self._row_ids(None)
        places = np.empty(len(row_ids), np.int64)
        places[self.order] = np.arange(len(row_ids))
        ascending = np.argsort(row_ids, kind="stable")
        return row_ids[ascending], places[ascending]

    def _row_ids(self, condition: str | None) -> NDArray[np.int64]:
        found = self._table.to_table(columns=[], filter=condition, with_row_id=True)["_rowid"]
        ids: NDArray[np.int64] = found.to_numpy().astype(np.int64)
        return ids

    def _halves(self, column: Any) -> NDArray[np.float16]:
        halves: NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.tower.width)
        return halves

    def _sorted(self, *columns: str) -> pa.Table:
        names = list(dict.fromkeys(["id", *columns]))
        return self._table.to_table(columns=names).sort_by("id")


def as_store(store: str | Path | Store) -> Store:
    """Open the store at a path; an open one is returned as it is.

    Raises:
        StoreError: there is no store at the path, or a newer lamplit wrote it.
    """
    return store if isinstance(store, Store) else Store(store)


def _open_table(path: str | Path) -> Any:
    if Path(path).is_file():  # Lance would try for seconds
        return None
    try:
        return lance.dataset(str(path))
    except (ValueError, OSError):
        return None
