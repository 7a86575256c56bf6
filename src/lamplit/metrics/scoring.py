"""From vectors to what was right: the arithmetic of an evaluation, on pure tensors.

Shapes: N images, M texts, D width, E entries of a class list, C classes (C = E unless a class has several entries).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamplit.metrics.ranking import best_entries, class_ranks, cosines, recall_curve, retrieval_ranks
from lamplit.metrics.results import Measure, measure

_SCORES_AT_ONCE = 2**22  # 16 MB: what fits a core's cache is the quickest
CURVE = 100  # how far a recall curve goes
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Answers:
    """What a classifier said to N images: `ranks` of the best right class, from 1 (of ties the first class wins)."""

    ranks: Tensor  # (N,) int64
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
        entries: unit vectors of what they are compared with, (E, D).
        labels: the right classes of each image, at least one.
        entry_class: class of each entry, where a class has several: its best entry counts.
        logit_multiplier: what cosines are multiplied by for the confidences.
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


def accuracies(answers: Answers, labels: Sequence[tuple[int, ...]], num_classes: int) -> dict[str, Measure]:
    """`accuracy@1`, `accuracy@5` and `mean_class_accuracy` (each class weighs the same), with their intervals."""
    right = answers.ranks == 1
    first = torch.tensor([label[0] for label in labels])
    counts = torch.bincount(first, minlength=num_classes)
    weights = len(first) / (counts[first] * (counts > 0).sum()).double()
    return {
        "accuracy@1": measure(right),
        "accuracy@5": measure(answers.ranks <= 5),
        "mean_class_accuracy": measure(right * weights),
    }


def per_class(answers: Answers, labels: Sequence[tuple[int, ...]], names: Sequence[str]) -> list[dict[str, object]]:
    """Images and accuracy of each class that has any; an image of several classes counts in its first."""
    first = torch.tensor([label[0] for label in labels])
    counts = torch.bincount(first, minlength=len(names)).tolist()
    right = torch.bincount(first[answers.ranks == 1], minlength=len(names)).tolist()
    return [
        {"name": name, "images": counts[i], "accuracy": right[i] / counts[i]}
        for i, name in enumerate(names)
        if counts[i]
    ]


def confusions(
    answers: Answers, labels: Sequence[tuple[int, ...]], *, most: int = 12
) -> list[tuple[int, int, list[int]]]:
    """What the worst classes are taken for most often: (class, wrong prediction, rows), the worst class first."""
    wrong: dict[int, Counter[int]] = {}
    rows: dict[tuple[int, int], list[int]] = {}
    totals = Counter(label[0] for label in labels)
    for row in (answers.ranks > 1).nonzero()[:, 0].tolist():
        label, predicted = labels[row][0], int(answers.predictions[row])
        wrong.setdefault(label, Counter())[predicted] += 1
        rows.setdefault((label, predicted), []).append(row)
    worst = sorted(wrong, key=lambda label: (-sum(wrong[label].values()) / totals[label], -totals[label], label))
    pairs = [(label, wrong[label].most_common(1)[0][0]) for label in worst[:most]]
    return [(label, predicted, rows[label, predicted]) for label, predicted in pairs]


def retrieval(
    zimg: Tensor, ztxt: Tensor, image_index: Tensor, text_index: Tensor
) -> tuple[dict[str, Measure], dict[str, list[float]]]:
    """Recall at 1, 5 and 10 and median rank, both ways, with intervals over the queries; and the curves of recall@k.

    Args:
        zimg: unit vectors of the distinct images, (N, D).
        ztxt: unit vectors of the texts, (M, D).
        image_index: the images of the true pairs, (L,).
        text_index: the texts of the true pairs, (L,).
    """
    directions = {
        "image_to_text": retrieval_ranks(zimg, ztxt, image_index, text_index),
        "text_to_image": retrieval_ranks(ztxt, zimg, text_index, image_index),
    }
    metrics: dict[str, Measure] = {}
    curves: dict[str, list[float]] = {}
    for direction, ranks in directions.items():
        ranks = ranks.cpu()
        metrics |= {f"{direction}/recall@{k}": measure(ranks <= k) for k in RECALL_AT}
        metrics[f"{direction}/median_rank"] = measure(ranks, statistic="median")
        curves[direction] = recall_curve(ranks, CURVE).tolist()
    return metrics, curves
