"""Retrieval and classification metrics: pure functions on tensors.

A tie counts against the model in retrieval. A rank is 1 plus the number of wrong answers that score *at least* as high
as the best right one, so a model that gives every answer the same score is last, not first; and NaN is never good.

Cosines are exact (`cosines`), so that neither the number computed at once nor the machine changes a rank, and equal
texts tie in any row.

Shapes: Q queries, G gallery, N images, M texts, D width, C classes, E entries, L links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamplit.errors import UsageError

RECALL_AT = (1, 5, 10)
_GRID = 2.0**26
# A tile of scores, 8 MB, stays in a cache: it is faster than one that does not, and a gallery of any length fits.
_QUERIES_AT_ONCE, _GALLERY_AT_ONCE = 256, 4096
_LINKS_AT_ONCE = 8192


def cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """Return the cosine of every query and gallery vector, the same to the last bit in any order on any machine.

    The vectors are rounded to multiples of 2^-26 (float32 has no finer ones from 1/8 on; it moves a cosine by 1e-8).
    Then every product, and every sum of products, is a multiple of 2^-52 below 2, which float64 holds: nothing more is
    rounded. A product of matrices in float32 has other last digits for other numbers of rows; if two texts are equal,
    these would decide which is first.

    Args:
        queries: unit vectors, (Q, D), of any floating type.
        gallery: unit vectors, (G, D).

    Returns:
        (Q, G) float64, on the queries' device, or on the CPU if that device has no float64 (Apple's MPS).

    Raises:
        UsageError: if a vector is not of unit length.
    """
    _check_unit(queries)
    _check_unit(gallery)
    return _on_grid(queries) @ _on_grid(gallery).T


def _check_unit(vectors: Tensor) -> None:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=dtype)
    if bool((lengths > 1.4).any()):  # beyond its square, 2, sums need a rounding; NaN passes
        raise UsageError(
            f"a vector has length {float(lengths.max()):.3g}; expected unit vectors (divide by the length)"
        )


def _on_grid(vectors: Tensor) -> Tensor:
    device = "cpu" if vectors.device.type == "mps" else vectors.device
    return (vectors.to(device).double() * _GRID).round() / _GRID


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and the most common mistake of one class.

    Attributes:
        name: of the class.
        images: number of images that have the class.
        precision: TP / (TP + FP), 0 to 1; None if the class was never predicted.
        recall: TP / (TP + FN), 0 to 1; None if no image has the class.
        mistaken_for: the most common prediction for images of the class that were missed.
        mistakes: number of images with that prediction.
    """

    name: str
    images: int
    precision: float | None
    recall: float | None
    mistaken_for: str | None = None
    mistakes: int = 0


def retrieval_ranks(
    queries: Tensor,
    gallery: Tensor,
    query_index: Tensor,
    gallery_index: Tensor,
    *,
    chunk_size: int = _QUERIES_AT_ONCE,
) -> Tensor:
    """Return the rank of each query's best right answer in the gallery, from 1.

    Beside the vectors it needs some 30 MB, and 300 bytes for each query: a million queries each way fit.

    Args:
        queries: unit vectors, (Q, D).
        gallery: unit vectors, (G, D).
        query_index: which query each right answer belongs to, (L,); a query may have several.
        gallery_index: the right answers, (L,); one may be right for several queries.
        chunk_size: number of queries scored at once; it does not change a rank.

    Returns:
        The ranks, (Q,) integers.

    Raises:
        UsageError: if a query has no right answer, an index is out of range, or a vector is not of unit length.
    """
    query_index, gallery_index = query_index.to(queries.device), gallery_index.to(queries.device)
    _check_links(query_index, gallery_index, len(queries), len(gallery))
    _check_unit(queries)
    _check_unit(gallery)
    links = torch.unique(query_index * len(gallery) + gallery_index)  # a link that comes twice counts once
    rows, columns = links // len(gallery), links % len(gallery)
    right = torch.cat([
        (_on_grid(queries[some]) * _on_grid(gallery[answers])).sum(1)
        for some, answers in zip(torch.split(rows, _LINKS_AT_ONCE), torch.split(columns, _LINKS_AT_ONCE), strict=True)
    ])  # fmt: skip
    rows = rows.to(right.device)
    best = right.new_full((len(queries),), -torch.inf).scatter_reduce(0, rows, right, "amax")
    counts = torch.cat([
        _count_not_lower(chunk, gallery, bound)
        for chunk, bound in zip(torch.split(queries, chunk_size), torch.split(best, chunk_size), strict=True)
    ])  # fmt: skip
    # An answer that ties with the best right one but is right itself does not count against it.
    own = torch.bincount(rows[~(right < best[rows])], minlength=len(queries))
    return (1 + counts - own).to(queries.device)


def _count_not_lower(queries: Tensor, gallery: Tensor, bound: Tensor) -> Tensor:
    queries = _on_grid(queries)
    counts = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    for tile in torch.split(gallery, _GALLERY_AT_ONCE):
        # "Not lower" instead of "at least as high": it also holds if one of the two is NaN.
        lower = (queries @ _on_grid(tile).T < bound[:, None]).sum(1, dtype=torch.int32)
        counts += len(tile) - lower
    return counts


def _check_links(query_index: Tensor, gallery_index: Tensor, num_queries: int, num_gallery: int) -> None:
    for index, size in ((query_index, num_queries), (gallery_index, num_gallery)):
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise UsageError(f"a link points to {int(index.min())} or {int(index.max())}; there are {size} vectors")
    linked = torch.bincount(query_index, minlength=num_queries) > 0
    if not bool(linked.all()):
        first = int((~linked).nonzero()[0])
        raise UsageError(f"query {first} has no right answer in the gallery; leave it out or link it")


def recall_at(ranks: Tensor, k: int) -> float:
    """Return the fraction of ranks that are at most k."""
    return float((ranks <= k).double().mean())


def recall_curve(ranks: Tensor, max_k: int = 100) -> Tensor:
    """Return recall at 1, 2 and so on up to `max_k`: (max_k,) float64."""
    counts = torch.bincount(ranks.clamp(max=max_k + 1), minlength=max_k + 2)
    return counts[1 : max_k + 1].cumsum(0).double() / len(ranks)


def median_rank(ranks: Tensor) -> float:
    """Return the middle rank, or the mean of the two middle ones."""
    middle = ranks.sort().values[[(len(ranks) - 1) // 2, len(ranks) // 2]]
    return float(middle.double().mean())


@dataclass(frozen=True)
class PairRanks:
    """Rank of the best right answer, from 1, of every query in both directions of retrieval."""

    image_to_text: Tensor  # (N,), a text for each image
    text_to_image: Tensor  # (M,), an image for each text

    def directions(self) -> dict[str, Tensor]:
        """Name the two directions as metrics do."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}


def rank_pairs(zimg: Tensor, ztxt: Tensor, image_index: Tensor, text_index: Tensor) -> PairRanks:
    """Rank the right answers in both directions.

    Args:
        zimg: unit vectors of the distinct images, (N, D).
        ztxt: unit vectors of the distinct texts, (M, D).
        image_index: the images of the true pairs, (L,); an image may have several texts.
        text_index: the texts of the true pairs, (L,); a text may have several images.

    Raises:
        UsageError: if an image or a text is in no pair.
    """
    return PairRanks(
        retrieval_ranks(zimg, ztxt, image_index, text_index), retrieval_ranks(ztxt, zimg, text_index, image_index)
    )


def retrieval_metrics(
    zimg: Tensor,
    ztxt: Tensor,
    image_index: Tensor,
    text_index: Tensor,
    ks: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """Return recall at each k and median rank in both directions, and the mean of the recalls.

    Args:
        zimg: unit vectors of the distinct images, (N, D).
        ztxt: unit vectors of the distinct texts, (M, D).
        image_index: the images of the true pairs, (L,); an image may have several texts.
        text_index: the texts of the true pairs, (L,); a text may have several images.
        ks: how many answers are looked at.

    Returns:
        `image_to_text/recall@1` and so on, `image_to_text/median_rank`, the same of `text_to_image`, and
        `mean_recall`, the mean of all recalls.

    Raises:
        UsageError: if an image or a text is in no pair.
    """
    return summarize_ranks(rank_pairs(zimg, ztxt, image_index, text_index), ks)


def summarize_ranks(ranks: PairRanks, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Return what `retrieval_metrics` does, from ranks that are known."""
    metrics: dict[str, float] = {}
    for direction, found in ranks.directions().items():
        metrics |= {f"{direction}/recall@{k}": recall_at(found, k) for k in ks}
        metrics[f"{direction}/median_rank"] = median_rank(found)
    recalls = [value for name, value in metrics.items() if "/recall@" in name]
    return metrics | {"mean_recall": sum(recalls) / len(recalls)}


def best_entries(scores: Tensor, entry_class: Tensor) -> Tensor:
    """Return the score of each class, that of its best entry.

    Args:
        scores: score of every entry, (N, E).
        entry_class: the class of each entry, (E,); every class from 0 to the highest has one.

    Returns:
        (N, C).

    Raises:
        UsageError: if a class has no entry, or the numbers of entries differ.
    """
    if len(entry_class) != scores.shape[1]:
        raise UsageError(f"there are scores of {scores.shape[1]} entries and classes of {len(entry_class)}")
    missing = (torch.bincount(entry_class) == 0).nonzero()
    if len(missing):
        raise UsageError(f"class {int(missing[0])} has no entry, so it can never be right")
    entry_class = entry_class.to(scores.device)
    bottom = scores.new_full((len(scores), int(entry_class.max()) + 1), -torch.inf)
    return bottom.scatter_reduce(1, entry_class.expand_as(scores), scores, "amax")


def class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each image's best right class, from 1.

    If classes tie, the first is the answer, as with `argmax` and so in every published figure: two pairs of CLIP's
    names for ImageNet are the same word.

    Args:
        scores: score of every class, (N, C).
        labels: the right class of each image, (N,), or several, (N, L), filled up with -1.

    Returns:
        The ranks, (N,) integers.

    Raises:
        UsageError: if an image has no right class, or one that does not exist.
    """
    count, classes = scores.shape
    labels = (labels if labels.ndim == 2 else labels[:, None]).to(scores.device)
    if bool(((labels < -1) | (labels >= classes)).any()):
        raise UsageError(f"labels go from {int(labels.min())} to {int(labels.max())}; there are {classes} classes")
    missing = (labels < 0).all(1).nonzero()
    if len(missing):
        raise UsageError(f"image {int(missing[0])} has no right class; leave it out")
    right = torch.zeros(count, classes + 1, dtype=torch.bool, device=scores.device)
    right = right.scatter(1, labels % (classes + 1), True)[:, :classes]  # -1 is the column that is cut off
    best = scores.masked_fill(~right, -torch.inf).amax(1)
    first = (right & (scores == best[:, None])).int().argmax(1)
    ahead = (scores == best[:, None]) & (torch.arange(classes, device=scores.device) < first[:, None])
    # "Not at most" instead of "higher": NaN is never good.
    return 1 + ((~(scores <= best[:, None]) | ahead) & ~right).sum(1)


def class_scores(given: Tensor, truth: Tensor, names: Sequence[str]) -> list[ClassScore]:
    """Return precision, recall and the most common mistake of every class.

    Args:
        given: the classes that each image was given, (N, C) of bool; one, several or none.
        truth: the classes that it has, (N, C) of bool; one, several or none.
        names: names of the C classes.
    """
    missed, wrong = truth & ~given, given & ~truth
    # [i, j]: images of class i that were missed and called j, and behind the classes: called nothing at all.
    answers = torch.cat([wrong, ~given.any(1, keepdim=True)], dim=1)
    confused = missed.double().T @ answers.double()
    most = confused.max(1)
    right, predicted, total = ((given & truth).sum(0).tolist(), given.sum(0).tolist(), truth.sum(0).tolist())
    called = [*names, "none of these"]
    return [
        ClassScore(
            name,
            total[i],
            right[i] / predicted[i] if predicted[i] else None,
            right[i] / total[i] if total[i] else None,
            called[int(most.indices[i])] if most.values[i] else None,
            int(most.values[i]),
        )
        for i, name in enumerate(names)
    ]
