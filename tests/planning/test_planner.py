from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lamplit
from lamplit.errors import UsageError
from lamplit.model import save_image_tower
from lamplit.planning import timings
from lamplit.planning.plan_report import Plan, Stage
from lamplit.planning.planner import plan
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.settings import TuneSettings

HEADER = 64 * 1024  # of a safetensors file, at most


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "SECONDS", 0.2)


def test_counts_and_bytes_are_those_of_the_runs(
    image_folder: Path, image_tower: ImageTower, text_folder: Path, tmp_path: Path
) -> None:
    settings = TuneSettings(f"hf:{text_folder}", batch_size=16, head="linear", epochs=2, num_evals=1)
    found = plan(image_folder / "pairs.csv", settings, image_tower=image_tower)
    embedded = lamplit.embed(image_folder / "pairs.csv", tmp_path / "s.lance", image_tower=image_tower)
    store = lamplit.Store(tmp_path / "s.lance")
    report = lamplit.tune(store, tmp_path / "run", settings)
    texts = store.texts()
    assert (found.images, found.backend) == (len(store), embedded.backend)
    assert found.pairs == sum(map(len, texts))
    assert found.captions == len({text for row in texts for text in row})
    assert found.steps == report.steps
    halves = np.concatenate(list(store.half_blocks()))
    assert found.embed.disk["vectors"] == halves.nbytes
    text_tower = (tmp_path / "run" / "text_tower.safetensors").stat().st_size
    assert 0 <= text_tower - found.tune.disk["text tower"] < HEADER
    save_image_tower(image_tower, tmp_path)
    saved = (tmp_path / "image_tower.safetensors").stat().st_size
    assert 0 <= saved - found.tune.disk["image tower"] < HEADER
    checkpoint = (tmp_path / "run" / "checkpoints" / "last.safetensors").stat().st_size
    assert 0 <= checkpoint - found.tune.disk["checkpoint"] < HEADER
    for stage in (found.embed, found.tune):
        assert stage.seconds == pytest.approx(sum(stage.parts.values()))
        assert all(seconds >= 0 for seconds in stage.parts.values())
    assert found.dollars is None


def test_more_steps_take_longer(image_folder: Path, image_tower: ImageTower, text_folder: Path) -> None:
    def tuning(**given: int) -> Stage:
        settings = TuneSettings(f"hf:{text_folder}", batch_size=16, **given)
        return plan(image_folder / "pairs.csv", settings, image_tower=image_tower, dollars_per_hour=3600.0).tune

    few, many = tuning(steps=1), tuning(steps=1000)
    assert many.parts["steps"] > few.parts["steps"] > 0  # each is timed by itself, on a machine with other work
    assert few.parts["closed form"] > 0


def test_a_locked_encoder_reads_each_text_once(
    image_folder: Path, image_tower: ImageTower, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    forward = TextTower.forward
    monkeypatch.setattr(TextTower, "forward", lambda tower, tokens: read.append(len(tokens)) or forward(tower, tokens))
    for mode in ("LL", "LU"):
        read.clear()
        settings = TuneSettings(f"hf:{text_folder}", mode=mode, head="linear", batch_size=16, steps=100)
        found = plan(image_folder / "pairs.csv", settings, image_tower=image_tower).tune
        assert (found.parts["texts"] > 0) == (not read) == (mode == "LL")


def test_backend_is_that_of_so_many_images(
    image_folder: Path, image_tower: ImageTower, text_folder: Path, tmp_path: Path
) -> None:
    lamplit.embed(image_folder / "pairs.csv", tmp_path / "s.lance", image_tower=image_tower, backend="onnx")

    def planned(**given: int) -> str:
        settings = TuneSettings(f"hf:{text_folder}", steps=1)
        return plan(image_folder / "pairs.csv", settings, image_tower=image_tower, **given).backend

    assert planned() == "torch"  # too few to start another
    # It is there already, and faster, but what is timed are milliseconds: on a busy machine it loses some times.
    assert any(planned(images=10_000) == "onnx" for _ in range(8))


def test_a_step_is_taken_in_the_precision_of_the_run(
    image_folder: Path, image_tower: ImageTower, text_folder: Path
) -> None:
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, inputs: object, output: object) -> None:
        if torch.is_grad_enabled() and isinstance(module, nn.Linear) and isinstance(output, torch.Tensor):
            seen.add(output.dtype)

    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        settings = TuneSettings(f"hf:{text_folder}", steps=1, precision=precision)  # type: ignore[arg-type]
        with torch.nn.modules.module.register_module_forward_hook(look):
            plan(image_folder / "pairs.csv", settings, image_tower=image_tower)
        assert seen == {expected}


def test_price_is_that_of_the_time(image_folder: Path, image_tower: ImageTower, text_folder: Path) -> None:
    settings = TuneSettings(f"hf:{text_folder}", steps=10**9)
    found = plan(image_folder / "pairs.csv", settings, image_tower=image_tower, dollars_per_hour=2.0)
    assert found.dollars == pytest.approx((found.embed.seconds + found.tune.seconds) / 3600 * 2, abs=0.01)


def test_a_sample_stands_for_more(image_folder: Path, image_tower: ImageTower, text_folder: Path) -> None:
    def planned(**given: int) -> Plan:
        settings = TuneSettings(f"hf:{text_folder}", batch_size=16)
        source = image_folder / "pairs.csv"
        return plan(source, settings, image_tower=image_tower, dollars_per_hour=1e6, **given)

    one, many, together = planned(), planned(images=60_000), planned(images=60_000, machines=2, gpus=10**9)
    assert (many.images, many.pairs, many.captions) == (60_000, 1000 * one.pairs, 1000 * one.captions)
    assert many.steps == together.steps > 500 * one.steps
    assert many.embed.disk["vectors"] == 1000 * one.embed.disk["vectors"]
    assert many.tune.disk == one.tune.disk, "the head of so few distinct words is known whole"
    assert together.embed.parts["images"] + together.tune.parts["steps"] < 1e-3 < many.tune.parts["steps"]
    hours = (together.embed.seconds + together.tune.seconds) / 3600
    assert together.dollars == pytest.approx(hours * 1e6 * 2, rel=1e-4)
    assert any("divided by 2000000000" in note for note in together.notes)
    assert any("taken for a sample, of 60 images" in note for note in many.notes)


def test_refused(image_folder: Path, image_tower: ImageTower, text_folder: Path, tmp_path: Path) -> None:
    settings = TuneSettings(f"hf:{text_folder}", mode="UU")
    with pytest.raises(UsageError, match="a plan is for a locked image tower, and in mode UU it trains"):
        plan(image_folder / "pairs.csv", settings, image_tower=image_tower)
    with pytest.raises(UsageError, match="10 images were to be reckoned for, and the source has 60"):
        plan(image_folder / "pairs.csv", TuneSettings(f"hf:{text_folder}"), image_tower=image_tower, images=10)
    (tmp_path / "one.csv").write_text(f"image,text\n{next(image_folder.glob('*.png'))},a dog\n")
    with pytest.raises(UsageError, match=r"one\.csv has 1 pairs of an image and a text; tuning compares pairs"):
        plan(tmp_path / "one.csv", TuneSettings(f"hf:{text_folder}"), image_tower=image_tower)
