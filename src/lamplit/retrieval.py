"""Search a store by words or by a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lance
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

    def search(
        self,
        query: str | None = None,
        *,
        image: Picture | None = None,
        k: int = 10,
        offset: int = 0,
        where: str | None = None,
    ) -> list[Hit]:
        """Find the k pictures nearest to words, or to a picture, after the `offset` nearest ones.

        Raises:
            UsageError: neither or both are given, or `where` cannot be read.
            ImageError: the picture cannot be used.
        """
        if query is not None and image is None:
            [vector] = self.model.encode_texts([query])
        elif image is not None and query is None:
            [vector] = self.model.encode_images([image])
        else:
            raise UsageError("search takes words or a picture, one of them")
        return self.nearest(vector, k, offset=offset, where=where)

    def nearest(self, vector: Tensor, k: int, *, offset: int = 0, where: str | None = None) -> list[Hit]:
        """Find the k pictures with the highest cosine to one (D,) unit vector, among those that `where` allows.

        Raises:
            UsageError: `where` cannot be read.
        """
        scores = self.zimg @ vector
        places = torch.arange(len(scores)) if where is None else torch.tensor(self._places(where), dtype=torch.long)
        best = torch.topk(scores[places], min(offset + k, len(places)))
        rows = self.store.rows(places[best.indices[offset:]].tolist())
        return [
            Hit(score, row["id"], row["path"], row["texts"], {c: row[c] for c in self.store.metadata_columns})
            for score, row in zip(best.values[offset:].tolist(), rows, strict=True)
        ]

    def _places(self, where: str) -> list[int]:
        try:
            table = lance.dataset(self.store.path).to_table(columns=["id"], filter=where)
        except (ValueError, OSError, RuntimeError) as error:  # Lance panics at what it has not planned for
            raise UsageError(f"the condition {where!r} cannot be read; expected such as: size = 'small'") from error
        allowed = set(table["id"].to_pylist())
        return [place for place, name in enumerate(self.store.column("id")) if name in allowed]


def search(
    model: LiT, store: Store, query: str | None = None, *, image: Picture | None = None, k: int = 10
) -> list[Hit]:
    """Search once; see `Searcher` for many queries."""
    return Searcher(model, store).search(query, image=image, k=k)
