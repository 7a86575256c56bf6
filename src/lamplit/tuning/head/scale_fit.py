"""Where the logit scale of a run starts: where the loss of pairs that the head does not know is least."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
from lamplit.losses.positives import Exchange
from lamplit.losses.shares import sigmoid_share, softmax_share
from lamplit.model import LiT
from lamplit.tuning.head.closed_form import ClosedForm

_OUT = 0.1  # of the images are left out of the first fit
_MOST_OUT, _LEAST_OUT = 2048, 16  # pairs that the scale is fitted on
MOST_REST = 8192  # pairs of that first fit, whose time grows with the cube
_LARGEST = 100.0  # multiplier


def fit_scale_apart(model: LiT, fit: ClosedForm, zimg: Tensor, image_ids: Tensor, text_index: Tensor) -> None:
    """Fit a model's logit scale and bias, before its head is fitted in closed form to all pairs.

    A head knows the pairs that it was fitted to, and its cosines with others are lower. So the scale is fitted on pairs
    of a tenth of the images, with a head that was fitted to pairs which share no image and no text with them. Where
    these are too few the scale stays as it is.

    Args:
        model: whose text tower has a new head.
        fit: of that tower, to M texts.
        zimg: unit vectors of the images of L pairs, (L, D).
        image_ids: numbers of these images, (L,); equal images have one.
        text_index: the text of each pair, (L,).
    """
    images = _by_appearance(image_ids)  # the numbers themselves say nothing that a copy of the store would keep
    out = torch.isin(image_ids, images[torch.randperm(len(images))[: round(_OUT * len(images))]])
    rest = torch.nonzero(~out & ~torch.isin(text_index, text_index[out])).flatten()
    if int(out.sum()) < _LEAST_OUT or len(rest) < _LEAST_OUT:
        return
    if len(rest) > MOST_REST:
        rest = rest[torch.randperm(len(rest))[:MOST_REST]]
    fit.fit(zimg[rest], text_index[rest])
    chosen = torch.nonzero(out).flatten()[:_MOST_OUT]
    fit_scale(
        model, zimg[chosen].to(model.device), fit.ztxt(text_index[chosen]),
        image_ids[chosen].to(model.device), text_index[chosen].to(model.device),
    )  # fmt: skip


def _by_appearance(values: Tensor) -> Tensor:
    """Return the distinct values, in the order in which they appear."""
    distinct, first = np.unique(values.numpy(), return_index=True)
    return torch.from_numpy(distinct[np.argsort(first)])


@torch.no_grad()
def fit_scale(model: LiT, zimg: Tensor, ztxt: Tensor, image_ids: Tensor, text_ids: Tensor) -> None:
    """Set a model's logit multiplier, between 1 and 100, and its bias if it has one, where its loss is least.

    Args:
        model: whose loss it is.
        zimg: unit vectors of images, (N, D).
        ztxt: unit vectors of their texts, (N, D).
        image_ids: numbers of the images, (N,).
        text_ids: numbers of the texts, (N,).
    """
    bias = model.logit_bias

    def place(point: list[float]) -> None:
        model.log_scale.fill_(min(max(point[0], 0.0), math.log(_LARGEST)))
        if bias is not None:
            bias.fill_(point[1])

    def loss(point: list[float]) -> float:
        place(point)
        return float(model_loss(model, zimg, ztxt, image_ids=image_ids, text_ids=text_ids))

    begin = [float(model.log_scale.detach()), *([] if bias is None else [float(bias.detach())])]
    place(minimize(loss, begin, method="Nelder-Mead", options={"xatol": 0.01, "fatol": 1e-5}).x)


def model_loss(
    model: LiT,
    zimg: Tensor,
    ztxt: Tensor,
    *,
    image_ids: Tensor,
    text_ids: Tensor,
    rows: Tensor | None = None,
    exchange: Exchange | None = None,
) -> Tensor:
    """Compute the contrastive loss that a model is tuned with: sigmoid if it has a bias, else softmax.

    Args:
        model: whose logit scale and bias are used.
        zimg: unit vectors of images, (B, D).
        ztxt: unit vectors of their texts, (B, D); with `exchange` of some of them, (b, D).
        image_ids: numbers of the images, (B,).
        text_ids: numbers of all texts, (B,).
        rows: with `exchange`, the images of these texts, (b,).
        exchange: with it the loss is the share of these texts, see `softmax_share`.
    """
    scale, bias = model.logit_multiplier, model.logit_bias
    if exchange is not None:
        assert rows is not None
        if bias is None:
            return softmax_share(zimg, ztxt, rows, scale, exchange, image_ids=image_ids, text_ids=text_ids)
        return sigmoid_share(zimg, ztxt, rows, scale, bias, image_ids=image_ids, text_ids=text_ids)
    if bias is None:
        return softmax_loss(zimg, ztxt, scale, image_ids=image_ids, text_ids=text_ids)
    return sigmoid_loss(zimg, ztxt, scale, bias, image_ids=image_ids, text_ids=text_ids)
