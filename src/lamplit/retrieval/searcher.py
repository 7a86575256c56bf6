"""Search a store by words, by an image, or by sums of both."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lamplit.errors import UsageError, kind_of
from lamplit.retrieval.collection import open_collection
from lamplit.retrieval.indexing import CANDIDATES, index_probes
from lamplit.retrieval.model_reader import Reader, as_reader
from lamplit.retrieval.nearest import Found
from lamplit.retrieval.queries import encode_words, require_unit
from lamplit.retrieval.relevance import Relevance, open_relevance
from lamplit.store.lance_store import Store, as_store
from lamplit.unit_vectors import as_array

if TYPE_CHECKING:  # a model brings torch, and a search by words does without
    import torch
    from torch import Tensor

    from lamplit.model import ImageInput, LiT

FIRST = 100  # hits that are the best of the candidates; all further ones are exact
_KEPT_CONDITIONS = 16  # a byte for each row and condition


@dataclass(frozen=True, repr=False)
class Hit:
    """One image that was found.

    Attributes:
        score: cosine of query and image, -1 to 1.
        id: of the image in the store.
        path: of the image's file; the id again if the image has no file of its own.
        texts: the image's texts in the store; may be empty.
        metadata: every other column of the source, by its name.
        copies: ids of the other images with the very same content, which are not hits of their own.
    """

    score: float
    id: str
    path: str
    texts: list[str]
    metadata: dict[str, Any]
    copies: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        text = f": {self.texts[0]!r}" if self.texts else ""
        return f"<Hit {self.score:.3f} {self.path}{text}>"


class Searcher:
    """An open store with the model that reads it.

    Up to 50,000 images search is exact. In larger stores the first 100 hits are the best of candidates by
    their bits, as many as gave a recall@10 of 0.99 when the store was written; further hits are exact. The hits of one
    call are always in the order of their scores. Images with the same bytes are one hit.

    Args:
        model: an open model, the folder of a saved one, or `lit:NAME`; a model that is open with its text tower alone
            searches by words.
        store: an open store or its path, embedded with the image tower that the model reads.
        exact: compare the query with all images, however many there are.
        device: torch device for a model that is opened here; by default the accelerator, if there is one.
        progress: show bars on stderr while the files of a large store are made.

    Raises:
        UsageError: there is no model, or a device is given for a model that is open on another one.
        StoreError: there is no store, or another tower embedded it than the model reads.

    Example:
        >>> searcher = lamplit.Searcher("runs/stamps", "stamps.lance")
        >>> [hit.path for hit in searcher.search("a red bicycle", k=3)]
    """

    def __init__(
        self,
        model: LiT | Reader | str | Path,
        store: Store | str | Path,
        *,
        exact: bool = False,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> None:
        self.store = as_store(store)
        self.reader = as_reader(model, device=device)
        self.store.require_tower(self.reader.identity)
        self.exact = exact
        self.collection = open_collection(self.store, self.reader.project_rows, self.reader.space, progress=progress)
        self._allowed = lru_cache(_KEPT_CONDITIONS)(self._first_copies)  # like the vectors, as the store is now
        is_own_space = self.reader.space == self.store.tower.fingerprint
        self.probes = index_probes(self.store) if is_own_space and not exact else None

    def __repr__(self) -> str:
        """Name the store, its size and how it is searched."""
        size, width = self.collection.vectors.shape
        return f"<Searcher {Path(self.store.path).name}: {size} × {width}, {self._method()}>"

    def search(
        self,
        query: str | None = None,
        *,
        image: ImageInput | None = None,
        k: int = 10,
        offset: int = 0,
        where: str | None = None,
        min_score: float | Literal["auto"] | None = None,
    ) -> list[Hit]:
        """Find the k images nearest to words, an image, or both (their unit vectors are added).

        Args:
            query: words; or a sum of words in quotes, with weights if you like: `"beach" - 0.5 * "people"`. Their unit
                vectors are added.
            image: a path, encoded bytes, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W).
            k: number of hits.
            offset: number of better hits to leave out, for pages.
            where: condition on the columns of the store, such as `year > 2019 and folder = 'trip'`.
            min_score: lowest cosine of a hit; `auto`, for words, leaves out what is probably no answer (`min_score`).

        Returns:
            At most k hits, best first.

        Raises:
            UsageError: there are neither words nor an image, the query is blank, the text tower knows no word of it, a
                sum cannot be read or cancels out, the condition is wrong, or `auto` is asked for an image.
            ImageError: the image cannot be used.

        Example:
            >>> searcher.search('"beach" - 0.5 * "people"', where="year > 2019")
        """
        _require_query(query, k, offset)
        if min_score == "auto" and image is not None:
            raise UsageError("the automatic lowest score is for words; for an image give a number, or none")
        given: Any = min_score  # of numpy, perhaps
        if given not in (None, "auto") and not (isinstance(given, Real) and not math.isnan(given)):
            raise UsageError(f"min_score is {min_score!r:.50}; expected a number, 'auto' or None")
        vector = self.encode(query, image)
        least = self.min_score(vector) if min_score == "auto" else min_score
        hits = self.nearest(vector, k, offset=offset, where=where)
        return hits if least is None else [hit for hit in hits if hit.score >= least]

    def min_score(self, vector: NDArray[np.float32]) -> float:
        """Return the cosine that the best image for words that nothing in the store shows reaches in 5 % of cases.

        It is measured on the store itself at the first call, which takes some seconds, and kept with it.

        Args:
            vector: (D,) unit vector of words, from `encode`.
        """
        return self._relevance.min_score(vector)

    @cached_property
    def _relevance(self) -> Relevance:
        return open_relevance(self.store, self.reader, self.collection.vectors, self.find)

    def encode(self, query: str | None = None, image: ImageInput | None = None) -> NDArray[np.float32]:
        """Encode a query: a (D,) float32 unit vector in the joint space; arguments and errors as for `search`."""
        _require_query(query)
        if query is None and image is None:
            raise UsageError("search takes words, an image, or both")
        total = np.zeros(1, np.float32) if query is None else encode_words(self.reader, query)
        if image is not None:
            total = total + self.reader.encode_images([image])[0]
        return require_unit(total, query)

    def nearest(
        self, vector: NDArray[np.float32] | Tensor, k: int, *, offset: int = 0, where: str | None = None
    ) -> list[Hit]:
        """Find the k images with the highest cosine to one (D,) unit vector; `offset` and `where` as for `search`.

        Raises:
            UsageError: the condition is wrong, or `k` or `offset` is below zero.
        """
        found = self.find(vector, k, offset=offset, where=where)
        others = [self._ids(rows) for rows in self.collection.copies.of_rows(found.rows)]
        rows = self.store.rows(found.rows.tolist())
        return [
            Hit(score, row["id"], row["path"], row["texts"], {c: row[c] for c in self.store.metadata_columns}, same)
            for score, row, same in zip(found.scores.tolist(), rows, others, strict=True)
        ]

    def find(
        self,
        vector: NDArray[np.float32] | Tensor,
        k: int,
        *,
        offset: int = 0,
        where: str | None = None,
        among: NDArray[np.bool_] | None = None,
    ) -> Found:
        """Do what `nearest` does, for rows of the store and their scores alone; `among` marks the rows to look at."""
        _require_query(None, k, offset)
        if among is None:
            return self._page(as_array(vector), k, offset, self._allowed(where), where)
        holds = among if where is None else among & self.store.where(where)
        allowed = self.collection.copies.first_only(len(holds), holds)
        return self._page(as_array(vector), k, offset, allowed, where, by_index=False)

    def _first_copies(self, where: str | None) -> NDArray[np.bool_] | None:
        """Mark of each content the first row that meets a condition, (N,); None if that is every row."""
        holds = None if where is None else self.store.where(where)
        return self.collection.copies.first_only(len(self.collection.vectors), holds)

    def _page(
        self,
        vector: NDArray[np.float32],
        k: int,
        offset: int,
        allowed: NDArray[np.bool_] | None,
        where: str | None,
        *,
        by_index: bool = True,  # it knows conditions on columns alone
    ) -> Found:
        depth = offset + k
        if self._is_exact or (offset == 0 and depth > FIRST):  # no earlier page was of candidates
            return self.collection.rank(vector, depth, allowed)[offset:]
        first = self._candidates(vector, allowed, where, by_index=by_index)
        if depth <= len(first):
            return first[offset:depth]
        # Hits that the candidates missed come after the first ones: pages have no gaps and no repeats.
        others = np.ones(len(self.store), bool) if allowed is None else allowed.copy()
        others[first.rows] = False
        rest = self.collection.rank(vector, depth - len(first), others)
        return (first + rest)[offset:depth].by_score()

    def _candidates(
        self, vector: NDArray[np.float32], allowed: NDArray[np.bool_] | None, where: str | None, *, by_index: bool
    ) -> Found:
        """Find the best 100 candidates of the index, if there is one, or of the bits."""
        if self.probes is None or not by_index:
            return self.collection.find(vector, FIRST, allowed)
        near = np.zeros(len(self.store), bool)
        near[self.store.near(vector, CANDIDATES, self.probes, where)] = True
        return self.collection.rank(vector, FIRST, near if allowed is None else near & allowed)

    def _ids(self, rows: NDArray[np.int64]) -> list[str]:
        found: list[str] = self.store.take(rows.tolist(), ["id"])["id"].to_pylist() if len(rows) else []
        return found

    @property
    def _is_exact(self) -> bool:
        return self.exact or (self.collection.is_exact and self.probes is None)

    def _method(self) -> str:
        if self._is_exact:
            return "exact"
        return "by the index" if self.probes is not None else f"recall@10 {self.collection.recall:.3f}"


def search(
    model: LiT | Reader | str | Path,
    store: Store | str | Path,
    query: str | None = None,
    *,
    image: ImageInput | None = None,
    k: int = 10,
    offset: int = 0,
    where: str | None = None,
    min_score: float | Literal["auto"] | None = None,
    device: str | torch.device | None = None,
) -> list[Hit]:
    """Find the k images of a store nearest to words, an image, or both; use a `Searcher` for many queries.

    On the command line: `lamplit search`.

    Args:
        model: an open model, the folder of a saved one, or `lit:NAME`.
        store: an open store or its path, embedded with the image tower that the model reads.
        query: words; or a sum of words in quotes, with weights if you like: `"beach" - 0.5 * "people"`. Their unit
            vectors are added.
        image: a path, encoded bytes, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W).
        k: number of hits.
        offset: number of better hits to leave out, for pages.
        where: condition on the columns of the store, such as `year > 2019 and folder = 'trip'`.
        min_score: lowest cosine of a hit; `auto`, for words, leaves out what is probably no answer: it is set where
            the store's captions lose as many right images as wrong ones stay.
        device: torch device for a model that is opened here; by default the accelerator, if there is one.

    Returns:
        At most k hits, best first.

    Raises:
        UsageError: there is no model, neither words nor an image, a blank query, one of which the text tower knows no
            word, a sum that cannot be read or cancels out, or a wrong condition.
        StoreError: there is no store, or another tower embedded it than the model reads.
        ImageError: the image cannot be used.

    Example:
        >>> lamplit.search("runs/stamps", "stamps.lance", "a hat", k=3)
        >>> lamplit.search("runs/stamps", "stamps.lance", '"beach" - 0.5 * "people"')
    """
    _require_query(query, k, offset)
    reader = as_reader(model, texts=query is not None, images=image is not None, device=device)
    return Searcher(reader, store).search(query, image=image, k=k, offset=offset, where=where, min_score=min_score)


def _require_query(query: object, k: object = 0, offset: object = 0) -> None:
    for name, value in (("k", k), ("offset", offset)):
        if not isinstance(value, Integral) or int(value) < 0:
            raise UsageError(f"{name} is {value!r}; expected a whole number of at least 0")
    if query is None or isinstance(query, str):
        return
    hint = "For an image: image=FILE"
    if isinstance(query, list | tuple | set):
        hint = "For many: s = lamplit.Searcher(model, store); [s.search(q) for q in queries]"
    elif hasattr(query, "ndim"):
        hint = "For a vector: lamplit.Searcher(model, store).nearest(vector, k)"
    raise UsageError(f"query is {kind_of(query)}; search takes one text. {hint}")
