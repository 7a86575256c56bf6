"""Vectors of texts on disk: no prompt is encoded twice by the same text tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lamplit.evaluation.model_metadata import require_text_tower, text_fingerprint
from lamplit.model import LiT


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
        """M texts in, (M, D) float32 unit vectors out."""
        known = self._known()
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            self._append(new, self.model.encode_texts(new))
            known = self._known()
        table = lance.dataset(str(self.path))
        rows = [known[text] for text in texts]
        column = table.take(rows, columns=["vector"])["vector"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return torch.from_numpy(flat.reshape(len(texts), -1)).to(self.model.device)

    def _known(self) -> dict[str, int]:
        if not self.path.exists():
            return {}
        texts = lance.dataset(str(self.path)).to_table(columns=["text"])["text"].to_pylist()
        return {text: row for row, text in enumerate(texts)}

    def _append(self, texts: Sequence[str], vectors: Tensor) -> None:
        flat = pa.array(vectors.cpu().numpy().reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        table = pa.table({"text": pa.array(texts, pa.string()), "vector": column})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lance.write_dataset(table, str(self.path), mode="append" if self.path.exists() else "create")
