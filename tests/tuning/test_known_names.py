"""Class names that a run holds to what its start said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_closed_form import World
from torch.nn import functional as F

from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.images.image_tower import open_image_tower
from lamplit.tuning.building import build_run
from lamplit.tuning.head.known_names import KnownNames
from lamplit.tuning.loop import Run
from lamplit.tuning.settings import TuneSettings


@pytest.fixture(scope="module")
def demo_store(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embed the drawings with a real tower, which has a classifier of 1,000 classes. To be read only."""
    path = tmp_path_factory.mktemp("demo") / "drawings.lance"
    embed(image_folder / "pairs.csv", path, image_tower="demo:efficientnet-lite0")
    return path


def settings_of(text_folder: Path, **changes: object) -> TuneSettings:
    values = {"text_tower": f"hf:{text_folder}", "lr": 3e-3, "batch_size": 16, "steps": 12, "num_evals": 1}
    return TuneSettings(**values | changes)  # type: ignore[arg-type]


def run_of(store: Path, out: Path, settings: TuneSettings) -> Run:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_run(Store(store), out, settings, torch.device("cpu"))


def interrupt(run: Run, step: int) -> None:
    """Let a run go until it has taken so many steps, and break off in the next one."""

    def stop(*_: object) -> None:
        if run.state.step == step:
            raise InterruptedError

    run.optimizer.register_step_pre_hook(stop)
    with pytest.raises(InterruptedError):
        run.go(memory_budget=None, workers=0, progress=False)


def test_loss_is_the_mean_distance_in_logits() -> None:
    world = World()
    classes = ClassHead([[f"{text} again", text] for text in world.texts[:30]], torch.randn(30, 40))
    names = KnownNames(world.tower, classes)
    assert len(names.tokens) == 60
    expected = F.normalize(torch.randn(60, 40), dim=-1)
    names.vectors.copy_(expected)
    scale = torch.tensor(20.0, requires_grad=True)
    drawn = names.draw(pairs=80, seed=3)
    assert len(drawn) == len(set(drawn.tolist())) == 20
    assert torch.equal(drawn, names.draw(pairs=80, seed=3))
    assert not torch.equal(drawn, names.draw(pairs=80, seed=4))
    assert len(names.draw(pairs=2, seed=0)) == 1
    assert sorted(names.draw(pairs=1000, seed=0).tolist()) == list(range(60)), "each at most once"
    ztxt = F.normalize(torch.randn(20, 40), dim=-1).requires_grad_()
    by_hand = sum(20 * (1 - float(ztxt[i].detach() @ expected[name])) for i, name in enumerate(drawn.tolist())) / 20
    loss = names.loss(ztxt, drawn, scale, total=20)
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-5)
    shares = sum(float(names.loss(ztxt[r::3], drawn[r::3], scale, total=20).detach()) for r in range(3))
    assert shares == pytest.approx(by_hand, rel=1e-5), "what three processes add up"
    loss.backward()
    assert scale.grad is None, "a smaller scale would make the names cheaper, and nothing better"
    assert float(names.loss(expected[drawn], drawn, scale, total=20).detach()) == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_names_stay_where_they_were(demo_store: Path, text_folder: Path, tmp_path: Path) -> None:
    moved, start = {}, torch.empty(0)
    settings = settings_of(text_folder, text_tower="demo:minilm", lr=1e-3)  # to an untrained one dropout is noise
    for holds in (True, False):
        run = run_of(demo_store, tmp_path / str(holds), settings)
        names, tower = run.head_fit.names, run.model.text_tower
        assert names is not None
        assert tower is not None
        assert len(names.tokens) > 1000
        if not holds:
            run.head_fit = replace(run.head_fit, names=None)
        torch.manual_seed(0)
        run.go(memory_budget=None, workers=0, progress=False)
        if holds:
            start = names.vectors[::8]
            assert torch.allclose(start.norm(dim=-1), torch.ones(len(start)), atol=1e-5)
        with torch.no_grad():
            now = F.normalize(tower.eval()(names.tokens[::8]), dim=-1)
        moved[holds] = float((1 - (now * start).sum(-1)).mean())
    assert moved[False] > 0.01, "tuning without them moves them"
    assert moved[True] < 0.75 * moved[False]


def test_resumed_run_ends_in_the_same_bytes(demo_store: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = settings_of(text_folder, steps=6, num_evals=3)
    whole = run_of(demo_store, tmp_path / "whole", settings)
    torch.manual_seed(0)
    whole.go(memory_budget=None, workers=0, progress=False)
    halved = run_of(demo_store, tmp_path / "halved", settings)
    torch.manual_seed(0)
    interrupt(halved, step=4)
    again = run_of(demo_store, tmp_path / "halved", settings)
    again.go(memory_budget=None, workers=0, progress=False)
    assert whole.head_fit.names is not None
    assert again.head_fit.names is not None
    assert torch.equal(again.head_fit.names.vectors, whole.head_fit.names.vectors)
    ends = [(tmp_path / name / "checkpoints" / "last.safetensors").read_bytes() for name in ("whole", "halved")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "changes", [{"closed_form": False}, {"mode": "LL"}, {"image_head": True}, {"mode": "UU"}], ids=str
)
def test_runs_that_hold_no_names(
    changes: dict[str, object], demo_store: Path, text_folder: Path, tmp_path: Path
) -> None:
    assert run_of(demo_store, tmp_path, settings_of(text_folder, **changes)).head_fit.names is None


def test_tower_without_a_classifier_has_no_names(store_path: Path, text_folder: Path, tmp_path: Path) -> None:
    assert open_image_tower("timm:test_vit", weights="random").class_head is None
    assert run_of(store_path, tmp_path, settings_of(text_folder)).head_fit.names is None
