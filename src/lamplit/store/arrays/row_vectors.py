"""The vectors of a store as arrays: in the order of the ids, memory-mapped if there are many.

Those of a very large store lie in several files, one for each part, so few are written when it grows.

Shapes: N images, D width of the tower.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from lamplit.progress import progress_bar
from lamplit.store.arrays.derived import Draft, derive
from lamplit.store.arrays.joined_vectors import JoinedVectors, Rows, join
from lamplit.store.lance_store import Store
from lamplit.store.store_parts import Part, positions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowVectors:
    """Unit vectors of all rows, made from what is stored when they are asked for.

    Attributes:
        halves: (N, D) vectors to the bit as they are stored.
        digest: of these, whatever order they were embedded in.
        center: (D,) to be subtracted from each, or None.
    """

    halves: NDArray[np.float16] | JoinedVectors
    digest: str
    center: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.halves)

    @property
    def files(self) -> list[tuple[Rows, np.memmap[Any, Any]]]:
        """The memory-mapped files, each with its rows."""
        joined = self.halves
        parts = zip(joined.rows, joined.arrays, strict=True) if isinstance(joined, JoinedVectors) else [(None, joined)]
        return [(rows, array) for rows, array in parts if isinstance(array, np.memmap)]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for _, file in self.files)

    @property
    def is_larger_than_memory(self) -> bool:
        """Whether the files do not fit into half of the free memory; the other half is for a step."""
        return bool(self.nbytes > psutil.virtual_memory().available / 2)

    def expect(self, first: int, last: int) -> None:
        """Let the system begin to read rows `first` to `last` of the files, so that they are there when asked for."""
        for rows, file in self.files:
            ends = np.array([first, last + 1], np.int32)
            begin, end = (ends if rows is None else np.searchsorted(rows, ends)).tolist()
            if begin < end:
                _read_ahead(file, begin, end)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return (n, D) float32 unit vectors of (n,) rows, which may repeat."""
        import torch
        from torch.nn import functional as F

        asked = rows.numpy()
        if isinstance(self.halves, JoinedVectors):
            halves = self.halves[asked]
        else:  # a file is read twice as fast from its beginning to its end
            order = np.argsort(asked)
            halves = np.empty((len(asked), self.halves.shape[1]), np.float16)
            halves[order] = self.halves[asked[order]]
        vectors = F.normalize(torch.from_numpy(halves).float(), dim=-1)
        return vectors if self.center is None else F.normalize(vectors - self.center, dim=-1)


def read_vectors(store: Store, center: Tensor | None = None, *, progress: bool = False) -> RowVectors:
    """Open the vectors of a store; those of a large one are first written in the order of the ids, once.

    Args:
        store: whose vectors they are.
        center: (D,) to be subtracted from each unit vector, and the rest made unit again.
        progress: show a bar on stderr.

    Raises:
        StoreError: rows have no vectors.
    """
    rows, parts = read_rows(store), store.parts
    found = [_read_part(store, part, own, progress=progress) for part, own in zip(parts, rows, strict=True)]

    def make(draft: Draft) -> None:
        hashes = np.empty(len(store), np.uint64)
        for own, part in zip(rows, found, strict=True):
            hashes[slice(None) if own is None else own] = part["hashes"]
        digest = blake2b(hashes.tobytes(), digest_size=16).digest()
        draft.create("digest", (16,), np.uint8)[:] = np.frombuffer(digest, np.uint8)

    digest = derive(store, "digest", ("digest",), make)["digest"]
    return RowVectors(join(rows, [part["vectors"] for part in found]), digest.tobytes().hex(), center)


def read_rows(store: Store) -> list[Rows]:
    """Return the rows of each of a store's parts; None if there is one part. The store gets the `order` of its ids."""
    parts = store.parts

    def sort(draft: Draft) -> None:
        draft.create("order", (len(store),), np.int64)[:] = store.order

    def divide(draft: Draft) -> None:
        rows, begin = draft.create("rows", (len(store),), np.int32), 0
        for part in parts:
            rows[begin : begin + len(part)] = np.sort(rows_in_table(store, part))
            begin += len(part)

    store.use_order(derive(store, "ids", ("order",), sort)["order"])
    if len(parts) == 1:
        return [None]
    ends = np.cumsum([len(part) for part in parts])
    return list(np.split(derive(store, "parts", ("rows",), divide)["rows"], ends[:-1]))


def places(store: Store, part: Part, rows: Rows) -> NDArray[np.integer[Any]]:
    """Return for each row of a part, in the order of the table, its place among the part's `rows`: (n,)."""
    in_table = rows_in_table(store, part)
    return in_table if rows is None else np.searchsorted(rows, in_table)


def rows_in_table(store: Store, part: Part | None = None) -> NDArray[np.int32]:
    """Return the rows of a part, or of all, in the order of the table: (n,)."""
    row_at = store.row_at
    if part is None:
        return row_at
    ranges = positions(store.fragments(), part)
    return np.concatenate([row_at[some.start : some.stop] for some in ranges]) if ranges else row_at[:0]


def _read_part(store: Store, part: Part, rows: Rows, *, progress: bool) -> dict[str, NDArray[Any]]:
    def make(draft: Draft) -> None:
        vectors = draft.create("vectors", (len(part), store.tower.width), np.float16)
        hashes = draft.create("hashes", (len(part),), np.uint64)
        place, start = places(store, part, rows), 0
        with progress_bar("vectors", len(part), shown=progress) as advance:
            for halves in store.half_blocks(part):
                into = place[start : start + len(halves)]
                vectors[into] = halves
                digests = (blake2b(vector, digest_size=8).digest() for vector in np.ascontiguousarray(halves))
                hashes[into] = np.frombuffer(b"".join(digests), np.uint64)
                start += len(halves)
                advance(len(halves), "")

    return derive(store, "vectors", ("vectors", "hashes"), make, part=part)


def _read_ahead(file: np.memmap[Any, Any], first: int, stop: int) -> None:
    mapped: Any = file.base
    if not (isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED")):
        return  # on Windows
    # numpy maps a file from the page on in which its values begin.
    begin = file.offset % mmap.ALLOCATIONGRANULARITY + first * file.strides[0]
    end = begin + (stop - first) * file.strides[0]
    begin -= begin % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_WILLNEED, begin, end - begin)
