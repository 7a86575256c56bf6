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
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import spotri
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.texts.kernel_head import KernelHead, KnownTexts
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.head.kept_features import read_or_encode
from lamplit.tuning.sides import token_features

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
    """R pairs of a text and a vector: readings (R,) of the texts, targets (R, D) and weights (R,)."""

    readings: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Anchors:
    """What a kernel head that was fitted knows.

    Attributes:
        place: (M,) the anchor of each text; -1 for one that the head does not know.
        weights: (A,) weight of each anchor in the fit.
        corrections: (A, A) what `corrections_of` returns, if it was asked for.
    """

    place: Tensor
    weights: Tensor
    corrections: Tensor | None


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
        keeps_names: keep the features of the classifier's texts for other runs, see `read_or_encode`.
        progress: show a bar on stderr.

    Attributes:
        features: of R readings, before the head, (R, H). Texts that the tokenizer takes for the same have one reading.
        text_readings: which is that of each text, (M,).
    """

    def __init__(
        self,
        text_tower: TextTower,
        texts: Sequence[str],
        class_head: ClassHead | None,
        *,
        keeps_names: bool = False,
        progress: bool = False,
    ) -> None:
        self._head, self._carried = text_tower.head, text_tower.carried
        names = [] if class_head is None else class_head.distinct_texts()
        tokens = text_tower.tokenize(names)
        readings, numbers = distinct_tokens([*tokens, *text_tower.tokenize(texts)])
        of_names = len(distinct_tokens(tokens)[0])
        read = read_or_encode if keeps_names else token_features
        parts = [(read, readings[:of_names]), (token_features, readings[of_names:])]
        self.features = torch.cat([encode(text_tower, part, progress=progress) for encode, part in parts if part])
        self._names, self.text_readings = torch.split(numbers.to(self.features.device), [len(names), len(texts)])
        self._classes: list[_Known] = []
        if class_head is not None:
            place = {text: i for i, text in enumerate(names)}
            texts_of = [(place[text], c) for c, class_texts in enumerate(class_head.texts) for text in class_texts]
            rows, classes = torch.tensor(texts_of, device=self.features.device).T
            vectors = class_head.vectors.to(self.features.device)
            vectors = F.normalize(vectors - vectors.mean(0), dim=-1)[classes]
            self._classes = [_Known(self._names[rows], vectors, self.features.new_ones(len(rows)))]

    @torch.no_grad()
    def fit(self, zimg: Tensor, text_index: Tensor, *, leaves_out: bool = False) -> Anchors | None:
        """Fit the head to pairs of an image and a text.

        Args:
            zimg: unit vectors of the images, (N, D).
            text_index: the text of each, (N,).
            leaves_out: compute `corrections_of` a kernel head, too; takes twice as long again.

        Returns:
            What a kernel head knows; None of a linear one.
        """
        zimg = zimg.to(self.features.device)
        common = zimg.mean(0)
        targets = F.normalize(_whiten(zimg - common), dim=-1)
        pairs = _Known(
            self.text_readings[text_index.to(zimg.device)], targets, zimg.new_full((len(zimg),), PAIR_WEIGHT)
        )
        # The direction that all images share tells none of them from another; a text along it would match them all.
        direction = F.normalize(common, dim=0)
        if isinstance(self._head, KernelHead):
            found = _fit_kernel(
                self._head, self.features, [pairs, *self._classes], direction, self._carried, leaves_out=leaves_out
            )
            return replace(found, place=found.place[self.text_readings])
        assert isinstance(self._head, nn.Linear), "open_text_tower gives a head to tune, which is one of these two"
        _fit_linear(self._head, self.features, [pairs, *self._classes], direction)
        return None

    @torch.no_grad()
    def ztxt(self, text_index: Tensor) -> Tensor:
        """Return the (n, D) unit vectors that the head gives (n,) texts now."""
        return F.normalize(self._head(self.features[self.text_readings[text_index.to(self.features.device)]]), dim=-1)

    @torch.no_grad()
    def name_vectors(self) -> Tensor:
        """Return the (C, D) unit vectors that the head gives the distinct texts of all classes now."""
        return F.normalize(self._head(self.features[self._names]), dim=-1)


def distinct_tokens(tokens: Sequence[list[int]]) -> tuple[list[list[int]], Tensor]:
    """Return the distinct ones of N lists of token ids, and the number of each among these, (N,)."""
    numbers: dict[tuple[int, ...], int] = {}
    number = torch.tensor([numbers.setdefault(tuple(ids), len(numbers)) for ids in tokens])
    return [list(ids) for ids in numbers], number


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


def _fit_linear(head: nn.Linear, features: Tensor, known: Sequence[_Known], direction: Tensor) -> None:
    given = [features[each.readings] for each in known]
    mean = given[0].mean(0)
    inputs = torch.cat([part - part.mean(0) for part in given])
    targets, weights = torch.cat([each.targets for each in known]), torch.cat([each.weights for each in known])
    weighted = inputs * weights[:, None]
    gram = inputs.T @ weighted
    gram.diagonal().add_(RIDGE * inputs.square().sum(1).mean() + 1e-12)
    matrix = torch.linalg.solve(gram, weighted.T @ targets)  # (H, D)
    matrix -= torch.outer(matrix @ direction, direction)
    matrix /= ((given[0] - mean) @ matrix).norm(dim=-1).mean().clamp(min=1e-12)
    head.weight.copy_(matrix.T)
    head.bias.copy_(-(mean @ matrix))


def _fit_kernel(
    head: KernelHead,
    features: Tensor,
    known: Sequence[_Known],
    direction: Tensor,
    carried: KnownTexts | None,
    *,
    leaves_out: bool,
) -> Anchors:
    """Solve ridge regression with a kernel; every text that is fitted is an anchor. The places are of R readings."""
    readings = torch.cat([each.readings for each in known])
    head.mean.copy_(features[readings].mean(0) if carried is None else carried.mean)
    anchors, place = torch.unique(readings, return_inverse=True)
    inputs = F.normalize(features[anchors] - head.mean, dim=-1)
    values, given = torch.cat([each.targets for each in known]), torch.cat([each.weights for each in known])
    weights = given.new_zeros(len(anchors)).index_add_(0, place, given)
    targets = values.new_zeros(len(anchors), values.shape[1]).index_add_(0, place, values * given[:, None])
    if carried is not None:
        others = carried.directions.to(inputs.device)
        closest = torch.cat([(part @ inputs.T).amax(1) for part in torch.split(others, _ROWS)])
        kept = closest < _SAME_TEXT
        inputs = torch.cat([inputs, others[kept]])
        targets = torch.cat([targets, carried.vectors.to(inputs.device)[kept]])
        weights = torch.cat([weights, weights.new_ones(int(kept.sum()))])
    anchor_of = torch.full((len(features),), -1, device=place.device)
    anchor_of[anchors] = torch.arange(len(anchors), device=place.device)
    if len(inputs) > head.anchors:
        has_image = torch.zeros(len(inputs), dtype=torch.bool, device=place.device)
        has_image[place[: len(known[0].readings)]] = True
        chosen = choose_anchors(has_image.cpu(), head.anchors).to(inputs.device)
        moved = torch.full((len(inputs),), -1, device=place.device)
        moved[chosen] = torch.arange(len(chosen), device=place.device)
        anchor_of = torch.where(anchor_of < 0, anchor_of, moved[anchor_of])
        inputs, targets, weights = inputs[chosen], targets[chosen], weights[chosen]
    head.keys.weight.zero_()
    head.keys.weight[: len(inputs)].copy_(SHARPNESS * inputs)
    factor, roots = _factor(head, weights), weights.sqrt()
    solved = cho_solve((factor, True), (targets / roots[:, None]).cpu().numpy(), check_finite=False)
    values = torch.from_numpy(solved).to(direction.device) * roots[:, None]  # (A, D)
    values -= torch.outer(values @ direction, direction)
    head.values.weight.zero_()
    head.values.weight[:, : len(inputs)].copy_(values.T)
    some = known[0].readings[:: -(-len(known[0].readings) // _ROWS)]  # only directions matter, so about 1 will do
    head.values.weight.div_(head(features[some]).norm(dim=-1).mean().clamp(min=1e-12))
    return Anchors(anchor_of, weights, _corrections(factor, weights) if leaves_out else None)


def corrections_of(head: KernelHead, weights: Tensor) -> Tensor:
    """Return how the coefficients of a fitted head change if one of its texts is left out of the fit.

    With G, the kernel's matrix with the ridge, and coefficients a = G^-1 y, those of a regression without text i are
    a - G^-1[:, i] a_i / G^-1[i, i], and none for i itself.

    Args:
        head: with the keys that were fitted.
        weights: of its anchors, (A,).

    Returns:
        G^-1[i, j] / G^-1[i, i] in row i, and 0 in its place i: (A, A), where the weights are.
    """
    return _corrections(_factor(head, weights), weights)


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


def _factor(head: KernelHead, weights: Tensor) -> NDArray[np.float32]:
    """Return Cholesky's factor of the anchors' matrix, (A, A), in the lower triangle.

    The matrix is scaled to both sides by the roots of the weights, so that no eigenvalue is below the ridge and single
    precision will do. On the CPU: not every accelerator has the decomposition. And in place: of 20,000 known texts it
    has 1.6 GB, and torch's own decomposition would hold it three times.
    """
    keys, roots = head.keys.weight[: len(weights)], weights.sqrt()
    matrix = (keys @ (keys / SHARPNESS).T).sub_(SHARPNESS).exp_().mul_(roots).mul_(roots[:, None]).cpu()
    matrix.diagonal().add_(KERNEL_RIDGE)
    by_columns = matrix.numpy().T  # as LAPACK has it: the same numbers, since it is symmetric
    factor: NDArray[np.float32] = cho_factor(by_columns, lower=True, overwrite_a=True, check_finite=False)[0]
    return factor


def _corrections(factor: NDArray[np.float32], weights: Tensor) -> Tensor:
    """Return what `corrections_of` does; the factor is lost."""
    inverse, _ = spotri(factor, lower=1, overwrite_c=1)
    rows = torch.from_numpy(inverse.T)  # its upper triangle is filled
    for start in range(0, len(rows), _ROWS):
        end = start + _ROWS
        rows[start:end, :start] = rows[:start, start:end].T
        square = rows[start:end, start:end]
        square.copy_(square.triu() + square.triu(1).T)
    rows.mul_(weights.sqrt().cpu())
    rows.div_(rows.diagonal().clone()[:, None]).fill_diagonal_(0)
    return rows.to(weights.device)


def _whiten(centred: Tensor) -> Tensor:
    """Multiply (N, D) centred vectors by the inverse of their covariance, shrunk towards its mean variance."""
    covariance = centred.T @ centred / len(centred)
    covariance.diagonal().add_(SHRINKAGE * covariance.diagonal().mean() + 1e-12)
    solved: Tensor = torch.linalg.solve(covariance, centred.T)
    return solved.T
