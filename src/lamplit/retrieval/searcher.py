"""Search a store by words, by an image, or by sums of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamplit.errors import UsageError
from lamplit.retrieval.collection import SMALL, open_collection
from lamplit.retrieval.indexing import CANDIDATES, index_probes
from lamplit.retrieval.nearest import Found, find, rank
from lamplit.retrieval.queries import parse_query
from lamplit.store.lance_store import Store
from lamplit.unit_vectors import as_array, normalize

if TYPE_CHECKING:  # a model brings torch, and a search by words does without
    from torch import Tensor

    from lamplit.model import ImageInput, LiT
    from lamplit.towers.texts.word_reader import WordReader

FIRST = 100  # the best of the candidates; whatever is asked for beyond comes from the product of all rows


@dataclass(frozen=True)
class Hit:
    """One image that was found."""

    score: float  # cosine of query and image
    id: str
    path: str
    texts: list[str]
    metadata: dict[str, Any]


class Searcher:
    """An open store with the model that reads it.

    Up to `collection.SMALL` images search is exact. Of more, the first 100 hits are the best of candidates by their
    bits, as many as gave a recall@10 of 0.99 when the store was written; further pages are exact among all that
    are not on the first.

    Args:
        model: may be open with its text tower alone, for words; or a `WordReader`, which needs no torch.
        store: of the same image tower.
        exact: take the product of all rows always.
        small: up to how many images search is exact anyway.

    Raises:
        StoreError: the store was embedded by another tower than the model reads.
    """

    def __init__(self, model: LiT | WordReader, store: Store, *, exact: bool = False, small: int = SMALL) -> None:
        store.require_tower(model.identity)
        self.model = model
        self.store = store
        self.exact = exact
        self.collection = open_collection(store, model.project_rows, model.space, small)
        self.probes = None if exact or model.space != store.tower.fingerprint else index_probes(store)

    def search(
        self,
        query: str | None = None,
        *,
        image: ImageInput | None = None,
        k: int = 10,
        offset: int = 0,
        where: str | None = None,
    ) -> list[Hit]:
        """Find the k images nearest to words, an image, or both: their unit vectors are added.

        Args:
            query: words; or a sum such as `"beach" - "people"`, see `queries.parse_query`.
            image: a file, encoded bytes or a PIL image.
            k: how many hits.
            offset: how many better ones to leave out, for pages.
            where: SQL condition on the store's columns, such as `year > 2019 and folder = 'trip'`.

        Raises:
            UsageError: neither words nor image, a sum that cannot be read or is nothing, or a wrong condition.
            ImageError: the image cannot be used.
        """
        return self.nearest(self.encode(query, image), k, offset=offset, where=where)

    def encode(self, query: str | None = None, image: ImageInput | None = None) -> NDArray[np.float32]:
        """Bring a query into the joint space: a (D,) float32 unit vector; arguments and errors as of `search`."""
        if query is None and image is None:
            raise UsageError("search takes words, an image, or both")
        vectors, weights = [], []
        if query is not None:
            terms = parse_query(query)
            vectors.append(as_array(self.model.encode_texts([term.text for term in terms])))
            weights += [term.weight for term in terms]
        if image is not None:
            vectors.append(as_array(self.model.encode_images([image])))
            weights.append(1.0)
        total: NDArray[np.float32] = np.asarray(weights, np.float32) @ np.concatenate(vectors)
        if float(np.linalg.norm(total)) < 1e-4:
            raise UsageError(f"the parts of {query!r} cancel each other: nothing is left to search for")
        unit: NDArray[np.float32] = normalize(total[None])[0]
        return unit

    def nearest(
        self, vector: NDArray[np.float32] | Tensor, k: int, *, offset: int = 0, where: str | None = None
    ) -> list[Hit]:
        """Find the k images with the highest cosine to one (D,) unit vector; `offset` and `where` as of `search`.

        Raises:
            UsageError: a wrong condition, or numbers below zero.
        """
        if k < 0 or offset < 0:
            raise UsageError(f"k and offset count images; {k} and {offset} cannot be")
        allowed = None if where is None else self.store.where(where)
        found = self._find(as_array(vector), offset + k, allowed, where)
        rows = self.store.rows(found.places[offset:].tolist())
        return [
            Hit(score, row["id"], row["path"], row["texts"], {c: row[c] for c in self.store.metadata_columns})
            for score, row in zip(found.scores[offset:].tolist(), rows, strict=True)
        ]

    def _find(
        self, vector: NDArray[np.float32], depth: int, allowed: NDArray[np.bool_] | None, where: str | None
    ) -> Found:
        vectors, planes, kept = self.collection.vectors, self.collection.planes, self.collection.kept
        if self.exact or (planes is None and self.probes is None):
            return rank(vectors, vector, depth, None if allowed is None else np.flatnonzero(allowed))
        if self.probes is not None:
            first = rank(vectors, vector, FIRST, self.store.near(vector, CANDIDATES, self.probes, where))
        else:
            assert planes is not None, "one of the two is there"
            first = find(vectors, planes, vector, FIRST, kept, allowed)
        if depth <= len(first.places):
            return Found(first.places[:depth], first.scores[:depth])
        others = np.ones(len(vectors), bool) if allowed is None else allowed.copy()
        others[first.places] = False
        rest = rank(vectors, vector, depth - len(first.places), np.flatnonzero(others))
        return Found(np.concatenate([first.places, rest.places]), np.concatenate([first.scores, rest.scores]))


def search(
    model: LiT | WordReader,
    store: Store,
    query: str | None = None,
    *,
    image: ImageInput | None = None,
    k: int = 10,
    offset: int = 0,
    where: str | None = None,
) -> list[Hit]:
    """Search once; see `Searcher`, also for many queries."""
    return Searcher(model, store).search(query, image=image, k=k, offset=offset, where=where)
