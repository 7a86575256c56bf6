from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import interrupted_at, write_store
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

import lamplit
from lamplit.errors import StoreError, TuneError, UsageError
from lamplit.inspection import describe
from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
from lamplit.model import LiT
from lamplit.store.arrays import derived
from lamplit.store.arrays.row_vectors import RowVectors
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.tuning import batches, permutation
from lamplit.tuning.building import build_run
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import held_out_recall, split_store
from lamplit.tuning.tune_report import TuneReport

Settings = Callable[..., TuneSettings]
STEP_KEYS = {"step", "epoch", "loss", "lr", "logit_scale", "grad_norm", "pairs_per_second", "seconds"}


@pytest.fixture(scope="module")
def made(text_folder: Path) -> Settings:
    """Settings for the store of words: 6 steps an epoch, 60 in all, 10 evaluations."""

    def settings(**changes: Any) -> TuneSettings:
        values = {"text_tower": f"hf:{text_folder}", "lr": 3e-3, "batch_size": 48, "epochs": 10.0, "num_evals": 10}
        return TuneSettings(**values | {"closed_form": False} | changes)

    return settings


@pytest.fixture(scope="module")
def run(words_path: Path, made: Settings, tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    """Tune with the defaults of `made`, from start to end. To be read only."""
    return tune(words_path, tmp_path_factory.mktemp("runs") / "run", made())


def log_of(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses_of(out: str | Path) -> list[float]:
    return [line["loss"] for line in log_of(out) if "loss" in line]


def weights_of(out: str | Path) -> bytes:
    return (Path(out) / "text_tower.safetensors").read_bytes()


def checkpoint_of(out: str | Path) -> bytes:
    return (Path(out) / "checkpoints" / "last.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "LU"},
        {"mode": "Lu"},
        {"loss": "sigmoid", "lr": 6e-3},
        {"optimizer": "adafactor"},
        pytest.param({"loss": "sigmoid", "optimizer": "adafactor", "lr": 6e-3}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
        {"closed_form": True, "lr": 3e-4},
        pytest.param({"text_tower": "scratch:tiny", "epochs": 2.0, "lr": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_falls_and_recall_beats_chance(
    changes: dict[str, Any], words_path: Path, made: Settings, tmp_path: Path
) -> None:
    report = tune(words_path, tmp_path / "run", made(**changes))
    losses = losses_of(tmp_path / "run")
    assert len(losses) == report.steps == 6 * (made(**changes).epochs or 0)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    assert report.held_out_captions == report.held_out_pairs == 72
    assert report.training_pairs == 288
    chance = 1 / 72
    assert report.best["image_to_text/recall@1"] > 6 * chance
    assert report.best["text_to_image/recall@5"] > 4 * 5 * chance
    assert report.best["mean_recall"] >= max(report.start["mean_recall"], report.last["mean_recall"])
    pretrained = made(**changes).pretrained_text
    assert report.mode == ("LU" if pretrained else "Lu")


def test_closed_form_is_measured_before_the_first_step(
    words_path: Path, made: Settings, run: TuneReport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lamplit"):
        report = tune(words_path, tmp_path / "run", made(closed_form=True, epochs=0.2, head="linear"))
    assert report.start["image_to_text/recall@1"] > 0.9  # the images of this store depend linearly on their words
    assert run.start["image_to_text/recall@1"] < 0.1
    assert log_of(report.out)[0] == {"step": 0, "held_out": report.start, "closed_form": True}
    assert "before step 0, the closed-form head gives image_to_text/recall@1 1.000" in caplog.text


def test_kernel_head_is_saved_and_goes_on(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run with a kernel head; a second run stands on its tower, and holds out nothing that it was tuned on."""
    settings = made(closed_form=True, epochs=0.2)
    assert settings.has_kernel_head
    report = tune(words_path, tmp_path / "run", settings)
    assert report.start["image_to_text/recall@1"] > 10 / 72
    model = lamplit.load(tmp_path / "run")
    assert isinstance(model.text_tower.head, KernelHead)
    anchors = model.text_tower.head.anchors
    assert anchors == len({text for row in Store(words_path).texts() for text in row}) - 72
    assert describe(model)["text head"] == describe(tmp_path / "run")["text head"] == f"kernel, {anchors} known texts"
    assert report.trains["text head"]["state"] == "trains"
    base = model.tuned_on
    assert base is not None
    changes = {"text_tower": f"model:{tmp_path / 'run'}", "val_fraction": 0.5, "seed": 1}
    with caplog.at_level(logging.INFO, "lamplit"):
        again = tune(words_path, tmp_path / "again", made(closed_form=True, epochs=0.2, **changes))
    assert f"knows {anchors} texts, which the new head knows too" in caplog.text
    head = lamplit.load(tmp_path / "again").text_tower.head
    assert len(head.known()) == anchors, "the same texts, each once"
    assert again.held_out_captions == 72  # all that the first run had held out, and no more
    tuned = lamplit.load(tmp_path / "again").tuned_on
    assert tuned is not None
    assert np.array_equal(tuned.captions("held_out"), base.captions("held_out"))
    assert np.array_equal(tuned.captions("train"), base.captions("train"))


def test_run_leaves_its_files(run: TuneReport, made: Settings, words_path: Path) -> None:
    out = Path(run.out)
    assert {file.name for file in out.iterdir()} == {
        "checkpoints",
        "config.json",
        "curves.png",
        "log.jsonl",
        "report.json",
        "settings.json",
        "split.safetensors",
        "text_tower.safetensors",
        "tokenizer",
    }
    assert [file.name for file in (out / "checkpoints").iterdir()] == ["last.safetensors"]
    assert TuneReport(**json.loads((out / "report.json").read_text())) == run
    kept = json.loads((out / "settings.json").read_text())
    assert {len(kept.pop(name)) for name in ("pairs", "vectors")} == {32}
    assert kept == asdict(made()) | {
        "format": 4, "store": str(words_path.resolve()), "images": 360, "tower": Store(words_path).tower.fingerprint
    }  # fmt: skip
    with Image.open(out / "curves.png") as image_file:
        assert image_file.format == "PNG"
        assert min(image_file.size) >= 500


def test_log_has_a_line_per_step_and_per_evaluation(run: TuneReport, made: Settings) -> None:
    lines = log_of(run.out)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert all(set(line) == STEP_KEYS for line in steps)
    rates = [line["lr"] for line in steps]
    assert max(rates) == pytest.approx(made().for_pairs(288).lr)
    assert rates.index(max(rates)) == 5, "a tenth of the steps warms up"
    assert rates[-1] < 0.01 * max(rates)
    assert steps[-1]["epoch"] == 10
    seconds = [line["seconds"] for line in steps]
    assert seconds == sorted(seconds)
    evaluations = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in evaluations] == [0, *range(6, 61, 6)]
    assert evaluations[-1]["held_out"] == run.last
    best = max(evaluations, key=lambda line: line["held_out"]["mean_recall"])
    assert (best["step"], best["held_out"]) == (run.best_step, run.best)


def test_model_is_the_best_one(run: TuneReport, words_path: Path, made: Settings) -> None:
    model = lamplit.load(run.out)
    store = Store(words_path)
    links = split_store(store, "texts", made().val_fraction, made().seed).held_out
    found = held_out_recall(store.vectors(), model.encode_texts(links.texts), links)
    assert found == pytest.approx(run.best)


def test_test_captions_are_measured_once_with_the_best_model(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rate is so high that the first model is better than the last."""
    settings = made(test_fraction=0.1, lr=1.0, epochs=2.0, closed_form=True, mode="LL", image_head=True)
    report = tune(words_path, tmp_path / "run", settings)
    assert (report.training_pairs, report.held_out_captions, report.test_captions, report.test_pairs) == (
        252,
        72,
        36,
        36,
    )
    assert report.best_step < report.steps
    store, model = Store(words_path), lamplit.load(tmp_path / "run")
    found = split_store(store, "texts", settings.val_fraction, settings.seed, settings.test_fraction)
    recalls = held_out_recall(model.read_store(store), model.encode_texts(found.test.texts), found.test)
    assert report.test == pytest.approx(recalls)
    assert report.test["mean_recall"] > report.last["mean_recall"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["test"] == report.test
    # What was tuned on and what was not is kept with the model.
    assert model.tuned_on is not None
    for part in ("train", "held_out", "test"):
        assert np.array_equal(model.tuned_on.captions(part), found.record.captions(part))  # type: ignore[arg-type]
        assert np.array_equal(model.tuned_on.contents(part), found.record.contents(part))  # type: ignore[arg-type]
    [result] = lamplit.evaluate(model, store)
    assert (result.split, result.captions) == ("test", 36)
    assert {name: measured.value for name, measured in result.metrics.items()} == pytest.approx(report.test)


def test_finished_run_is_not_repeated(run: TuneReport, words_path: Path, made: Settings) -> None:
    files = [file for file in Path(run.out).rglob("*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert tune(words_path, run.out, made()) == run
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_no_step_saves_the_start(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = made(closed_form=True, steps=0)
    with caplog.at_level(logging.INFO, "lamplit"):
        report = tune(words_path, tmp_path / "start", settings)
    assert "made held-out recall better" not in caplog.text  # no step was of no use
    assert (report.steps, report.best_step) == (0, 0)
    assert report.start == report.best == report.last
    assert [line["step"] for line in log_of(report.out)] == [0]
    model, store = lamplit.load(report.out), Store(words_path)
    held_out = split_store(store, "texts", 0.2, 0).held_out
    found = held_out_recall(store.vectors(), model.encode_texts(held_out.texts), held_out)
    assert found == pytest.approx(report.start)
    assert tune(words_path, report.out, settings) == report
    assert tune(words_path, tmp_path / "after", made(closed_form=True, steps=1)).start == report.start


def test_other_settings_are_refused_with_what_changed(run: TuneReport, words_path: Path, made: Settings) -> None:
    with pytest.raises(UsageError, match=r"other settings: .*Give another --out") as caught:
        tune(words_path, run.out, made(lr=1e-4, seed=7))
    assert "lr was 0.003 and is 0.0001; seed was 0 and is 7." in str(caught.value)
    assert "epochs" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "demo:minilm",
            "settings is a str; type lamplit.tune(store, out, lamplit.TuneSettings('demo:minilm', epochs=5))",
        ),
        ("hf:x", "settings is a str; type lamplit.tune(store, out, lamplit.TuneSettings('hf:x', epochs=5))"),
        (None, "settings is None; type lamplit.tune(store, out, lamplit.TuneSettings('demo:minilm', epochs=5))"),
    ],
)
def test_settings_of_another_type(words_path: Path, tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        tune(words_path, tmp_path / "run", given)


def test_another_store_is_refused(run: TuneReport, made: Settings, tmp_path: Path) -> None:
    store = write_store(tmp_path / "other.lance", torch.eye(4), [[word] for word in ("red", "blue", "ring", "cross")])
    with pytest.raises(UsageError, match=r"on other pairs: .*it has 4 images and had 360"):
        tune(store, run.out, made())
    with pytest.raises(StoreError, match="no store at"):
        tune(tmp_path / "none.lance", tmp_path / "new", made())


def test_same_store_by_another_path_is_the_same(
    run: TuneReport, words_path: Path, made: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(words_path.parent)
    assert tune("words.lance", run.out, made()) == run


def test_folder_of_another_model_is_left_alone(model_path: Path, words_path: Path, made: Settings) -> None:
    with pytest.raises(UsageError, match="holds a model that is not a run of lamplit tune"):
        tune(words_path, model_path, made())


def test_too_few_pairs_are_refused(tmp_path: Path, made: Settings) -> None:
    store = write_store(tmp_path / "one.lance", torch.eye(2), [["red circle"], []])
    with pytest.raises(UsageError, match="tuning compares pairs, so give at least 2"):
        tune(store, tmp_path / "run", made())


def test_patience_stops_early_and_stays_stopped(words_path: Path, made: Settings, tmp_path: Path) -> None:
    settings = made(closed_form=True, lr=1e-9, patience=2)  # no step can make the recall better than it starts
    report = tune(words_path, tmp_path / "run", settings)
    assert (report.steps, report.best_step) == (12, 0)
    assert len(losses_of(report.out)) == 12
    (tmp_path / "run" / "report.json").unlink()
    assert asdict(tune(words_path, tmp_path / "run", settings)) | {"seconds": 0} == asdict(report) | {"seconds": 0}
    assert len(losses_of(report.out)) == 12


def test_report_after_a_kill(run: TuneReport, words_path: Path, made: Settings, tmp_path: Path) -> None:
    shutil.copytree(run.out, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    again = tune(words_path, tmp_path / "run", made())
    keys = asdict(run).keys() - {"out", "seconds"}
    assert {key: asdict(again)[key] for key in keys} == {key: asdict(run)[key] for key in keys}
    assert again.seconds == pytest.approx(log_of(run.out)[-2]["seconds"], abs=2)


def test_nothing_held_out_keeps_the_last_model(words_path: Path, made: Settings, tmp_path: Path) -> None:
    report = tune(words_path, tmp_path / "run", made(val_fraction=0.0, epochs=2.0, patience=1))
    assert (report.held_out_pairs, report.best, report.last) == (0, {}, {})
    assert report.best_step == report.steps == 15
    with safe_open(tmp_path / "run" / "checkpoints" / "last.safetensors", "pt") as last:
        assert torch.equal(
            load_file(tmp_path / "run" / "text_tower.safetensors")["text_tower.head.weight"],
            last.get_tensor("model.text_tower.head.weight"),
        )


def test_loss_that_is_not_finite_stops_with_advice(words_path: Path, made: Settings, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match=r"in step \d+, at learning rate .*Lower --lr \(it peaks at 1e\+30\)"):
        tune(words_path, tmp_path / "run", made(lr=1e30))
    assert not (tmp_path / "run" / "report.json").exists()
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "run")), "the step is not logged either"


def test_no_column_is_read_as_a_whole(
    words_path: Path, made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        method = getattr(Store, name)

        def noting(store: Store, *args: Any) -> Any:
            read.append(name)
            return method(store, *args)

        return noting

    for name in ("column", "arrow_column", "texts", "vectors", "rows"):
        monkeypatch.setattr(Store, name, note(name))
    tune(words_path, tmp_path / "run", made(steps=2, num_evals=1))
    assert read == []


def test_gradients_are_clipped(words_path: Path, made: Settings, tmp_path: Path) -> None:
    settings = made(steps=4, num_evals=1, grad_clip=0.5)
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    torch.manual_seed(0)
    run = build_run(Store(words_path), tmp_path, settings, torch.device("cpu"))
    run.optimizer.register_step_post_hook(note)  # AdamW scales them in its own pass
    run.go(memory_budget=None, workers=0, progress=False)
    measured = [line["grad_norm"] for line in log_of(tmp_path) if "loss" in line]
    assert min(measured) > 0.6, "before clipping all are larger"
    assert norms == pytest.approx([0.5] * 4, rel=1e-3)


WARNING = "so the text tower has learnt nothing yet"


def test_guessing_warns_once(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tune(words_path, tmp_path / "run", made(lr=1e-9))
    [warning] = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    assert "after 20 steps" in warning
    assert "guessing among 48 pairs gives ln(48) = 3.87" in warning


def test_shuffled_texts_warn(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(words_path)
    texts = store.texts()
    random.Random(0).shuffle(texts)
    shuffled = write_store(tmp_path / "shuffled.lance", store.vectors(), texts)
    report = tune(shuffled, tmp_path / "run", made(lr=1e-4, epochs=4.0))
    assert WARNING in caplog.text
    assert report.last["image_to_text/recall@1"] < 0.1


def test_good_run_does_not_warn(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tune(words_path, tmp_path / "run", made(lr=1e-2))
    assert WARNING not in caplog.text


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_duplicates_are_positives(loss: str, tmp_path: Path, made: Settings) -> None:
    captions = ["red circle", "RED circle", "blue ring", "green cross", "red circle", "yellow square"]
    hashes = ["a", "b", "c", "c", "d", "e"]
    vectors = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    store = write_store(tmp_path / "twice.lance", vectors, [[text] for text in captions], hashes=hashes)
    # One step of a tower without dropout, at a rate that changes nothing: the model is the one of the loss.
    tune(
        store, tmp_path / "run",
        made(text_tower="scratch:tiny", loss=loss, lr=1e-12, epochs=1.0, val_fraction=0.0, precision="fp32"),
    )  # fmt: skip
    [found] = losses_of(tmp_path / "run")
    zimg, ztxt = store.vectors(), lamplit.load(tmp_path / "run").encode_texts([text.lower() for text in captions])

    def by_hand(**ids: list[int]) -> float:
        given: dict[str, Any] = {name: torch.tensor(values) for name, values in ids.items()}
        scale, bias = torch.tensor(10.0), torch.tensor(-math.log(5))
        if loss == "softmax":
            return float(softmax_loss(zimg, ztxt, scale, **given))
        return float(sigmoid_loss(zimg, ztxt, scale, bias, **given))

    image_ids, text_ids = [0, 1, 2, 2, 3, 4], [0, 0, 1, 2, 0, 3]
    assert found == pytest.approx(by_hand(image_ids=image_ids, text_ids=text_ids), rel=1e-5)
    assert found != pytest.approx(by_hand(), rel=1e-3)
    assert found != pytest.approx(by_hand(text_ids=text_ids), rel=1e-3)
    if loss == "sigmoid":  # softmax over equal texts has the same sum whichever of them is whose
        assert found != pytest.approx(by_hand(image_ids=image_ids), rel=1e-3)


def test_other_text_column(words_path: Path, made: Settings, tmp_path: Path) -> None:
    report = tune(words_path, tmp_path / "run", made(text_column="german", lr=6e-3))
    assert report.best["image_to_text/recall@5"] > 5 * 5 / 72
    found = lamplit.search(lamplit.load(report.out), Store(words_path), "gelb Ring small schwarz", k=5)
    assert any("yellow" in hit.texts[0] for hit in found)


def test_random_state_of_the_caller_is_untouched(words_path: Path, made: Settings, tmp_path: Path) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002

    before = states()
    tune(words_path, tmp_path / "run", made(epochs=0.5))
    with pytest.raises(TuneError):
        tune(words_path, tmp_path / "bad", made(lr=1e30))
    assert states() == before


def test_memory_and_the_callers_seed_do_not_matter(
    run: TuneReport, words_path: Path, made: Settings, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    tune(words_path, tmp_path / "run", made(), memory_budget=0)
    assert weights_of(tmp_path / "run") == weights_of(run.out)
    assert checkpoint_of(tmp_path / "run") == checkpoint_of(run.out)


def test_centre_of_the_store_goes_into_the_model(words_path: Path, made: Settings, tmp_path: Path) -> None:
    plain = Store(words_path)
    store = write_store(tmp_path / "centred.lance", plain.vectors(), plain.texts(), centered=True)
    report = tune(store, tmp_path / "run", made(closed_form=True, epochs=0.5, head="linear"))
    model = lamplit.load(report.out)
    assert store.center is not None
    assert model.center is not None
    assert torch.allclose(model.center, store.center)
    assert report.start["image_to_text/recall@1"] > 0.9


def test_long_texts_are_counted(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = tune(words_path, tmp_path / "run", made(context_length=5, epochs=0.2))
    assert report.truncated_texts == 288
    logged = [message for message in caplog.messages if "lose their end" in message]
    assert logged[0].startswith(
        "texts of more than 5 tokens lose their end: 288 of 288 (100%); of a sample, 99 in 100 have"
    )
    assert logged[1:] == ["texts of more than 5 tokens lose their end: 72 of 72"]  # the held-out


def test_missing_image_tower_is_logged(
    words_path: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = tune(words_path, tmp_path / "run", made(epochs=0.2))
    assert "the image tower module:made.up cannot be opened" in caplog.text
    assert "the model is saved without it" in caplog.text
    assert (report.fingerprint_before, report.fingerprint_after) == ("", "")
    assert report.trains["image tower"]["parameters"] == 0


@pytest.fixture(scope="module")
def known_store(image_folder: Path, image_tower: ImageTower, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Embed the drawings with a tower that can be opened again, from a file of weights."""
    folder = tmp_path_factory.mktemp("known")
    save_model(image_tower.backbone, str(folder / "tower.safetensors"))
    embed(
        image_folder / "pairs.csv", folder / "drawings.lance", image_tower="timm:test_vit",
        image_tower_weights=folder / "tower.safetensors", backend="torch",
    )  # fmt: skip
    return Store(folder / "drawings.lance")


def test_locked_tower_is_saved_unchanged(
    known_store: Store, image_folder: Path, made: Settings, tmp_path: Path
) -> None:
    report = tune(known_store, tmp_path / "run", made(closed_form=True, lr=1e-4))
    assert report.fingerprint_before == report.fingerprint_after == known_store.tower.fingerprint
    model = lamplit.load(report.out)
    assert isinstance(model, LiT)
    paths = known_store.column("path")[:5]
    assert torch.allclose(model.encode_images(paths), known_store.vectors()[:5], atol=2e-3)
    trains = report.trains
    assert {name: part["state"] for name, part in trains.items()} == {
        "image tower": "locked", "text tower": "trains", "text head": "trains", "logit scale": "trains",
    }  # fmt: skip
    assert model.text_tower is not None
    assert trains["text head"]["parameters"] == sum(p.numel() for p in model.text_tower.head.parameters())
    assert trains["logit scale"]["parameters"] == 1
    assert trains["image tower"]["parameters"] == sum(p.numel() for p in model.image_tower.parameters())  # type: ignore[union-attr]


def test_tower_whose_weights_changed_is_not_saved(
    known_store: Store, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Path(str(known_store.tower.weights))
    kept = weights.read_bytes()
    try:
        save_file({name: tensor + 0.1 for name, tensor in load_file(weights).items()}, weights)
        tune(known_store, tmp_path / "run", made(epochs=0.2))
    finally:
        weights.write_bytes(kept)
    assert "timm:test_vit is not the tower that made" in caplog.text
    assert not (tmp_path / "run" / "image_tower.safetensors").exists()


# --- Interrupted and resumed


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line.keys() - {"seconds", "pairs_per_second"}} for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_interrupted_run_ends_in_the_same_bytes(
    optimizer: str, run: TuneReport, words_path: Path, made: Settings, tmp_path: Path
) -> None:
    settings = made(optimizer=optimizer, loss="softmax" if optimizer == "adamw" else "sigmoid")
    whole = Path(run.out)
    if settings != made():
        whole = tmp_path / "whole"
        tune(words_path, whole, settings)
    out, steps = tmp_path / "run", []
    for lines in (5, 22, 40):
        with interrupted_at(out / "log.jsonl", lines):
            tune(words_path, out, settings)
        steps.append(log_of(out)[-1]["step"])
    again = tune(words_path, out, settings)
    assert all(0 < step < again.steps for step in steps), f"not interrupted on the way: {steps}"
    assert weights_of(out) == weights_of(whole)
    assert checkpoint_of(out) == checkpoint_of(whole)
    assert comparable(log_of(out)) == comparable(log_of(whole))
    assert [file.name for file in out.rglob("*.partial")] == []


def test_store_that_does_not_fit_into_memory_is_read_in_windows(
    words_path: Path, made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lamplit")
    store, expected = tmp_path / "words.lance", []
    shutil.copytree(words_path, store)
    monkeypatch.setattr(derived, "SMALL", 0)
    for module in (permutation, batches):
        monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(permutation, "WINDOW", 32)
    monkeypatch.setattr(RowVectors, "is_larger_than_memory", True)
    monkeypatch.setattr(RowVectors, "expect", lambda _, first, last: expected.append((first, last)))
    whole, out = tmp_path / "whole", tmp_path / "run"
    report = tune(store, whole, made())
    assert "do not fit into half of the free memory: pairs are shuffled in windows of" in caplog.text
    assert log_of(whole)[0]["in_windows"]
    rows = {row for first, last in expected for row in range(first, last + 1)}
    tuned_on = split_store(Store(store), "texts", 0.2, 0).train.image_index
    assert set(tuned_on.tolist()) <= rows, "every row is read ahead, the first ones too"
    with interrupted_at(out / "log.jsonl", 22):
        tune(store, out, made())
    monkeypatch.setattr(RowVectors, "is_larger_than_memory", False)  # another machine goes on
    expected.clear()
    assert tune(store, out, made()).best == report.best
    assert expected
    assert weights_of(out) == weights_of(whole)
    assert comparable(log_of(out)) == comparable(log_of(whole))


def start_tuning(store: Path, out: Path, text_folder: Path) -> subprocess.Popen[bytes]:
    options = {
        "--text-tower": f"hf:{text_folder}", "--out": out, "--lr": 3e-3, "--batch-size": 24, "--epochs": 30,
        "--num-evals": 40, "--device": "cpu",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-c", "from lamplit.cli.main import main; main()", "tune", str(store), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.slow
def test_killed_run_ends_in_the_same_bytes(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    """Two real processes: one left alone, the other killed with SIGKILL again and again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    left_alone = start_tuning(words_path, whole, text_folder)
    chance = random.Random(0)
    steps: list[int] = []
    kills = 0
    while kills < 3:
        log = killed / "log.jsonl"
        size = log.stat().st_size if log.is_file() else 0
        process = start_tuning(words_path, killed, text_folder)
        # Starting takes seconds; what is to be interrupted begins when the log changes.
        while process.poll() is None and (not log.is_file() or log.stat().st_size == size):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.8))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        complete = [line for line in log.read_text().splitlines() if line.endswith("}")]
        steps.append(json.loads(complete[-1])["step"] if complete else 0)
    assert kills >= 3, f"finished after {kills} kills, at steps {steps}"
    for process in (start_tuning(words_path, killed, text_folder), left_alone):
        errors = process.communicate()[1]
        assert process.returncode == 0, errors.decode()
    assert any(0 < step < 360 for step in steps), steps
    assert weights_of(killed) == weights_of(whole)
    assert checkpoint_of(killed) == checkpoint_of(whole)
    assert comparable(log_of(killed)) == comparable(log_of(whole))
    reports = [json.loads((out / "report.json").read_text()) for out in (killed, whole)]
    assert len({json.dumps(report | {"out": "", "seconds": 0}) for report in reports}) == 1
