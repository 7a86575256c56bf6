"""The few-shot probe: a linear classifier on a few labelled vectors, in closed form.

As in table 3 of the paper, by the settings of big_vision's `fewshot_lsr` (those of the paper's time are not known).
Features are whitened by the mean and deviation of the training vectors and get a constant of 100 for the offset, so
large that the penalty hardly touches it; targets are +1 for the right class and -1 for the others. All of it is done
on the CPU, wherever the vectors are: it needs float64, which Apple's MPS lacks, and labels are on the CPU.

Shapes: N images, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamplit.errors import UsageError

SHOTS = 10
SEEDS = (0, 1, 2)
BIAS = 100.0
_TESTED_AT_ONCE = 4096


def draw(labels: Tensor, shots: int = SHOTS, seed: int = 0) -> Tensor:
    """Draw `shots` examples of each class at random, and return their rows: (C * shots,), class by class.

    It needs no vectors, so only the images that are drawn have to be embedded. On examples in the same order, the same
    seed draws what big_vision draws.

    Args:
        labels: the class of each example, (N,), from 0 to the highest.
        shots: examples of each class.
        seed: seed of the draw; the paper's protocol takes the mean of three draws.

    Raises:
        UsageError: if a class has fewer examples.
    """
    if shots < 1 or not len(labels):
        raise UsageError(f"{shots} shots of {len(labels)} examples; expected at least one of each class")
    counts = np.bincount(labels.cpu().numpy())
    few = np.flatnonzero(counts < shots)
    if len(few):
        raise UsageError(
            f"class {few[0]} has {counts[few[0]]} examples and {shots} are to be drawn; ask for fewer shots"
        )
    rng = np.random.default_rng(seed)
    by_class = np.split(np.argsort(labels.cpu().numpy(), kind="stable"), np.cumsum(counts)[:-1])
    return torch.from_numpy(np.concatenate([rng.permutation(rows)[:shots] for rows in by_class]))


@dataclass(frozen=True)
class Probe:
    """A fitted classifier."""

    mean: Tensor  # mean of the training vectors, (D,)
    std: Tensor  # (D,)
    weight: Tensor  # weights of the whitened features and the constant, (D + 1, C)

    def scores(self, vectors: Tensor) -> Tensor:
        """Score every class: (N, D) vectors in, (N, C) float64 on the CPU out."""
        return _features(vectors, self.mean, self.std) @ self.weight


def fit(vectors: Tensor, labels: Tensor, l2: float = 1024.0) -> Probe:
    """Fit a probe by ridge regression in float64, in the primal or the dual, whichever is smaller.

    Args:
        vectors: vectors of the training images, (N, D), on any device.
        labels: the class of each, (N,), from 0 to the highest.
        l2: strength of the penalty.

    Raises:
        UsageError: if the numbers of vectors and labels differ, or l2 is not positive.
    """
    if len(vectors) != len(labels) or not len(labels):
        raise UsageError(f"there are {len(vectors)} training vectors and {len(labels)} labels; expected one each")
    if not l2 > 0:
        raise UsageError(f"l2 is {l2}; the penalty must be positive")
    vectors, labels = vectors.cpu().double(), labels.cpu()
    mean, std = vectors.mean(0), vectors.std(0, correction=0) + 1e-5
    x = _features(vectors, mean, std)
    y = 2 * F.one_hot(labels.long()).to(x) - 1
    primal = len(x) >= x.shape[1]
    gram = x.T @ x if primal else x @ x.T
    gram.diagonal().add_(l2)
    weight = torch.linalg.solve(gram, x.T @ y) if primal else x.T @ torch.linalg.solve(gram, y)
    return Probe(mean, std, weight)


def _features(vectors: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return F.pad((vectors.cpu().double() - mean) / std, (0, 1), value=BIAS)


def ridge_accuracy(
    train_vectors: Tensor, train_labels: Tensor, test_vectors: Tensor, test_labels: Tensor, l2: float = 1024.0
) -> Tensor:
    """Fit a probe and return which test images it classifies right; a tie counts as wrong.

    Args:
        train_vectors: (N, D), on any device.
        train_labels: the class of each, (N,).
        test_vectors: (M, D), on any device.
        test_labels: the right class of each, (M,).
        l2: strength of the penalty.

    Returns:
        1 or 0 for each test image, (M,) float64 on the CPU; the mean is the accuracy.

    Raises:
        UsageError: if the numbers of vectors and labels differ, or a test image's class has no training image.
    """
    test_vectors, train_labels, test_labels = test_vectors.cpu(), train_labels.cpu(), test_labels.cpu()
    probe = fit(train_vectors, train_labels, l2)
    if len(test_vectors) != len(test_labels):
        raise UsageError(f"there are {len(test_vectors)} test vectors and {len(test_labels)} labels; expected one each")
    unknown = set(test_labels.tolist()) - set(train_labels.tolist())
    if unknown:
        raise UsageError(f"class {min(unknown)} has test images but no training images")
    right = []
    for rows in torch.split(torch.arange(len(test_vectors)), _TESTED_AT_ONCE):
        scores = probe.scores(test_vectors[rows])
        own = scores.gather(1, test_labels[rows].long()[:, None])
        right.append((~(scores < own)).sum(1) == 1)
    return torch.cat(right).double()
