"""The shares of several processes (ranks) in one loss over the whole batch.

A rank has some of the texts and the vectors of all images. The sums over images of its texts are its own; the sums
over texts of the images need those of the other ranks: one number an image, two for one with several positives.
So no vector of a text and no gradient of one goes from rank to rank. The sigmoid needs nothing at all.

Shapes: B pairs, D width; b of the pairs have their texts here; W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamplit.losses.contrastive import (
    SigmoidLoss,
    SoftmaxLoss,
    prepare,
    require_tensors,
    run_uncompiled,
    shared_positives,
)
from lamplit.losses.positives import Exchange, Peers


def softmax_share(
    zimg: Tensor,
    ztxt: Tensor,
    rows: Tensor,
    logit_scale: Tensor,
    exchange: Exchange,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Compute one rank's share of `softmax_loss`: the shares, and their gradients, add up to the loss and its gradient.

    Args:
        zimg: unit vectors of all images, (B, D).
        ztxt: unit vectors of the texts of some of them, (b, D), b > 0.
        rows: the images of these texts, (b,); each belongs to one rank.
        logit_scale: the multiplier of the cosines, a scalar.
        exchange: maps (n,) float64 values of this rank to those that the others give at the same time, (W - 1, n), in a
            fixed order. It is called once, with n = B and one more for each image with several positives.
        image_ids: integers, (B,); equal if two rows show the same image.
        text_ids: integers of all texts, (B,); equal if two rows have the same text.

    Returns:
        The share, a scalar.

    Raises:
        UsageError: the shapes do not fit, or something is no tensor.
    """
    zimg, ztxt, scale = prepare(zimg, ztxt, logit_scale, is_share=True)
    order = _own_first(rows.to(zimg.device), len(zimg))
    positives = shared_positives(zimg, _ordered(image_ids, order), _ordered(text_ids, order))
    share: Tensor = run_uncompiled(SoftmaxLoss, zimg[order], ztxt, scale, positives, Peers(order, exchange))
    return share


def sigmoid_share(
    zimg: Tensor,
    ztxt: Tensor,
    rows: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Compute one rank's share of `sigmoid_loss`, as `softmax_share` does of the other loss; nothing is exchanged.

    Args:
        zimg: unit vectors of all images, (B, D).
        ztxt: unit vectors of the texts of some of them, (b, D), b > 0.
        rows: the images of these texts, (b,); each belongs to one rank.
        logit_scale: the multiplier of the cosines, a scalar.
        logit_bias: what is added to every logit, a scalar.
        image_ids: integers, (B,); equal if two rows show the same image.
        text_ids: integers of all texts, (B,); equal if two rows have the same text.

    Returns:
        The share, a scalar.

    Raises:
        UsageError: the shapes do not fit, or something is no tensor.
    """
    zimg, ztxt, scale = prepare(zimg, ztxt, logit_scale, is_share=True)
    require_tensors(logit_bias=logit_bias)
    order = _own_first(rows.to(zimg.device), len(zimg))
    positives = shared_positives(zimg, _ordered(image_ids, order), _ordered(text_ids, order))
    bias = logit_bias.reshape(()).to(zimg.dtype)
    share: Tensor = run_uncompiled(SigmoidLoss, zimg[order], ztxt, scale, bias, positives)
    return share


def _own_first(rows: Tensor, size: int) -> Tensor:
    """Return all rows of the batch, (B,), those given first: where the tiles have their diagonal."""
    is_own = torch.zeros(size, dtype=torch.bool, device=rows.device)
    is_own[rows] = True
    return torch.cat([rows, (~is_own).nonzero().squeeze(1)])


def _ordered(ids: Tensor | None, order: Tensor) -> Tensor | None:
    return None if ids is None else ids.to(order.device)[order]
