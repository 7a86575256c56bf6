"""Texts that a step reads as if the closed form had been fitted without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_closed_form import World
from test_known_names import interrupt, run_of
from torch import Tensor
from torch.nn import functional as F

import lamplit
from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.texts.kernel_head import KernelHead, KnownTexts
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.head import closed_form, left_out
from lamplit.tuning.head.closed_form import ClosedForm
from lamplit.tuning.head.left_out import LeftOut, leaves_out
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.sides import token_features

SHARPNESS, RIDGE = closed_form.SHARPNESS, closed_form.KERNEL_RIDGE


@pytest.fixture
def few_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave texts out from 100 pairs on: the store of words has 288 to tune on."""
    monkeypatch.setattr(left_out, "MANY_PAIRS", 100)


def made(text_folder: Path, **changes: Any) -> TuneSettings:
    values = {"text_tower": f"hf:{text_folder}", "lr": 1e-3, "batch_size": 48, "steps": 6, "num_evals": 3}
    return TuneSettings(**values | {"precision": "fp32"} | changes)


def kernel_of(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(SHARPNESS * (a @ b.T - 1))


def without(text: int, asked: Tensor, known: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Fit ridge regression in double precision without one text, and ask for what has become of it."""
    others = [i for i in range(len(known)) if i != text]
    matrix = kernel_of(known[others], known[others]) + torch.diag(RIDGE / weights[others])
    return kernel_of(asked[text : text + 1], known[others])[0] @ torch.linalg.solve(matrix, targets[others])


@pytest.mark.parametrize("moved", [0.0, 0.5])
def test_each_text_is_read_as_by_a_fit_without_it(moved: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against as many fits in double precision; the mean text and what whitens the images stay those of all."""
    monkeypatch.setattr(closed_form, "_ROWS", 32)  # so that there are several blocks
    world = World(anchors=100)
    rows = torch.cat([torch.arange(80), torch.arange(20)])  # twenty texts have two images
    zimg = world.zimg[torch.arange(100)]
    names = ClassHead([[text] for text in world.texts[75:95]], world.directions[75:95])  # five are captions, too
    fit = ClosedForm(world.tower, world.texts[:80], names)
    anchors = fit.fit(zimg, rows, leaves_out=True)
    assert anchors is not None
    assert isinstance(world.tower.head, KernelHead)
    assert anchors.corrections is not None
    features = token_features(world.tower, world.tower.tokenize(world.texts[:95]))
    now = features[:80] + moved * torch.randn(80, features.shape[1])  # the encoder has trained since the fit
    with torch.no_grad():
        plain = F.normalize(world.tower.head(now), dim=-1)
        found = world.tower.head.read_unknown(now, anchors.place, anchors.corrections[anchors.place])
        found = F.normalize(found, dim=-1)
    common = zimg.double().mean(0)
    centred = zimg.double() - common
    covariance = centred.T @ centred / len(centred)
    covariance += closed_form.SHRINKAGE * covariance.diagonal().mean() * torch.eye(40)
    vectors = names.vectors.double() - names.vectors.double().mean(0)
    pairs, classes = F.normalize(centred @ covariance.inverse(), dim=-1), F.normalize(vectors, dim=-1)
    targets, weights = torch.zeros(95, 40).double(), torch.zeros(95).double()
    taught = [(text, pairs[pair], closed_form.PAIR_WEIGHT) for pair, text in enumerate(rows.tolist())]
    taught += [(75 + name, classes[name], 1.0) for name in range(20)]
    for text, vector, weight in taught:
        targets[text] += weight * vector
        weights[text] += weight
    targets /= weights[:, None]
    asked = torch.cat([rows, torch.arange(75, 95)])
    mean = features.double()[asked].mean(0)
    known, read = (F.normalize(each.double() - mean, dim=-1) for each in (features, now))
    expected = torch.stack([without(text, read, known, targets, weights) for text in range(80)])
    direction = F.normalize(common, dim=0)
    expected = F.normalize(expected - torch.outer(expected @ direction, direction), dim=-1)
    assert float((found - expected).abs().max()) < 1e-4
    assert float((plain - expected).norm(dim=-1).mean()) > 0.1, "what the head knows is another answer"


def test_text_that_has_no_anchor_is_read_as_ever() -> None:
    world = World(anchors=40)
    fit = ClosedForm(world.tower, world.texts[:60], None)
    anchors = fit.fit(world.zimg[:60], torch.arange(60), leaves_out=True)
    assert anchors is not None
    unknown = anchors.place < 0
    assert int(unknown.sum()) == 20
    assert sorted(anchors.place[~unknown].tolist()) == list(range(40))
    assert anchors.corrections is not None
    with torch.no_grad():
        plain = world.tower.head(fit.features)
        corrections = anchors.corrections[anchors.place.clamp(min=0)]
        found = world.tower.head.read_unknown(fit.features, anchors.place, corrections)
        own = world.tower.head.keys(F.normalize(fit.features - world.tower.head.mean, dim=-1)).argmax(1)
    assert torch.allclose(found[unknown], plain[unknown], atol=1e-6)
    assert float((found - plain)[~unknown].norm(dim=1).amin()) > 0.01
    assert torch.equal(own[~unknown], anchors.place[~unknown]), "a text is likest to itself"


def test_texts_with_the_same_tokens_share_an_anchor() -> None:
    world = World(anchors=30)
    texts = [*world.texts[:30], *(f"{text} " for text in world.texts[:10])]
    fit = ClosedForm(world.tower, texts, None)
    assert len(fit.features) == 30
    anchors = fit.fit(world.zimg[:40], torch.arange(40), leaves_out=True)
    assert anchors is not None
    assert torch.equal(anchors.place[30:], anchors.place[:10])


@pytest.mark.usefixtures("few_suffice")
def test_head_is_that_of_a_fit_to_the_saved_encoder(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    run = run_of(words_path, tmp_path / "run", made(text_folder, lr=3e-3, val_fraction=0.0))
    start = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    report = run.go(memory_budget=None, workers=0, progress=False)
    assert run.head_fit.left_out is not None
    assert run.head_fit.left_out.corrections is None, "after the last step nothing reads them"
    assert report.trains["text head"]["state"] == "fitted"
    assert report.trains["text tower"]["state"] == "trains"
    saved = lamplit.load(tmp_path / "run").text_tower
    assert saved is not None
    assert isinstance(saved.head, KernelHead)
    found = [parameter.detach().clone() for parameter in saved.head.parameters()]
    changed = {name for name, tensor in run.model.named_parameters() if not torch.equal(tensor, start[name])}
    assert any("encoder" in name for name in changed)
    texts = [run.head_fit.texts[i] for i in range(len(run.head_fit.texts))]
    rows = run.train.image_index
    ClosedForm(saved, texts, None).fit(run.zimg[rows], run.train.text_index)
    for tensor, expected in zip(found, saved.head.parameters(), strict=True):
        assert torch.allclose(tensor, expected, atol=1e-4)


@pytest.mark.usefixtures("few_suffice")
def test_each_text_of_a_step_has_its_own_anchor(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    run = run_of(words_path, tmp_path / "run", made(text_folder))
    tower, known = run.model.text_tower, run.head_fit.left_out
    assert tower is not None
    assert known is not None
    run.head_fit.start(run.held_out, dict, mode="LU", goes_on=True)
    tower.eval()
    texts = torch.randperm(len(run.head_fit.texts))[:64]
    part = run.text_side.part(texts)
    assert not isinstance(part, Tensor)
    with torch.no_grad():
        found = torch.cat([part.encode(chunk) for chunk in part.chunks])
        features = tower.features(tower.tokenize(run.head_fit.texts.take(texts.numpy())))
        own = known.own[texts]
        assert known.corrections is not None
        expected = tower.head.read_unknown(features, own, known.corrections[own])  # type: ignore[operator, union-attr]
    assert torch.allclose(found[torch.argsort(part.order)], expected, atol=1e-5)
    assert bool((known.own >= 0).all())


@pytest.mark.usefixtures("few_suffice")
def test_resumed_run_ends_in_the_same_bytes(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = made(text_folder, test_fraction=0.1)
    whole = run_of(words_path, tmp_path / "whole", settings)
    torch.manual_seed(0)
    expected = whole.go(memory_budget=None, workers=0, progress=False)
    halved = run_of(words_path, tmp_path / "halved", settings)
    torch.manual_seed(0)
    interrupt(halved, step=3)
    again = run_of(words_path, tmp_path / "halved", settings)
    report = again.go(memory_budget=None, workers=0, progress=False)
    for name in ("checkpoints/last.safetensors", "text_tower.safetensors"):
        assert (tmp_path / "halved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (report.test, report.last) == (expected.test, expected.last)


def test_corrections_follow_from_what_a_checkpoint_has() -> None:
    world = World(anchors=60)
    known = LeftOut(world.tower, 60)
    anchors = ClosedForm(world.tower, world.texts[:60], None).fit(world.zimg[:60], torch.arange(60), leaves_out=True)
    assert anchors is not None
    assert anchors.corrections is not None
    known.take(torch.arange(60), anchors)
    first = anchors.corrections.clone()
    known.recover()
    assert known.corrections is not None
    assert torch.equal(known.corrections, first)
    assert "corrections" not in known.state_dict()
    assert torch.equal(known.keys_weight, world.tower.head.keys.weight)  # type: ignore[arg-type, union-attr]


def test_number_of_pairs_decides(
    words_path: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = made(text_folder, lr=None, steps=None, num_evals=None)
    assert run_of(words_path, tmp_path, settings).head_fit.left_out is None
    monkeypatch.setattr(left_out, "MANY_PAIRS", 288)
    run = run_of(words_path, tmp_path, settings)
    assert run.head_fit.left_out is not None
    assert (run.settings.lr, run.settings.epochs, run.settings.num_evals) == (3e-4, 2, 2)
    head = {id(parameter) for parameter in run.model.text_tower.head.parameters()}  # type: ignore[union-attr]
    assert not head & {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    monkeypatch.setattr(left_out, "MANY_PAIRS", 289)
    assert run_of(words_path, tmp_path, settings).head_fit.left_out is None


def test_runs_that_leave_nothing_out(text_folder: Path) -> None:
    settings = made(text_folder)
    tower = open_text_tower(settings.text_tower, width=32)
    assert leaves_out(settings, tower, 500, 20_000)
    assert leaves_out(made(text_folder, lora=2), tower, 500, 20_000)
    assert not leaves_out(settings, tower, 499, 499)
    assert not leaves_out(settings, tower, 50_000, 20_001), "more texts than a head knows"
    for changes in ({"mode": "LL"}, {"mode": "UU"}, {"image_head": True}, {"head": "linear"}, {"closed_form": False}):
        assert not leaves_out(made(text_folder, **changes), tower, 4_000, 4_000)
    tower.carried = KnownTexts(torch.zeros(32), torch.eye(32), torch.eye(32))
    assert not leaves_out(settings, tower, 4_000, 4_000), "another encoder's"
    tower.carried, tower.trained_scale = None, 30.0
    assert not leaves_out(settings, tower, 4_000, 4_000), "a published head stays"
