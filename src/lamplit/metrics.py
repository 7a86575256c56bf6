"""Retrieval and classification metrics: pure functions on tensors.

A tie counts against us. A rank is 1 plus the number of wrong answers that score *at least* as high as the
best right one, so a model that gives every answer the same score is last, not first; and a score that is not
a number is never good.

Shapes: Q queries, G gallery, N pictures, M texts, D width, C classes, L links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamplit.errors import UsageError

_SCORES_AT_ONCE = 2**24  # 64 MB


@dataclass(frozen=True)
class ClassScore:
    """How one class fares."""

    name: str
    pictures: int  # that have it
    precision: float | None  # of the pictures it was given to, how many have it; nothing where it was never given
    recall: float | None  # of the pictures that have it, how many it was given to; nothing without pictures
    mistaken_for: str | None = None  # what its missed pictures were called most often
    mistakes: int = 0  # how many of them


def retrieval_ranks(
    queries: Tensor,
    gallery: Tensor,
    query_index: Tensor,
    gallery_index: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Rank of each query's best right answer in the gallery, from 1.

    Args:
        queries: unit vectors, (Q, D).
        gallery: unit vectors, (G, D).
        query_index: which query each right answer belongs to, (L,); a query may have several.
        gallery_index: the right answers, (L,); one may be right for several queries.
        chunk_size: number of queries scored at once; by default what 64 MB of scores hold.

    Returns:
        The ranks, (Q,) integers.

    Raises:
        UsageError: if a query has no right answer, or an index is out of range.
    """
    query_index, gallery_index = query_index.to(queries.device), gallery_index.to(queries.device)
    _check_links(query_index, gallery_index, len(queries), len(gallery))
    order = query_index.argsort()
    query_index, gallery_index = query_index[order], gallery_index[order]
    chunk_size = chunk_size or max(1, _SCORES_AT_ONCE // len(gallery))
    ranks = []
    for start in range(0, len(queries), chunk_size):
        scores = queries[start : start + chunk_size] @ gallery.T
        bounds = torch.tensor([start, start + len(scores)], device=queries.device)
        first, last = torch.searchsorted(query_index, bounds).tolist()
        ranks.append(_best_ranks(scores, query_index[first:last] - start, gallery_index[first:last]))
    return torch.cat(ranks)


def _check_links(query_index: Tensor, gallery_index: Tensor, num_queries: int, num_gallery: int) -> None:
    for index, size in ((query_index, num_queries), (gallery_index, num_gallery)):
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise UsageError(f"a link points to {int(index.min())} or {int(index.max())}; there are {size} vectors")
    linked = torch.bincount(query_index, minlength=num_queries) > 0
    if not bool(linked.all()):
        first = int((~linked).nonzero()[0])
        raise UsageError(f"query {first} has no right answer in the gallery; leave it out or link it")


def _best_ranks(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rank of the best of the right answers (rows[l], columns[l]) in each row of scores."""
    right = scores[rows, columns]
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, rows, right, "amax")
    scores[rows, columns] = -torch.inf
    # "Not lower" instead of "at least as high": it also holds when one of the two is not a number.
    return (1 + (~(scores < best[:, None])).sum(1)).clamp(max=scores.shape[1])


def recall_at(ranks: Tensor, k: int) -> float:
    """Fraction of ranks that are at most k."""
    return float((ranks <= k).double().mean())


def median_rank(ranks: Tensor) -> float:
    """Middle rank, or the mean of the two middle ones."""
    middle = ranks.sort().values[[(len(ranks) - 1) // 2, len(ranks) // 2]]
    return float(middle.double().mean())


def retrieval_metrics(
    zimg: Tensor,
    ztxt: Tensor,
    picture_index: Tensor,
    text_index: Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at each k and median rank, both ways.

    Args:
        zimg: unit vectors of the distinct pictures, (N, D).
        ztxt: unit vectors of the distinct texts, (M, D).
        picture_index: the pictures of the true pairs, (L,); a picture may have several texts.
        text_index: the texts of the true pairs, (L,); a text may have several pictures.
        ks: how many answers are looked at.

    Returns:
        `image_to_text/recall@1` and so on, `image_to_text/median_rank`, and the same of `text_to_image`.

    Raises:
        UsageError: if a picture or a text is in no pair.
    """
    directions = {
        "image_to_text": retrieval_ranks(zimg, ztxt, picture_index, text_index),
        "text_to_image": retrieval_ranks(ztxt, zimg, text_index, picture_index),
    }
    metrics: dict[str, float] = {}
    for direction, ranks in directions.items():
        metrics |= {f"{direction}/recall@{k}": recall_at(ranks, k) for k in ks}
        metrics[f"{direction}/median_rank"] = median_rank(ranks)
    return metrics


def topk_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Fraction of examples whose class is among the k best.

    Args:
        scores: of every class, (N, C).
        labels: the right classes, (N,).
        ks: how many classes are looked at.

    Returns:
        `accuracy@1` and so on.
    """
    ranks = _best_ranks(scores.clone(), torch.arange(len(scores), device=scores.device), labels)
    return {f"accuracy@{k}": recall_at(ranks, k) for k in ks}


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Fraction of each class's examples that were predicted right.

    Args:
        predictions: predicted classes, (N,).
        labels: the right classes, (N,).
        num_classes: C.

    Returns:
        Accuracies, (C,) float64; not a number for a class without examples.
    """
    right = torch.bincount(labels[predictions == labels], minlength=num_classes)
    return right.double() / torch.bincount(labels, minlength=num_classes)


def class_scores(given: Tensor, truth: Tensor, names: Sequence[str]) -> list[ClassScore]:
    """Precision, recall and the most common mistake of every class.

    Args:
        given: the classes that each picture was given, (N, C) of bool; one, several or none.
        truth: those that it has, (N, C) of bool; one, several or none.
        names: of the classes, C.
    """
    missed, wrong = truth & ~given, given & ~truth
    # [i, j]: pictures of class i that were missed and called j, and behind the classes: called nothing at all.
    answers = torch.cat([wrong, ~given.any(1, keepdim=True)], dim=1)
    confused = missed.double().T @ answers.double()
    most = confused.max(1)
    right, asked, there = ((given & truth).sum(0).tolist(), given.sum(0).tolist(), truth.sum(0).tolist())
    called = [*names, "none of these"]
    return [
        ClassScore(
            name,
            there[i],
            right[i] / asked[i] if asked[i] else None,
            right[i] / there[i] if there[i] else None,
            called[int(most.indices[i])] if most.values[i] else None,
            int(most.values[i]),
        )
        for i, name in enumerate(names)
    ]
