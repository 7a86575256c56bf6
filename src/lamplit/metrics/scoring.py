"""The arithmetic of an evaluation: from vectors to right and wrong answers, on pure tensors.

Shapes: N images, M texts, D width, E entries of a class list, C classes (C = E unless a class has several entries).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamplit.metrics.bootstrap import interval, measure, measure_class_mean, measure_clustered_median, resample_ratios
from lamplit.metrics.ranking import (
    RECALL_AT,
    PairRanks,
    best_entries,
    class_ranks,
    cosines,
    rank_pairs,
    recall_curve,
    summarize_ranks,
)
from lamplit.metrics.results import Measure

_SCORES_AT_ONCE = 2**22  # 32 MB of float64
CURVE = 100  # largest k of a recall curve


@dataclass(frozen=True)
class Answers:
    """The answers of a classifier to N images."""

    ranks: Tensor  # (N,) int64, rank of the best right class, from 1; if classes tie, the first wins
    predictions: Tensor  # (N,) int64, the best class
    confidences: Tensor  # (N,) its softmax probability


def answer(
    zimg: Tensor,
    entries: Tensor,
    labels: Sequence[tuple[int, ...]],
    *,
    entry_class: Sequence[int] | None = None,
    logit_multiplier: float = 1.0,
) -> Answers:
    """Classify N images by E entries.

    Args:
        zimg: unit vectors of the images, (N, D).
        entries: unit vectors of the classes' entries, (E, D).
        labels: the right classes of each image, at least one.
        entry_class: class of each entry, if a class has several entries (its best one counts); None if each has one.
        logit_multiplier: multiplies cosines before the softmax of the confidences.
    """
    owners = None if entry_class is None else torch.tensor(entry_class)
    right = nn.utils.rnn.pad_sequence([torch.tensor(each) for each in labels], batch_first=True, padding_value=-1)
    size = max(1, _SCORES_AT_ONCE // len(entries))
    parts = [_answer_some(zimg[i : i + size], entries, right[i : i + size], owners, logit_multiplier)
             for i in range(0, len(zimg), size)]  # fmt: skip
    return Answers(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _answer_some(
    zimg: Tensor, entries: Tensor, right: Tensor, owners: Tensor | None, logit_multiplier: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = cosines(zimg, entries)
    if owners is not None:
        scores = best_entries(scores, owners)
    highest, predictions = scores.max(1)
    confidences = 1 / ((scores - highest[:, None]) * logit_multiplier).exp().sum(1)
    return class_ranks(scores, right), predictions, confidences


def accuracies(answers: Answers, labels: Sequence[tuple[int, ...]]) -> dict[str, Measure]:
    """Return `accuracy@1`, `accuracy@5` and `mean_class_accuracy`, which weighs each class the same.

    An image of several classes counts in its first.

    Args:
        answers: what the classifier said to N images.
        labels: the right classes of each.
    """
    right = answers.ranks == 1
    return {
        "accuracy@1": measure(right),
        "accuracy@5": measure(answers.ranks <= 5),
        "mean_class_accuracy": measure_class_mean(right, [label[0] for label in labels]),
    }


def per_class(answers: Answers, labels: Sequence[tuple[int, ...]], names: Sequence[str]) -> list[dict[str, object]]:
    """Return images and accuracy of each class that has images; an image of several classes counts in its first."""
    first = torch.tensor([label[0] for label in labels])
    counts = torch.bincount(first, minlength=len(names)).tolist()
    right = torch.bincount(first[answers.ranks == 1], minlength=len(names)).tolist()
    return [
        {"name": name, "images": counts[i], "accuracy": right[i] / counts[i]}
        for i, name in enumerate(names)
        if counts[i]
    ]


def confusions(
    answers: Answers, labels: Sequence[tuple[int, ...]], *, max_classes: int = 12
) -> list[tuple[int, int, list[int]]]:
    """Return what the worst classes are mistaken for most often: (class, prediction, rows), the worst class first."""
    wrong: dict[int, Counter[int]] = {}
    rows: dict[tuple[int, int], list[int]] = {}
    totals = Counter(label[0] for label in labels)
    for row in (answers.ranks > 1).nonzero()[:, 0].tolist():
        label, predicted = labels[row][0], int(answers.predictions[row])
        wrong.setdefault(label, Counter())[predicted] += 1
        rows.setdefault((label, predicted), []).append(row)
    worst = sorted(wrong, key=lambda label: (-sum(wrong[label].values()) / totals[label], -totals[label], label))
    pairs = [(label, wrong[label].most_common(1)[0][0]) for label in worst[:max_classes]]
    return [(label, predicted, rows[label, predicted]) for label, predicted in pairs]


def retrieval(
    zimg: Tensor, ztxt: Tensor, image_index: Tensor, text_index: Tensor
) -> tuple[dict[str, Measure], dict[str, list[float]]]:
    """Return recall at 1, 5 and 10 and median rank in both directions, their mean, and the curves of recall@k.

    Args:
        zimg: unit vectors of the distinct images, (N, D).
        ztxt: unit vectors of the texts, (M, D).
        image_index: the images of the true pairs, (L,).
        text_index: the texts of the true pairs, (L,).

    Returns:
        The metrics of `retrieval_metrics` with their intervals; and recall@1, @2, ... of each direction.
    """
    found = rank_pairs(zimg, ztxt, image_index, text_index)
    ranks = PairRanks(found.image_to_text.cpu(), found.text_to_image.cpu())
    curves = {direction: recall_curve(each, CURVE).tolist() for direction, each in ranks.directions().items()}
    return measure_ranks(ranks, image_index, text_index), curves


def measure_ranks(ranks: PairRanks, image_index: Tensor, text_index: Tensor) -> dict[str, Measure]:
    """Return `summarize_ranks` with intervals, for which images are drawn again, each with its captions.

    A caption of several images goes with the first of them.

    Args:
        ranks: of N images and M texts.
        image_index: the images of the true pairs, (L,).
        text_index: the texts of the true pairs, (L,).
    """
    num_images, num_texts = len(ranks.image_to_text), len(ranks.text_to_image)
    owners = torch.full((num_texts,), num_images).scatter_reduce(0, text_index.cpu(), image_index.cpu(), "amin")
    hits = [(each[:, None] <= torch.tensor(RECALL_AT)).double() for each in ranks.directions().values()]
    of_captions = torch.zeros(num_images, len(RECALL_AT), dtype=torch.double).index_add(0, owners, hits[1])
    captions = torch.bincount(owners, minlength=num_images)[:, None].expand(-1, len(RECALL_AT)).double()
    sums, counts = torch.cat([hits[0], of_captions], 1), torch.cat([torch.ones_like(hits[0]), captions], 1)
    _, draws = resample_ratios(sums.numpy(), counts.numpy())
    values = summarize_ranks(ranks)
    recalls = [f"{direction}/recall@{k}" for direction in ranks.directions() for k in RECALL_AT]
    measures = {name: interval(values[name], draws[:, i]) for i, name in enumerate(recalls)}
    measures["mean_recall"] = interval(values["mean_recall"], draws.mean(1))
    measures["image_to_text/median_rank"] = measure(ranks.image_to_text, statistic="median")
    measures["text_to_image/median_rank"] = measure_clustered_median(ranks.text_to_image, owners, num_images)
    return {name: measures[name] for name in values}
