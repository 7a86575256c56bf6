"""The captions of a store as arrays, without a Python object for each: they are read once, in one pass.

Captions are compared by 64 bits (`hash_captions`). Shapes: N images, L pairs of an image and a caption, M distinct
captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lamplit.data.caption_hash import hash_captions, number
from lamplit.progress import progress_bar
from lamplit.store.arrays.caption_reading import read_said, runs
from lamplit.store.arrays.derived import Draft, derive
from lamplit.store.arrays.joined_vectors import Rows
from lamplit.store.arrays.row_vectors import read_rows, rows_in_table
from lamplit.store.lance_store import Store
from lamplit.store.store_parts import Part
from lamplit.store.table.rows import FIXED_COLUMNS
from lamplit.store.table.text_cells import column_names, read_columns

_NAMES = ("rows", "index", "first", "hashes", "contents", "images", "digest")
_BLOCK = 8192  # captions that are looked up at once
Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Captions:
    """All pairs of a store and a column of texts, in the order of the ids; captions that differ in case only are one.

    Attributes:
        store: the store.
        column: its column, or several with commas between.
        rows: (L,) row of each pair.
        index: (L,) caption of each pair; captions are numbered as they appear.
        first: (M,) the pair in which each caption is first.
        hashes: (M,) hash of each caption.
        contents: (N,) hash of the content of each row.
        images: (N,) number of the content of each row; rows with one number are one image.
        digest: of ids, contents and texts, wherever in the table they lie.
    """

    store: Store
    column: str
    rows: NDArray[np.int32]
    index: NDArray[np.int32]
    first: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    contents: NDArray[np.uint64]
    images: NDArray[np.int32]
    digest: str

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return _columns(self.store, self.column)

    @property
    def key(self) -> str:
        """Part of the names of files that belong to the columns."""
        return _key(self.column)

    @property
    def parts(self) -> list[CaptionPart]:
        """The captions of each part of the store."""
        return [CaptionPart(self, *each) for each in zip(self.store.parts, read_rows(self.store), strict=True)]

    def batches(self, *, name: str = "texts", progress: bool = False) -> Iterator[tuple[list[str], NDArray[np.int32]]]:
        """Yield every distinct caption once with its number, some thousands at a time, in the order of the table."""
        return CaptionPart(self).batches(name=name, progress=progress)

    def take(self, numbers: Integers) -> list[str]:
        """Return some captions by their numbers, as they are written where they are first."""
        texts: list[str] = []
        for start in range(0, len(numbers), _BLOCK):
            pairs = self.first[numbers[start : start + _BLOCK]]
            rows, place = np.unique(self.rows[pairs], return_inverse=True)
            table = self.store.take(rows, self.columns)
            cells_of = {name: table[name].combine_chunks() for name in self.columns}
            flat, counts = read_columns(cells_of, self.store.path)
            begins = np.cumsum(counts) - counts
            cells = begins[place] + pairs - np.searchsorted(self.rows, rows)[place]
            texts += [flat[cell] for cell in cells.tolist()]
        return texts


@dataclass(frozen=True)
class CaptionPart:
    """The p pairs of a part of a store, and their m distinct captions, which have numbers of their own.

    Attributes:
        captions: those of the store.
        part: of the store; None for all of it.
        rows: of the part; None if they are all.
    """

    captions: Captions
    part: Part | None = None
    rows: Rows = None

    @cached_property
    def pairs(self) -> NDArray[np.int64] | None:
        """(p,) pairs of the store, ascending; None if these are all."""
        if self.rows is None:
            return None
        begins, ends = (np.searchsorted(self.captions.rows, self.rows, side) for side in ("left", "right"))
        return runs(begins, ends - begins)

    @property
    def first(self) -> NDArray[np.int64]:
        """(m,) the pair, among these p, in which each caption is first."""
        return self._numbered[0]

    @property
    def index(self) -> NDArray[np.int32]:
        """(p,) caption of each pair."""
        return self._numbered[1]

    @cached_property
    def _numbered(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        if self.pairs is None:
            return self.captions.first, self.captions.index
        return number(self.captions.hashes[self.captions.index[self.pairs]])

    def batches(self, *, name: str = "texts", progress: bool = False) -> Iterator[tuple[list[str], NDArray[np.int32]]]:
        """Yield every caption of the part once with its number, some thousands at a time, in the order of the table."""
        store, columns, start = self.captions.store, self.captions.columns, 0
        row_at, fragments = rows_in_table(store, self.part), None if self.part is None else self.part.fragments
        with progress_bar(name, len(row_at), shown=progress) as advance:
            for batch in store.batches(*columns, fragments=fragments):
                texts, counts = read_columns({name: batch[name] for name in columns}, store.path)
                rows = row_at[start : start + len(counts)]
                pairs = runs(np.searchsorted(self.captions.rows, rows), counts)
                own = pairs if self.pairs is None else np.searchsorted(self.pairs, pairs)
                numbers = self.index[own]
                begins = np.flatnonzero(self.first[numbers] == own)
                yield [texts[i] for i in begins.tolist()], numbers[begins]
                start += len(counts)
                advance(len(counts), "")

    def first_here(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return the captions of the store whose first pair is in this part: their numbers there, and here."""
        if self.pairs is None:
            return np.arange(len(self.first)), np.arange(len(self.first), dtype=np.int32)
        own = np.minimum(np.searchsorted(self.pairs, self.captions.first), max(0, len(self.pairs) - 1))
        there = np.flatnonzero(self.pairs[own] == self.captions.first) if len(self.pairs) else own[:0]
        return there, self.index[own[there]]


class CaptionTexts(Sequence[str]):
    """Some captions of a store as a sequence; they are read from the store when they are asked for.

    Args:
        captions: all of them.
        numbers: (M,) which.
    """

    def __init__(self, captions: Captions, numbers: NDArray[np.int32]) -> None:
        self.captions, self.numbers = captions, numbers

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        """Return one caption or some."""
        if isinstance(place, slice):
            return self.take(np.arange(*place.indices(len(self))))
        return self.take(np.array([place]))[0]

    def __iter__(self) -> Iterator[str]:
        """Read all captions, in the order of the table if that is the same."""
        captions = self.captions
        in_order = bool((np.diff(self.numbers) > 0).all() and (np.diff(captions.store.order) > 0).all())
        if not in_order:
            for start in range(0, len(self), _BLOCK):
                yield from self[start : start + _BLOCK]
            return
        wanted = np.zeros(len(captions.hashes), bool)
        wanted[self.numbers] = True
        for texts, numbers in captions.batches():
            for text, is_wanted in zip(texts, wanted[numbers].tolist(), strict=True):
                if is_wanted:
                    yield text

    def take(self, places: Integers) -> list[str]:
        """Return the captions at (n,) places."""
        return self.captions.take(self.numbers[places])


def read_captions(store: Store, column: str = "texts", *, progress: bool = False) -> Captions:
    """Read the captions of a store; arrays of a large one are kept for the next time.

    Args:
        store: an open store.
        column: with texts or lists of texts; or several with commas between.
        progress: show a bar on stderr.

    Raises:
        StoreError: there is no such column, or it holds something else than text or lists of it.
    """
    columns = _columns(store, column)

    def make(draft: Draft) -> None:
        size, rows = len(store), read_rows(store)
        contents = draft.create("contents", (size,), np.uint64)
        counts, digests = np.empty(size, np.int32), np.empty(size, np.uint64)
        found = [
            read_said(store, part, own, columns, _key(column), progress=progress)
            for part, own in zip(store.parts, rows, strict=True)
        ]
        for own, said in zip(rows, found, strict=True):
            there = slice(None) if own is None else own
            counts[there], contents[there], digests[there] = said["counts"], said["contents"], said["digests"]
        digest = blake2b(digests.tobytes(), digest_size=16).digest()
        del digests
        draft.create("digest", (16,), np.uint8)[:] = np.frombuffer(digest, np.uint8)
        draft.create("images", (size,), np.int32)[:] = number(contents)[1]
        ends = np.cumsum(counts, dtype=np.int64)
        pairs = found[0]["hashes"]
        if len(found) > 1:
            pairs = np.empty(int(ends[-1]), np.uint64)
            for own, said in zip(rows, found, strict=True):
                pairs[runs((ends - counts)[own], counts[own])] = said["hashes"]
        draft.create("rows", (len(pairs),), np.int32)[:] = np.repeat(np.arange(size, dtype=np.int32), counts)
        first, index = number(pairs)
        draft.create("index", index.shape, np.int32)[:] = index
        draft.create("first", first.shape, np.int64)[:] = first
        draft.create("hashes", first.shape, np.uint64)[:] = pairs[first]

    found = derive(store, f"captions-{_key(column)}", _NAMES, make)
    digest = found.pop("digest").tobytes().hex()
    return Captions(store, column, digest=digest, **{name: found[name] for name in _NAMES if name != "digest"})


def seeded_hashes(captions: Captions, seed: int, *, progress: bool = False) -> NDArray[np.uint64]:
    """Hash (M,) captions with a seed, which gives them an order; kept for the next time, for one seed."""
    kind = f"order-{captions.key}-"

    def of_part(part: CaptionPart) -> NDArray[np.uint64]:
        def make(draft: Draft) -> None:
            hashes = draft.create("hashes", part.first.shape, np.uint64)
            for texts, numbers in part.batches(name="order", progress=progress):
                hashes[numbers] = hash_captions(texts, seed)

        return derive(captions.store, f"{kind}{seed}", ("hashes",), make, part=part.part, instead_of=kind)["hashes"]

    def make(draft: Draft) -> None:
        hashes = draft.create("hashes", captions.hashes.shape, np.uint64)
        for part in captions.parts:
            there, here = part.first_here()
            hashes[there] = of_part(part)[here]

    if len(captions.store.parts) == 1:
        return of_part(captions.parts[0])
    kind_of_all = f"all-{kind}"
    return derive(captions.store, f"{kind_of_all}{seed}", ("hashes",), make, instead_of=kind_of_all)["hashes"]


def _columns(store: Store, column: str) -> list[str]:
    return column_names(column, [*FIXED_COLUMNS, *store.metadata_columns])


def _key(column: str) -> str:
    return blake2b(column.encode(), digest_size=4).hexdigest()
