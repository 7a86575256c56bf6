"""Closed-form initialisation: a text head by ridge regression, before the first step.

A supervised tower's own classifier is a set of (class name, vector in this very space) pairs that needs no
image. Ridge regression from text features to those vectors, and to the vectors of the training images,
gives the text tower a head that already reads the locked space.

A classifier's vector points to where a class differs from the others; the mean of a class's images does not,
it is dominated by what all images share. Multiplying image vectors by the inverse of their shrunken
covariance (as linear discriminant analysis does) makes the two alike, so that they can teach one head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.sides import text_features

# Chosen on the stamps with other splits than the published ones (benchmarks/stamps.py says which); flat around
# these values.
SHRINKAGE = 10.0  # of the covariance, in units of its mean variance
RIDGE = 2.0  # in units of the mean squared feature
PAIR_WEIGHT = 3.0  # of a real caption against one text of a class
MAX_PAIRS = 50_000  # more pairs would not change the fit


@torch.no_grad()
def fit_head(text_tower: TextTower, zimg: Tensor, texts: Sequence[str], class_head: ClassHead | None) -> None:
    """Initialise a text tower's head by ridge regression.

    Args:
        text_tower: the tower; its encoder does not change.
        zimg: unit vectors of the training images, (N, D).
        texts: N texts, one for each image.
        class_head: the image tower's classifier, or None.
    """
    device = text_tower.head.weight.device
    if len(texts) > MAX_PAIRS:
        chosen = torch.randperm(len(texts))[:MAX_PAIRS]
        zimg, texts = zimg[chosen], [texts[i] for i in chosen.tolist()]
    zimg = zimg.to(device)
    features = text_features(text_tower, texts)
    common, mean_feature = zimg.mean(0), features.mean(0)
    inputs = [features - mean_feature]
    targets = [F.normalize(_whiten(zimg - common), dim=-1)]
    weights = [torch.full((len(texts),), PAIR_WEIGHT, device=device)]
    if class_head is not None:
        names = [(text, c) for c, class_texts in enumerate(class_head.texts) for text in class_texts]
        class_features = text_features(text_tower, [text for text, _ in names])
        vectors = class_head.vectors.to(device)
        inputs.append(class_features - class_features.mean(0))
        targets.append(F.normalize(vectors - vectors.mean(0), dim=-1)[[c for _, c in names]])
        weights.append(torch.ones(len(names), device=device))
    matrix = _ridge(torch.cat(inputs), torch.cat(targets), torch.cat(weights))  # (feature width, D)
    # The direction that all images share tells none of them from another; a text along it would match them all.
    direction = F.normalize(common, dim=0)
    matrix -= torch.outer(matrix @ direction, direction)
    matrix /= (inputs[0] @ matrix).norm(dim=-1).mean().clamp(min=1e-12)
    text_tower.head.weight.copy_(matrix.T)
    text_tower.head.bias.copy_(-(mean_feature @ matrix))


def _whiten(centred: Tensor) -> Tensor:
    """Multiply (N, D) centred vectors by the inverse of their covariance, shrunk towards its mean variance."""
    covariance = centred.T @ centred / len(centred)
    covariance.diagonal().add_(SHRINKAGE * covariance.diagonal().mean() + 1e-12)
    solved: Tensor = torch.linalg.solve(covariance, centred.T)
    return solved.T


def _ridge(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    weighted = inputs * weights[:, None]
    gram = inputs.T @ weighted
    gram.diagonal().add_(RIDGE * inputs.square().sum(1).mean() + 1e-12)
    solved: Tensor = torch.linalg.solve(gram, weighted.T @ targets)
    return solved
