"""Which contents a run has embedded, so that the tower sees equal bytes once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lamplit.data.sorted_keys import KeySet, keys_of
from lamplit.store.lance_store import Store


class Contents:
    """The contents of the images that a run has embedded; what is committed takes 24 bytes an image.

    Attributes:
        vectors: the (D,) vectors of those that are not committed yet, and of those that were just found, by hash.
    """

    def __init__(self) -> None:
        self.vectors: dict[str, Tensor] = {}
        self._committed = KeySet()

    def find(self, hashes: Sequence[str], store: Store | None) -> NDArray[np.bool_]:
        """Tell which of a batch's hashes, (B,), came before in the run or the batch; fetch vectors that are stored."""
        known = self._committed.has(keys_of(hashes))
        asked = [name for name, is_known in zip(hashes, known, strict=True) if is_known and name not in self.vectors]
        if asked and store is not None:
            self.vectors |= store.vectors_of_contents(asked)
        copies = np.zeros(len(hashes), bool)
        earlier: set[str] = set()
        for place, name in enumerate(hashes):
            copies[place] = name in earlier or name in self.vectors
            earlier.add(name)
        return copies

    def add(self, content_hash: str, vector: Tensor) -> None:
        """Keep the (D,) vector of an image."""
        self.vectors[content_hash] = vector

    def commit(self) -> None:
        """Forget the vectors: they are in the store."""
        self._committed.add(keys_of(self.vectors))
        self.vectors.clear()
