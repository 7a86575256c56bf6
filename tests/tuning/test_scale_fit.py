"""Where the logit scale starts: at the loss's minimum, on pairs that the head does not know."""

from __future__ import annotations

import math

import pytest
import torch
from test_closed_form import World
from torch.nn import functional as F

from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
from lamplit.model import LiT
from lamplit.towers.identity import TowerIdentity
from lamplit.tuning.head.closed_form import ClosedForm
from lamplit.tuning.head.scale_fit import fit_scale, fit_scale_apart, model_loss


def make_model(world: World, **options: float) -> LiT:
    return LiT(world.tower, TowerIdentity("made:up", "f" * 32, world.zimg.shape[1], None, {}), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("bias", [None, -5.0])
def test_no_other_scale_has_a_lower_loss(noise: float, bias: float | None) -> None:
    torch.manual_seed(0)
    world = World()
    zimg = F.normalize(torch.randn(200, 40), dim=-1)
    ztxt = F.normalize(zimg + noise * F.normalize(torch.randn(200, 40), dim=-1), dim=-1)
    ids = torch.arange(200)
    model = make_model(world, **({} if bias is None else {"logit_bias": bias}))
    fit_scale(model, zimg, ztxt, ids, ids)
    found = float(model_loss(model, zimg, ztxt, image_ids=ids, text_ids=ids).detach())
    for multiplier in torch.logspace(0, 2, 60):
        if bias is None:
            others = [softmax_loss(zimg, ztxt, multiplier)]
        else:
            others = [sigmoid_loss(zimg, ztxt, multiplier, torch.tensor(float(each))) for each in range(-60, 10)]
        assert found <= min(map(float, others)) + 1e-3
    assert 1 <= float(model.logit_multiplier.detach()) <= 100.001


def test_scale_is_that_of_pairs_the_head_does_not_know() -> None:
    """On noise the head learns its own pairs by heart, and cosines mean nothing for others."""
    torch.manual_seed(0)
    world = World(anchors=300)
    model = make_model(world)
    zimg, rows = F.normalize(torch.randn(300, 40), dim=-1), torch.arange(300)
    fit = ClosedForm(world.tower, world.texts[:300], None)
    fit_scale_apart(model, fit, zimg, rows, rows)
    fit.fit(zimg, rows)
    ztxt = model.encode_texts(world.texts[:300])
    assert float((zimg * ztxt).sum(-1).mean()) > 0.3
    assert float(model.logit_multiplier.detach()) < 2


def test_few_pairs_keep_the_scale() -> None:
    world = World()
    model = make_model(world)
    rows = torch.arange(40)
    fit_scale_apart(model, ClosedForm(world.tower, world.texts[:40], None), world.zimg[:40], rows, rows)
    assert float(model.log_scale.detach()) == pytest.approx(math.log(10))
