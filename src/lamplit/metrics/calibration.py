"""Calibration of probabilities and thresholds of answers: pure functions on tensors.

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
_EPSILON = 1e-6  # below a threshold, so that the rounding of a cosine does not decide
DEFAULT_KEEP_RATE = 0.95  # fraction of right answers to keep, if there are no out-of-class images to compare with
_MIN_IMAGES_OF_CLASS = 5  # images that a class needs for a threshold of its own


def reliability_bins(confidences: Tensor, right: Tensor, bins: int = 15) -> list[dict[str, float]]:
    """Sort answers by confidence into bins of equal width, (0, 1/bins] and so on.

    Args:
        confidences: probability of each answer, (N,), 0 to 1.
        right: whether it was right, (N,) of bool.
        bins: number of bins; 15 as in Guo et al. (2017).

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
    """Return the mean distance of confidence and accuracy over `reliability_bins`, each weighted by its images.

    It is 0 if 80 % of the answers with a confidence of 80 % are right, and so on. Few images in a bin are off by
    chance, so a small sample shows more error than there is. NaN without any answer.

    Args:
        confidences: probability of each answer, (N,), 0 to 1.
        right: whether it was right, (N,) of bool.
        bins: number of bins.
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
    """Find the logit multiplier (inverse temperature) under which the sample's right classes are most likely.

    The negative log-likelihood is convex in the scale, so its slope is bisected. A sample without a mistake would need
    an infinite scale; as in Platt's method, the labels are taken as if one more image of unknown class had been seen,
    which keeps the scale finite and counts for less the more images there are.

    Args:
        cosines: cosines of images and classes, (N, C).
        labels: the right classes, (N,).

    Returns:
        A scale between `SMALLEST_SCALE` (if the cosines are no better than chance, or there is only one class, whose
        probability is always 1) and `LARGEST_SCALE`.
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
        cosines: cosines of images and classes, (N, C).
        truth: whether the image has the class, (N, C) of bool.

    Returns:
        The scale, within the bounds of `fit_temperature`, and the bias.
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
    if scale == SMALLEST_SCALE:  # the cosines tell nothing: every probability is the fraction of true labels
        return scale, float(torch.logit(targets.mean())) - scale * float(middle)
    return scale, float(offset - slope * middle / spread)


def keeping_threshold(cosines: Tensor, keep_rate: float = DEFAULT_KEEP_RATE) -> float:
    """Return the largest threshold that at least `keep_rate` of the cosines, (N,), reach; -1 without cosines."""
    if not len(cosines):
        return -1.0
    return float(cosines.double().sort().values[int((1 - keep_rate) * len(cosines) + 1e-9)]) - _EPSILON


def balanced_accuracy(given: Tensor, missed: Tensor, wrong: Tensor, refused: Tensor) -> Tensor:
    """Return the mean of two rates: answers given among those that should be, refused among those that should be."""
    return (given / (given + missed) + refused / (refused + wrong)) / 2


def f1(given: Tensor, missed: Tensor, wrong: Tensor, refused: Tensor) -> Tensor:
    """Return the harmonic mean of precision and recall."""
    return 2 * given / (2 * given + missed + wrong)


def best_threshold(cosines: Tensor, truth: Tensor, gain: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> float:
    """Return the threshold with the largest gain, half-way between two neighbouring cosines; if gains tie, the lowest.

    Args:
        cosines: (N,), at least one of each truth.
        truth: whether the answer should be given, (N,) of bool.
        gain: function of the numbers of answers rightly given, missed, wrongly given and rightly refused.
    """
    order = cosines.double().sort(descending=True)
    right = truth[order.indices].double().cumsum(0)
    wrong = (~truth[order.indices]).double().cumsum(0)
    value = gain(right, right[-1] - right, wrong, wrong[-1] - wrong)
    following = torch.cat([order.values[1:], order.values[-1:] - 2 * _EPSILON])
    value[order.values == following] = -torch.inf  # no threshold lies between equal cosines
    best = len(value) - 1 - int(value.flip(0).argmax())
    return float((order.values[best] + following[best]) / 2)


def none_threshold(best: Tensor, right: Tensor, out_of_class: Tensor, keep_rate: float | None = None) -> float:
    """Return the lowest cosine of the best class at which it is the answer; below it the answer is "none of these".

    Cosines are compared, not probabilities: a softmax over the given classes is as confident for an image of something
    else. Images that are answered wrongly do not count: to refuse them is no loss.

    Args:
        best: each image's highest cosine, (N,).
        right: whether that class is the right one, (N,) of bool.
        out_of_class: whether the image is known to be of none of the classes, (N,) of bool.
        keep_rate: fraction of the right answers that must stay.

    Returns:
        The highest threshold that keeps the fraction. Without `keep_rate`, the one that tells out-of-class images from
        right answers with the best balanced accuracy; without out-of-class images too, the one that keeps 95 %.
    """
    if keep_rate is not None or not bool(out_of_class.any()) or not bool(right.any()):
        return keeping_threshold(best[right], DEFAULT_KEEP_RATE if keep_rate is None else keep_rate)
    votes = right | out_of_class
    return best_threshold(best[votes], right[votes], balanced_accuracy)


def label_thresholds(cosines: Tensor, truth: Tensor) -> list[float]:
    """Return the lowest cosine at which each of C multi-label classes is given: the one with the best F1.

    (With many classes, balanced accuracy would give every image some wrong ones.) A class that fewer than 5 images
    have, or all of them, takes the one threshold that is best for all classes together.

    Args:
        cosines: (N, C).
        truth: (N, C) of bool.
    """
    count = truth.sum(0)
    if bool(truth.all()) or not bool(truth.any()):
        shared = keeping_threshold(cosines[truth]) if bool(truth.any()) else float(cosines.max()) + _EPSILON
    else:
        shared = best_threshold(cosines.flatten(), truth.flatten(), f1)
    return [
        best_threshold(cosines[:, i], truth[:, i], f1) if _MIN_IMAGES_OF_CLASS <= count[i] < len(truth) else shared
        for i in range(truth.shape[1])
    ]
