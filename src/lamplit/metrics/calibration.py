"""How far a model's probabilities can be believed, and where its answers should end: pure functions on tensors.

Shapes: N images, C classes, D width. Cosines and labels come from a labelled sample; what is fitted to it should be
measured on images that it was not fitted to (`halves`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_SCALE, LARGEST_SCALE = 1e-2, 1e4
_BISECTIONS = 60  # of the logarithm of the scale: to the last digits of a float64
_HAIR = 1e-6  # the rounding of a cosine must not decide at a threshold
KEPT = 0.95  # of right answers, where nothing says what else may come
_FEWEST_OF_CLASS = 5  # images that a threshold of a class's own takes


def reliability_bins(confidences: Tensor, right: Tensor, bins: int = 15) -> list[dict[str, float]]:
    """Sort answers by confidence into bins of equal width, (0, 1/bins] and so on.

    Args:
        confidences: probability of each answer, (N,), 0 to 1.
        right: whether it was right, (N,) of bool.
        bins: how many; 15 as in Guo et al. (2017).

    Returns:
        Mean `confidence`, `accuracy` and number of `images` of every bin that is not empty, lowest first.
    """
    confidences, right = confidences.double().flatten(), right.double().flatten()
    index = (confidences * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(index, minlength=bins)
    confidence = torch.bincount(index, confidences, minlength=bins) / counts
    accuracy = torch.bincount(index, right, minlength=bins) / counts
    return [
        {"confidence": float(confidence[i]), "accuracy": float(accuracy[i]), "images": int(counts[i])}
        for i in range(bins)
        if counts[i]
    ]


def expected_calibration_error(confidences: Tensor, right: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over `reliability_bins`, each weighted by its images.

    It is 0 where, of the answers of which the model is 80 % sure, 80 % are right. Few images in a bin are off by
    chance, so that a small sample shows more error than there is. Not a number without any answer.
    """
    found = reliability_bins(confidences, right, bins)
    gaps = sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in found)
    return gaps / confidences.numel() if confidences.numel() else float("nan")


def halves(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Cut `count` images into two halves at random: (fit on, measure on) one way and the other."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first, second = order[: count // 2], order[count // 2 :]
    return [(first, second), (second, first)]


def fit_temperature(cosines: Tensor, labels: Tensor) -> float:
    """Find the logit scale (inverse temperature) under which the sample's right classes are most likely.

    The negative log-likelihood is convex in the scale, so its slope is bisected. A sample without a mistake would ask
    for an endless scale; as in Platt's method, the labels are taken as if one more image of unknown class had been
    seen, which keeps the scale finite and counts for less the more images there are.

    Args:
        cosines: of images and classes, (N, C).
        labels: the right classes, (N,).

    Returns:
        A scale between `SMALLEST_SCALE` (also where the cosines are no better than chance, or there is one class
        alone, whose probability is always 1) and `LARGEST_SCALE`.
    """
    cosines = cosines.double()
    surely = len(labels) / (len(labels) + 1)
    right = cosines.gather(1, labels[:, None]).mean()
    wanted = surely * right + (1 - surely) * cosines.mean()
    low, high = torch.tensor([SMALLEST_SCALE, LARGEST_SCALE], dtype=torch.float64).log()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        expected = ((middle.exp() * cosines).softmax(1) * cosines).sum(1).mean()
        low, high = (middle, high) if expected < wanted else (low, middle)
    return float(low.exp())


def fit_sigmoid(cosines: Tensor, truth: Tensor) -> tuple[float, float]:
    """Find the scale and bias of multi-label classes, one pair for all classes: sigmoid(scale × cosine + bias).

    This is Platt's method (1999), a logistic regression on one number.

    Args:
        cosines: of images and classes, (N, C).
        truth: whether the image has the class, (N, C) of bool.

    Returns:
        Scale, between the same bounds as that of `fit_temperature`, and bias.
    """
    scores, truth = cosines.double().flatten(), truth.flatten()
    positives, negatives = int(truth.sum()), int((~truth).sum())
    # Platt's targets: as if one more of each kind had been seen, so that perfect separation has a finite answer.
    targets = torch.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    middle, spread = scores.mean(), scores.std(correction=0).clamp(min=1e-9)
    scores = (scores - middle) / spread
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(parameters[0] * scores + parameters[1], targets)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    slope, offset = parameters.detach()
    scale = float((slope / spread).clamp(SMALLEST_SCALE, LARGEST_SCALE))
    if scale == SMALLEST_SCALE:  # cosines say nothing: every probability is the share of labels that are given
        return scale, float(torch.logit(targets.mean())) - scale * float(middle)
    return scale, float(offset - slope * middle / spread)


def keeping_threshold(cosines: Tensor, keep_rate: float = KEPT) -> float:
    """Largest threshold that at least `keep_rate` of these cosines, (N,), reach; as low as can be without any."""
    if not len(cosines):
        return -1.0
    return float(cosines.double().sort().values[int((1 - keep_rate) * len(cosines) + 1e-9)]) - _HAIR


def balanced_accuracy(given: Tensor, missed: Tensor, wrong: Tensor, refused: Tensor) -> Tensor:
    """Mean of two shares: of what should be given, that is; of what should not be, that is not."""
    return (given / (given + missed) + refused / (refused + wrong)) / 2


def f1(given: Tensor, missed: Tensor, wrong: Tensor, refused: Tensor) -> Tensor:
    """Harmonic mean of precision and recall."""
    return 2 * given / (2 * given + missed + wrong)


def best_threshold(cosines: Tensor, truth: Tensor, gain: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> float:
    """Threshold with the largest gain, half-way between two neighbouring cosines; of equal ones the lowest.

    Args:
        cosines: (N,), at least one of each truth.
        truth: whether the answer should be given, (N,) of bool.
        gain: of the numbers that are rightly given, missed, wrongly given and rightly refused.
    """
    order = cosines.double().sort(descending=True)
    right = truth[order.indices].double().cumsum(0)
    wrong = (~truth[order.indices]).double().cumsum(0)
    value = gain(right, right[-1] - right, wrong, wrong[-1] - wrong)
    following = torch.cat([order.values[1:], order.values[-1:] - 2 * _HAIR])
    value[order.values == following] = -torch.inf  # nothing can tell these two apart
    best = len(value) - 1 - int(value.flip(0).argmax())
    return float((order.values[best] + following[best]) / 2)


def none_threshold(best: Tensor, right: Tensor, stranger: Tensor, keep_rate: float | None = None) -> float:
    """Lowest cosine of the best class at which it is an answer; below it the answer is "none of these".

    Cosines are compared, not probabilities: a softmax shares out all it has among the classes it was given, and is as
    sure of an image of something else. Images that are answered wrongly have no vote: to refuse them is no loss.

    Args:
        best: each image's highest cosine, (N,).
        right: whether that class is the right one, (N,) of bool.
        stranger: whether the image is known to be of none of the classes, (N,) of bool.
        keep_rate: how many of the right answers must stay.

    Returns:
        The highest threshold that leaves the share. Where none is asked for, the one that tells strangers from right
        answers with the best balanced accuracy; and without strangers the one that leaves 95 %.
    """
    if keep_rate is not None or not bool(stranger.any()) or not bool(right.any()):
        return keeping_threshold(best[right], KEPT if keep_rate is None else keep_rate)
    votes = right | stranger
    return best_threshold(best[votes], right[votes], balanced_accuracy)


def label_thresholds(cosines: Tensor, truth: Tensor) -> list[float]:
    """Lowest cosine at which each class is given, of multi-label classes: the one with the best F1.

    (Balanced accuracy would give every image of many classes some that it has not.) A class with fewer than 5
    images, or of all of them, takes the one threshold that is best for all classes together.

    Args:
        cosines: (N, C).
        truth: (N, C) of bool.
    """
    count = truth.sum(0)
    if bool(truth.all()) or not bool(truth.any()):
        shared = keeping_threshold(cosines[truth]) if bool(truth.any()) else float(cosines.max()) + _HAIR
    else:
        shared = best_threshold(cosines.flatten(), truth.flatten(), f1)
    return [
        best_threshold(cosines[:, i], truth[:, i], f1) if _FEWEST_OF_CLASS <= count[i] < len(truth) else shared
        for i in range(truth.shape[1])
    ]
