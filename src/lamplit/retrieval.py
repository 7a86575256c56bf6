"""Search a store by words or by a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamplit.errors import UsageError
from lamplit.model import LiT, Picture
from lamplit.store import Store


@dataclass(frozen=True)
class Hit:
    """One picture that was found."""

    score: float  # cosine of query and picture
    id: str
    path: str
    texts: list[str]
    metadata: dict[str, Any]


class Searcher:
    """An open store with the model that reads it; every query after the first costs one product.

    Raises:
        StoreError: the store was embedded by another tower than the model reads.
    """

    def __init__(self, model: LiT, store: Store) -> None:
        self.model = model
        self.store = store
        self.zimg = model.read_store(store)

    def search(self, query: str | None = None, *, image: Picture | None = None, k: int = 10) -> list[Hit]:
        """Find the k pictures nearest to words, or to a picture.

        Raises:
            UsageError: neither or both are given.
            ImageError: the picture cannot be used.
        """
        if query is not None and image is None:
            [vector] = self.model.encode_texts([query])
        elif image is not None and query is None:
            [vector] = self.model.encode_images([image])
        else:
            raise UsageError("search takes words or a picture, one of them")
        return self.nearest(vector, k)

    def nearest(self, vector: Tensor, k: int) -> list[Hit]:
        """Find the k pictures with the highest cosine to one (D,) unit vector."""
        best = torch.topk(self.zimg @ vector, min(k, len(self.zimg)))
        rows = self.store.rows(best.indices.tolist())
        return [
            Hit(score, row["id"], row["path"], row["texts"], {c: row[c] for c in self.store.metadata_columns})
            for score, row in zip(best.values.tolist(), rows, strict=True)
        ]


def search(
    model: LiT, store: Store, query: str | None = None, *, image: Picture | None = None, k: int = 10
) -> list[Hit]:
    """Search once; see `Searcher` for many queries."""
    return Searcher(model, store).search(query, image=image, k=k)
