"""The captions of a store as arrays, without a Python object for each: they are read once, in one pass.

Captions are compared by 64 bits (`hash_captions`). Shapes: N images, L pairs of an image and a caption, M distinct
captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lamplit.data.caption_hash import hash_captions, hash_names, number
from lamplit.progress import progress_bar
from lamplit.store.derived import Draft, derive
from lamplit.store.lance_store import Store
from lamplit.store.rows import FIXED_COLUMNS
from lamplit.store.text_cells import column_names, read_columns

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

    def batches(self, *, name: str = "texts", progress: bool = False) -> Iterator[tuple[list[str], NDArray[np.int32]]]:
        """Yield every distinct caption once with its number, some thousands at a time, in the order of the table."""
        row_at, start = self.store.row_at, 0
        with progress_bar(name, len(self.store), shown=progress) as advance:
            for batch in self.store.batches(*self.columns):
                texts, counts = read_columns({name: batch[name] for name in self.columns}, self.store.path)
                rows = row_at[start : start + len(counts)]
                pairs = _runs(np.searchsorted(self.rows, rows), counts)
                numbers = self.index[pairs]
                begins = np.flatnonzero(self.first[numbers] == pairs)
                yield [texts[i] for i in begins.tolist()], numbers[begins]
                start += len(counts)
                advance(len(counts), "")

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
        size, start, row_at = len(store), 0, store.row_at
        contents = draft.create("contents", (size,), np.uint64)
        counts, digests = np.empty(size, np.int32), np.empty(size, np.uint64)
        parts = [np.empty(0, np.uint64)]  # hashes of the pairs, in the order of the table
        with progress_bar("captions", size, shown=progress) as advance:
            for batch in store.batches("id", "hash", *columns):
                texts, lengths = read_columns({name: batch[name] for name in columns}, store.path)
                rows = row_at[start : start + len(lengths)]
                hashes = batch["hash"].to_pylist()
                counts[rows], contents[rows] = lengths, hash_names(hashes)
                digests[rows] = _digests(batch["id"].to_pylist(), hashes, texts, lengths)
                parts.append(hash_captions(texts))
                start += len(lengths)
                advance(len(lengths), "")
        digest = blake2b(digests.tobytes(), digest_size=16).digest()
        del digests
        draft.create("digest", (16,), np.uint8)[:] = np.frombuffer(digest, np.uint8)
        draft.create("images", (size,), np.int32)[:] = number(contents)[1]
        in_table = np.concatenate(parts)
        del parts
        draft.create("rows", (len(in_table),), np.int32)[:] = np.repeat(np.arange(size, dtype=np.int32), counts)
        pairs = in_table if (np.diff(row_at) == 1).all() else in_table[_from_table(store.order, row_at, counts)]
        del in_table
        first, index = number(pairs)
        draft.create("index", index.shape, np.int32)[:] = index
        draft.create("first", first.shape, np.int64)[:] = first
        draft.create("hashes", first.shape, np.uint64)[:] = pairs[first]

    found = derive(store, f"captions-{_key(column)}", _NAMES, make)
    digest = found.pop("digest").tobytes().hex()
    return Captions(store, column, digest=digest, **{name: found[name] for name in _NAMES if name != "digest"})


def seeded_hashes(captions: Captions, seed: int, *, progress: bool = False) -> NDArray[np.uint64]:
    """Hash (M,) captions with a seed, which gives them an order; kept for the next time, for one seed."""

    def make(draft: Draft) -> None:
        hashes = draft.create("hashes", captions.hashes.shape, np.uint64)
        for texts, numbers in captions.batches(name="order", progress=progress):
            hashes[numbers] = hash_captions(texts, seed)

    kind = f"order-{captions.key}-"
    return derive(captions.store, f"{kind}{seed}", ("hashes",), make, instead_of=kind)["hashes"]


def _columns(store: Store, column: str) -> list[str]:
    return column_names(column, [*FIXED_COLUMNS, *store.metadata_columns])


def _key(column: str) -> str:
    return blake2b(column.encode(), digest_size=4).hexdigest()


def _runs(starts: Integers, counts: Integers) -> NDArray[np.int64]:
    """Return `counts[i]` numbers from `starts[i]` on, for each i: (counts.sum(),)."""
    ends = np.cumsum(counts, dtype=np.int64)
    found: NDArray[np.int64] = np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)
    return found


def _from_table(order: Integers, row_at: Integers, counts: Integers) -> NDArray[np.int64]:
    """Return where in the table each pair is, in the order of the ids; `counts` says how many each row has."""
    in_table = counts[row_at]
    begins = np.cumsum(in_table, dtype=np.int64) - in_table
    return _runs(begins[order], counts)


def _digests(ids: list[str], hashes: list[str], texts: list[str], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Digest what each of n rows says: (n,)."""
    left = iter(texts)
    rows = zip(ids, hashes, counts.tolist(), strict=True)
    said = (json.dumps([name, content, list(islice(left, count))]).encode() for name, content, count in rows)
    return np.frombuffer(b"".join(blake2b(each, digest_size=8).digest() for each in said), np.uint64)
