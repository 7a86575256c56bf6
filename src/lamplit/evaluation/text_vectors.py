"""Vectors of texts on disk: no prompt is encoded twice by the same text tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lamplit.data.places.image_files import is_lance
from lamplit.errors import StoreError
from lamplit.evaluation.model_metadata import require_text_tower, text_fingerprint
from lamplit.model import LiT
from lamplit.store.table.table_opening import open_table
from lamplit.store.table.table_writing import StoreExistsError, append_batches, create_table


class TextVectors:
    """Encodes texts as `LiT.encode_texts` does, each only once: known vectors are read from a Lance table.

    Two processes may write at the same time: each commit is whole, and a text that comes twice has the same vector.

    Args:
        model: a model with its text tower.
        folder: where the table is kept, one for each text tower.
    """

    def __init__(self, model: LiT, folder: Path) -> None:
        self.model = model
        self.fingerprint = text_fingerprint(require_text_tower(model))
        self.path = folder / f"{self.fingerprint}.lance"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """M texts in, (M, D) float32 unit vectors out.

        Raises:
            StoreError: the table cannot be read, or not be written.
        """
        table = self._open()
        known = _places(table)
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            table = self._append(new, self.model.encode_texts(new))
            known = _places(table)
        rows = [known[text] for text in texts]
        column = table.take(rows, columns=["vector"])["vector"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return torch.from_numpy(flat.reshape(len(texts), -1)).to(self.model.device)

    def _open(self) -> Any:
        """Return the table; None if there is none yet, whatever a process that was killed has left."""
        if not is_lance(self.path):
            return None
        table = open_table(self.path)
        if table is None:
            raise StoreError(f"{self.path} cannot be read; delete it, and its texts are encoded again")
        return table

    def _append(self, texts: Sequence[str], vectors: Tensor) -> Any:
        """Add texts to the table, or make it of them, and return it; another process may do the same meanwhile."""
        flat = pa.array(vectors.cpu().numpy().reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        new = pa.table({"text": pa.array(texts, pa.string()), "vector": column})
        table = self._open()
        if table is None:
            try:
                create_table(str(self.path), new.schema, new.to_batches())
            except StoreExistsError:  # another process has just made it
                table = self._open()
        if table is not None:
            append_batches(table, new.to_batches())
        return self._open()


def _places(table: Any) -> dict[str, int]:
    """Return the row of each text in the table; none if there is no table."""
    if table is None:
        return {}
    return {text: row for row, text in enumerate(table.to_table(columns=["text"])["text"].to_pylist())}
