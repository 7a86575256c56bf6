"""Closed-form initialisation: a text head by ridge regression, before the first step.

A supervised tower's own classifier is a set of (class name, vector in this very space) pairs that needs no
image. Ridge regression from text features to those vectors, and to the vectors of the training images,
gives the text tower a head that already reads the locked space: a linear one, or one of likeness to the texts that
are known (`KernelHead`), which reads far better.

A classifier's vector points to where a class differs from the others; the mean of a class's images does not,
it is dominated by what all images share. Multiplying image vectors by the inverse of their shrunken
covariance (as linear discriminant analysis does) makes the two alike, so that they can teach one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.texts.kernel_head import KernelHead, KnownTexts
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.sides import text_features

# Chosen on the stamps with other splits than the published ones (benchmarks/recall.py says which); flat around
# these values.
SHRINKAGE = 10.0  # of the covariance, in units of its mean variance
RIDGE = 2.0  # of a linear head, in units of the mean squared feature
SHARPNESS = 3.0  # of the kernel, which is exp(SHARPNESS * (cosine - 1))
KERNEL_RIDGE = 1.0  # of a kernel head: the weight of a pair whose answer is halved
PAIR_WEIGHT = 3.0  # of a real caption against one text of a class, or one that another model's head knew
MAX_PAIRS = 50_000  # more pairs would not change the fit
MAX_ANCHORS = 20_000  # known texts of a kernel head; their matrix has 1.6 GB
_ROWS = 4096  # of texts that are read at once
_SAME_TEXT = 1 - 1e-5  # cosine of the directions of one text, computed in two batches


def sample_pairs(text_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the pairs that a head is fitted to, before anything of their texts is computed.

    Args:
        text_index: the text of each pair, (N,).

    Returns:
        (n,) indices of all pairs or of MAX_PAIRS at random; (m,) indices of their distinct texts; and the place among
        these of the text of each chosen pair, (n,).
    """
    rows = torch.arange(len(text_index))
    if len(rows) > MAX_PAIRS:
        rows = torch.randperm(len(rows))[:MAX_PAIRS]
    used, place = torch.unique(text_index[rows], return_inverse=True)
    return rows, used, place


@dataclass(frozen=True)
class _Known:
    """R pairs of a text and a vector: features (R, H), targets (R, D) and weights (R,)."""

    features: Tensor
    targets: Tensor
    weights: Tensor


def count_anchors(texts: Sequence[str], class_head: ClassHead | None, carried: KnownTexts | None = None) -> int:
    """Return how many known texts a kernel head has at most that is fitted to these texts, classes and known texts."""
    names = set(texts).union(*(class_head.texts if class_head is not None else ()))
    return min(MAX_ANCHORS, len(names) + (0 if carried is None else len(carried)))


class ClosedForm:
    """Fits a text tower's head by ridge regression; the features of all texts are computed once.

    Args:
        text_tower: the tower; its encoder does not change. A kernel head has as many anchors as `count_anchors` says;
            what the tower has `carried` is known to it, too.
        texts: M distinct texts.
        class_head: the image tower's classifier, or None.
        progress: show a bar on stderr.

    Attributes:
        features: of the texts, before the head, (M, H).
    """

    def __init__(
        self, text_tower: TextTower, texts: Sequence[str], class_head: ClassHead | None, *, progress: bool = False
    ) -> None:
        self._head, self._carried = text_tower.head, text_tower.carried
        self.features = text_features(text_tower, texts, progress=progress)
        self._classes: list[_Known] = []
        self._names = self.features[:0]
        if class_head is not None:
            names = class_head.distinct_texts()
            self._names = text_features(text_tower, names)
            place = {text: i for i, text in enumerate(names)}
            texts_of = [(place[text], c) for c, class_texts in enumerate(class_head.texts) for text in class_texts]
            rows, classes = torch.tensor(texts_of, device=self._names.device).T
            vectors = class_head.vectors.to(self._names.device)
            vectors = F.normalize(vectors - vectors.mean(0), dim=-1)[classes]
            self._classes = [_Known(self._names[rows], vectors, self._names.new_ones(len(rows)))]

    @torch.no_grad()
    def fit(self, zimg: Tensor, text_index: Tensor) -> None:
        """Fit the head to pairs of an image and a text.

        Args:
            zimg: unit vectors of the images, (N, D).
            text_index: the text of each, (N,).
        """
        zimg = zimg.to(self.features.device)
        common = zimg.mean(0)
        targets = F.normalize(_whiten(zimg - common), dim=-1)
        pairs = _Known(self.features[text_index.to(zimg.device)], targets, zimg.new_full((len(zimg),), PAIR_WEIGHT))
        # The direction that all images share tells none of them from another; a text along it would match them all.
        direction = F.normalize(common, dim=0)
        if isinstance(self._head, KernelHead):
            _fit_kernel(self._head, [pairs, *self._classes], direction, self._carried)
        else:
            assert isinstance(self._head, nn.Linear), "open_text_tower gives a head to tune, which is one of these two"
            _fit_linear(self._head, [pairs, *self._classes], direction)

    @torch.no_grad()
    def ztxt(self, text_index: Tensor) -> Tensor:
        """Return the (n, D) unit vectors that the head gives (n,) texts now."""
        return F.normalize(self._head(self.features[text_index.to(self.features.device)]), dim=-1)

    @torch.no_grad()
    def name_vectors(self) -> Tensor:
        """Return the (C, D) unit vectors that the head gives the distinct texts of all classes now."""
        return F.normalize(self._head(self._names), dim=-1)


def fit_head(text_tower: TextTower, zimg: Tensor, texts: Sequence[str], class_head: ClassHead | None) -> None:
    """Initialise a text tower's head by ridge regression.

    Args:
        text_tower: the tower, as `ClosedForm` takes it.
        zimg: unit vectors of the training images, (N, D).
        texts: N texts, one for each image.
        class_head: the image tower's classifier, or None.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows, used, text_index = sample_pairs(torch.tensor([place[text] for text in texts]))
    distinct = list(place)
    ClosedForm(text_tower, [distinct[i] for i in used.tolist()], class_head).fit(zimg[rows], text_index)


def _fit_linear(head: nn.Linear, known: Sequence[_Known], direction: Tensor) -> None:
    mean = known[0].features.mean(0)
    inputs = torch.cat([each.features - each.features.mean(0) for each in known])
    targets, weights = torch.cat([each.targets for each in known]), torch.cat([each.weights for each in known])
    weighted = inputs * weights[:, None]
    gram = inputs.T @ weighted
    gram.diagonal().add_(RIDGE * inputs.square().sum(1).mean() + 1e-12)
    matrix = torch.linalg.solve(gram, weighted.T @ targets)  # (H, D)
    matrix -= torch.outer(matrix @ direction, direction)
    matrix /= ((known[0].features - mean) @ matrix).norm(dim=-1).mean().clamp(min=1e-12)
    head.weight.copy_(matrix.T)
    head.bias.copy_(-(mean @ matrix))


def _fit_kernel(
    head: KernelHead, known: Sequence[_Known], direction: Tensor, carried: KnownTexts | None = None
) -> None:
    """Solve ridge regression with a kernel; every text that is fitted is an anchor."""
    features = torch.cat([each.features for each in known])
    head.mean.copy_(features.mean(0) if carried is None else carried.mean)
    inputs = F.normalize(features - head.mean, dim=-1)
    targets, weights = torch.cat([each.targets for each in known]), torch.cat([each.weights for each in known])
    if carried is not None:
        others = carried.directions.to(inputs.device)
        closest = torch.cat([(part @ inputs.T).amax(1) for part in torch.split(others, _ROWS)])
        kept = closest < _SAME_TEXT
        inputs = torch.cat([inputs, others[kept]])
        targets = torch.cat([targets, carried.vectors.to(inputs.device)[kept]])
        weights = torch.cat([weights, weights.new_ones(int(kept.sum()))])
    anchors, place = torch.unique(inputs, dim=0, return_inverse=True)
    targets = inputs.new_zeros(len(anchors), targets.shape[1]).index_add_(0, place, targets * weights[:, None])
    weights = inputs.new_zeros(len(anchors)).index_add_(0, place, weights)
    if len(anchors) > head.anchors:
        has_image = torch.zeros(len(anchors), dtype=torch.bool, device=place.device)
        has_image[place[: len(known[0].features)]] = True
        chosen = choose_anchors(has_image.cpu(), head.anchors).to(anchors.device)
        anchors, targets, weights = anchors[chosen], targets[chosen], weights[chosen]
    roots = weights.sqrt()
    # Scaled to both sides, so that no eigenvalue is below the ridge and single precision will do. On the CPU: not every
    # accelerator has the decomposition.
    matrix = _kernel(anchors, anchors).mul_(roots).mul_(roots[:, None]).cpu()
    matrix.diagonal().add_(KERNEL_RIDGE)
    values = _solve_in_place(matrix, (targets / roots[:, None]).cpu()).to(direction.device) * roots[:, None]  # (A, D)
    values -= torch.outer(values @ direction, direction)
    head.keys.weight.zero_()
    head.keys.weight[: len(anchors)].copy_(SHARPNESS * anchors)
    head.values.weight.zero_()
    head.values.weight[:, : len(anchors)].copy_(values.T)
    lengths = torch.cat([head(part).norm(dim=-1) for part in torch.split(known[0].features, _ROWS)])
    head.values.weight.div_(lengths.mean().clamp(min=1e-12))


def choose_anchors(has_image: Tensor, count: int) -> Tensor:
    """Choose texts at random, those with an image first; up to a quarter of the places is kept for the others.

    Args:
        has_image: whether each text is of a pair; else it is of a class alone, (M,).
        count: how many to choose, at most M.

    Returns:
        Indices of the chosen ones, (count,).
    """
    paired, others = (
        part[torch.randperm(len(part))] for part in (has_image.nonzero().flatten(), (~has_image).nonzero().flatten())
    )
    num_others = min(len(others), max(count // 4, count - len(paired)))
    return torch.cat([paired[: count - num_others], others[:num_others]])


def _solve_in_place(matrix: Tensor, targets: Tensor) -> Tensor:
    """Solve a symmetric positive definite (A, A) system for (A, D) targets; the matrix is lost.

    Of 20,000 known texts it has 1.6 GB, and torch's own decomposition would hold it three times.
    """
    by_columns = matrix.numpy().T  # as LAPACK has it: the same numbers, since it is symmetric
    factor = cho_factor(by_columns, lower=True, overwrite_a=True, check_finite=False)
    return torch.from_numpy(cho_solve(factor, targets.numpy(), check_finite=False))


def _kernel(features: Tensor, anchors: Tensor) -> Tensor:
    kernel: Tensor = (features @ anchors.T).sub_(1).mul_(SHARPNESS).exp_()
    return kernel


def _whiten(centred: Tensor) -> Tensor:
    """Multiply (N, D) centred vectors by the inverse of their covariance, shrunk towards its mean variance."""
    covariance = centred.T @ centred / len(centred)
    covariance.diagonal().add_(SHRINKAGE * covariance.diagonal().mean() + 1e-12)
    solved: Tensor = torch.linalg.solve(covariance, centred.T)
    return solved.T
