"""One pass over the texts of a part of a store: what its rows say, as arrays.

Shapes: n rows of the part, p pairs of one of them and a caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamplit.data.caption_hash import hash_captions, hash_names
from lamplit.progress import progress_bar
from lamplit.store.arrays.derived import Draft, derive
from lamplit.store.arrays.joined_vectors import Rows
from lamplit.store.arrays.row_vectors import places
from lamplit.store.lance_store import Store
from lamplit.store.store_parts import Part
from lamplit.store.table.text_cells import read_columns

Integers = NDArray[np.integer[Any]]


def read_said(
    store: Store, part: Part, rows: Rows, columns: Sequence[str], key: str, *, progress: bool = False
) -> dict[str, NDArray[Any]]:
    """Read what the rows of a part say; of a part that is not all of its store, it is kept for the next time.

    Args:
        store: an open store.
        part: of it.
        rows: of the part.
        columns: with texts.
        key: of the columns, in names of files.
        progress: show a bar on stderr.

    Returns:
        In the order of the ids: `counts`, (n,) texts of each row; `contents`, (n,) hashes of images; `digests`, (n,)
        of ids, contents and texts; `hashes`, (p,) of captions.
    """

    def make(draft: Draft) -> None:
        size, place, start = len(part), places(store, part, rows), 0
        counts, contents = draft.create("counts", (size,), np.int32), draft.create("contents", (size,), np.uint64)
        digests = draft.create("digests", (size,), np.uint64)
        found = [np.empty(0, np.uint64)]  # hashes of the pairs, in the order of the table
        with progress_bar("captions", size, shown=progress) as advance:
            for batch in store.batches("id", "hash", *columns, fragments=part.fragments):
                texts, lengths = read_columns({name: batch[name] for name in columns}, store.path)
                into = place[start : start + len(lengths)]
                hashes = batch["hash"].to_pylist()
                counts[into], contents[into] = lengths, hash_names(hashes)
                digests[into] = _digests(batch["id"].to_pylist(), hashes, texts, lengths)
                found.append(hash_captions(texts))
                start += len(lengths)
                advance(len(lengths), "")
        in_table = np.concatenate(found)
        del found
        pairs = draft.create("hashes", in_table.shape, np.uint64)
        if (np.diff(place) == 1).all():
            pairs[:] = in_table
        else:
            pairs[runs((np.cumsum(counts, dtype=np.int64) - counts)[place], counts[place])] = in_table

    if rows is None:  # the arrays of the store have all of it
        draft = Draft(None)
        make(draft)
        return draft.finish()
    return derive(store, f"said-{key}", ("counts", "contents", "digests", "hashes"), make, part=part)


def runs(starts: Integers, counts: Integers) -> NDArray[np.int64]:
    """Return `counts[i]` numbers from `starts[i]` on, for each i: (counts.sum(),)."""
    ends = np.cumsum(counts, dtype=np.int64)
    found: NDArray[np.int64] = np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)
    return found


def _digests(ids: list[str], hashes: list[str], texts: list[str], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Digest what each of n rows says: (n,)."""
    left = iter(texts)
    rows = zip(ids, hashes, counts.tolist(), strict=True)
    said = (json.dumps([name, content, list(islice(left, count))]).encode() for name, content, count in rows)
    return np.frombuffer(b"".join(blake2b(each, digest_size=8).digest() for each in said), np.uint64)
