"""Split the pairs of a store into those that are tuned on and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamplit.data.pairs import held_out
from lamplit.errors import UsageError
from lamplit.metrics.ranking import retrieval_metrics
from lamplit.store.lance_store import Store

MAX_HELD_OUT = 5000  # distinct captions; more would only make every evaluation slower


@dataclass(frozen=True)
class Links:
    """Images and texts with the true pairs between them: pair l is (image_index[l], text_index[l])."""

    texts: list[str]  # M distinct texts
    image_index: Tensor  # (L,) rows of the store
    text_index: Tensor  # (L,) indices into texts

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.image_index)


def link(rows: Sequence[int], texts: Sequence[Sequence[str]]) -> Links:
    """Link rows of a store to their texts; texts that differ only in case are one."""
    index_of: dict[str, int] = {}
    distinct: list[str] = []
    images: list[int] = []
    indices: list[int] = []
    for row, row_texts in zip(rows, texts, strict=True):
        for text in row_texts:
            key = text.casefold()
            if key not in index_of:
                index_of[key] = len(distinct)
                distinct.append(text)
            images.append(row)
            indices.append(index_of[key])
    return Links(distinct, torch.tensor(images, dtype=torch.long), torch.tensor(indices, dtype=torch.long))


def split_store(store: Store, text_column: str, fraction: float, seed: int) -> tuple[Links, Links]:
    """Split the pairs of a store by caption: return the pairs to tune on, and the held-out ones.

    An image is held out if its first text is; no text of a held-out image is tuned on, under any image.

    Raises:
        UsageError: fewer than two pairs are left to tune on.
    """
    texts = store.texts(text_column)
    rows = [row for row, row_texts in enumerate(texts) if row_texts]
    first = [texts[row][0] for row in rows]
    distinct = len({text.casefold() for text in first})
    part = min(fraction, MAX_HELD_OUT / distinct) if distinct else 0.0
    mask = held_out(first, part, seed).tolist()
    kept = [row for row, out in zip(rows, mask, strict=True) if out]
    unseen = {text.casefold() for row in kept for text in texts[row]}
    train_rows = [row for row, out in zip(rows, mask, strict=True) if not out]
    train = [[text for text in texts[row] if text.casefold() not in unseen] for row in train_rows]
    links = link(train_rows, train)
    if len(links) < 2:
        raise UsageError(
            f"{store.path} has {len(links)} pairs to tune on in column {text_column!r} "
            f"({len(rows)} of {len(texts)} images have a text there); tuning compares pairs, so give at least 2"
        )
    return links, link(kept, [texts[row] for row in kept])


def held_out_recall(zimg: Tensor, ztxt: Tensor, links: Links) -> dict[str, float]:
    """Measure recall both ways on linked pairs, and its mean (`mean_recall`), which decides the best model.

    Args:
        zimg: unit vectors of all rows of the store, (N, D).
        ztxt: unit vectors of the linked texts, (M, D).
        links: the true pairs.
    """
    rows, image_index = torch.unique(links.image_index, return_inverse=True)
    metrics = retrieval_metrics(zimg[rows].to(ztxt.device), ztxt, image_index, links.text_index)
    recalls = [value for name, value in metrics.items() if "recall@" in name]
    return metrics | {"mean_recall": sum(recalls) / len(recalls)}
