"""The vectors of a store as arrays: in the order of the ids, memory-mapped if there are many.

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
from lamplit.store.derived import Draft, derive
from lamplit.store.lance_store import Store

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

    halves: NDArray[np.float16]
    digest: str
    center: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.halves)

    @property
    def is_larger_than_memory(self) -> bool:
        """Whether they lie in a file that does not fit into half of the free memory; the other half is for a step."""
        return isinstance(self.halves, np.memmap) and self.halves.nbytes > psutil.virtual_memory().available / 2

    def expect(self, first: int, last: int) -> None:
        """Let the system begin to read rows `first` to `last` of a file, so that they are there when asked for."""
        mapped: Any = self.halves.base
        if not (
            isinstance(self.halves, np.memmap) and isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED")
        ):
            return  # in memory, or on Windows
        # numpy maps a file from the page on in which its values begin.
        begin = self.halves.offset % mmap.ALLOCATIONGRANULARITY + first * self.halves.strides[0]
        end = begin + (last + 1 - first) * self.halves.strides[0]
        begin -= begin % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return (n, D) float32 unit vectors of (n,) rows, which may repeat."""
        import torch
        from torch.nn import functional as F

        # A file is read twice as fast from its beginning to its end.
        asked = rows.numpy()
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

    def make(draft: Draft) -> None:
        order = draft.create("order", (len(store),), np.int64)
        order[:] = store.order
        vectors = draft.create("vectors", (len(store), store.tower.width), np.float16)
        hashes, row_at, start = np.empty(len(store), np.uint64), store.row_at, 0
        with progress_bar("vectors", len(store), shown=progress) as advance:
            for halves in store.half_blocks():
                rows = row_at[start : start + len(halves)]
                vectors[rows] = halves
                digests = (blake2b(vector, digest_size=8).digest() for vector in np.ascontiguousarray(halves))
                hashes[rows] = np.frombuffer(b"".join(digests), np.uint64)
                start += len(halves)
                advance(len(halves), "")
        draft.create("digest", (16,), np.uint8)[:] = np.frombuffer(
            blake2b(hashes.tobytes(), digest_size=16).digest(), np.uint8
        )

    found = derive(store, "rows", ("order", "vectors", "digest"), make)
    store.use_order(found["order"])
    return RowVectors(found["vectors"], found["digest"].tobytes().hex(), center)
