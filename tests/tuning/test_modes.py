"""The paper's lock modes (section 3.3): what is locked stays to the bit, what is not changes, and all is saved."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupted_at
from packed_images import drawings, pack, samples, write_tar
from safetensors.torch import load_file, save_model

import lamplit
from lamplit.errors import StoreError, TowerError, TuneError, UsageError
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.lock import Locked, weights_digest
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.building import build_run
from lamplit.tuning.large_batch import Part
from lamplit.tuning.loop import Run
from lamplit.tuning.optimizers import set_rates
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import held_out_recall, split_store
from lamplit.tuning.tune_report import TuneReport

Settings = Callable[..., TuneSettings]
MODES = ["LL", "LU", "Lu", "UL", "UU", "Uu", "uL", "uU", "uu"]


@pytest.fixture(scope="module")
def made(text_folder: Path) -> Settings:
    """Four steps of 16 pairs, at rates that a tiny tower notices."""

    def settings(mode: str, **changes: Any) -> TuneSettings:
        values: dict[str, Any] = {"text_tower": f"hf:{text_folder}", "lr": 3e-3, "batch_size": 16, "steps": 4}
        if mode[0] in "Uu":
            values["image_lr"] = 1e-3
        return TuneSettings(mode=mode, **values | {"num_evals": 2, "warmup_ratio": 0.0} | changes)  # type: ignore[arg-type]

    return settings


def embedded(name: str, image_folder: Path, folder: Path, pairs: str = "pairs.csv") -> Store:
    """Embed the drawings with an untrained tower that can be opened again, from a file of weights."""
    torch.manual_seed(0)
    save_model(open_image_tower(f"timm:{name}", weights="random").backbone, str(folder / "tower.safetensors"))
    embed(
        image_folder / pairs, folder / "drawings.lance", image_tower=f"timm:{name}",
        image_tower_weights=folder / "tower.safetensors", backend="torch",
    )  # fmt: skip
    return Store(folder / "drawings.lance")


@pytest.fixture(scope="module")
def vit_store(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return embedded("test_vit", image_folder, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def cnn_store(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Embed with a tower that has BatchNorm."""
    return embedded("test_efficientnet", image_folder, tmp_path_factory.mktemp("cnn"))


def log_of(report: TuneReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(report.out) / "log.jsonl").read_text().splitlines()]


def image_weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "image_tower.safetensors")


@pytest.mark.parametrize(("mode", "image_head"), [*((mode, False) for mode in MODES), ("LU", True), ("UU", True)])
def test_modes_train_their_towers_only(
    mode: str, image_head: bool, vit_store: Store, made: Settings, tmp_path: Path
) -> None:
    settings = made(mode, image_head=image_head, num_evals=1, val_fraction=0.0)  # so that the last model is kept
    report = tune(vit_store, tmp_path / "run", settings)
    assert report.mode == mode
    states = {name: part["state"] for name, part in report.trains.items()}
    assert states == {
        "image tower": "locked" if mode[0] == "L" else "trains",
        "text tower": "locked" if mode[1] == "L" else "trains",
        "text head": "trains",
        "logit scale": "trains",
    } | ({"image head": "trains"} if image_head else {})
    assert (report.fingerprint_after == vit_store.tower.fingerprint) == (mode[0] == "L")
    model = lamplit.load(report.out)
    assert isinstance(model.image_tower, Locked), "a loaded model has a locked tower"
    assert model.identity.fingerprint == report.fingerprint_after
    assert model.text_tower is not None
    encoder = open_text_tower(settings.text_tower, width=8).encoder
    assert (weights_digest(model.text_tower.encoder) == weights_digest(encoder)) == (mode[1] == "L")
    before = open_image_tower(vit_store.tower.spec, weights=vit_store.tower.weights).backbone.state_dict()
    after = {name.removeprefix("backbone."): tensor for name, tensor in image_weights(report.out).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before) == (mode[0] == "L")
    if image_head:
        assert model.image_head is not None
        assert not torch.equal(model.image_head.weight, torch.eye(64))
    losses = [line["loss"] for line in log_of(report) if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] != losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["LU", pytest.param("UU", marks=pytest.mark.slow), "uu"])
def test_held_out_recall_is_what_evaluate_finds(mode: str, vit_store: Store, made: Settings, tmp_path: Path) -> None:
    """An unlocked tower's vectors are new: its own store is embedded with the saved model's tower."""
    settings = made(mode, image_head=True, steps=6, seed=1)
    report = tune(vit_store, tmp_path / "run", settings)
    model = lamplit.load(report.out)
    store = vit_store
    if mode[0] != "L":
        assert isinstance(model.image_tower, Locked)
        embed(pairs_of(vit_store), tmp_path / "again.lance", image_tower=model.image_tower.tower, backend="torch")
        store = Store(tmp_path / "again.lance")
    if mode == "uu":  # the best of the others may be the one before the first step
        with pytest.raises(StoreError, match="their vectors cannot be compared"):
            lamplit.evaluate(model, vit_store)
    links = split_store(store, settings.text_column, settings.val_fraction, settings.seed).held_out
    found = held_out_recall(model.read_store(store), model.encode_texts(links.texts), links)
    assert found == pytest.approx(report.best, abs=1e-6)
    if mode[0] == "L":
        [result] = lamplit.evaluate(model, store)
        assert {name: metric.value for name, metric in result.metrics.items()} == pytest.approx(report.best, abs=1e-6)
    image = lamplit.load(report.out, towers="image")
    path = store.column("path")[0]
    assert torch.allclose(image.encode_images([path]), model.read_store(store)[:1], atol=5e-3)


def pairs_of(store: Store) -> Path:
    return Path(store.column("path")[0]).parent / "pairs.csv"


@pytest.mark.slow
@pytest.mark.parametrize("augment", [pytest.param("none", marks=pytest.mark.slow), "inception"])
def test_interrupted_run_ends_in_the_same_bytes(augment: str, vit_store: Store, made: Settings, tmp_path: Path) -> None:
    settings = made("UU", augment=augment, steps=12, num_evals=12, image_delay=0.25)
    tune(vit_store, tmp_path / "whole", settings)
    out, steps = tmp_path / "run", []
    for lines in (4, 12):
        with interrupted_at(out / "log.jsonl", lines):
            tune(vit_store, out, settings)
        steps.append(json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"])
    tune(vit_store, out, settings)
    assert all(0 < step < 12 for step in steps), f"not interrupted on the way: {steps}"
    for file in ("text_tower.safetensors", "image_tower.safetensors", "checkpoints/last.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store_name", "mode"), [pytest.param("vit_store", "UU", marks=pytest.mark.slow), ("cnn_store", "uu")]
)
def test_memory_and_workers_do_not_matter(
    store_name: str, mode: str, made: Settings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: Store = request.getfixturevalue(store_name)
    settings = made(mode, augment="inception", steps=3)
    tune(store, tmp_path / "run", settings)
    tune(store, tmp_path / "again", settings, memory_budget=0, workers=1)
    for file in ("text_tower.safetensors", "image_tower.safetensors", "checkpoints/last.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "moves"), [("UU", False), ("uU", True)])
def test_statistics_of_a_pretrained_tower_stay(
    mode: str, moves: bool, cnn_store: Store, made: Settings, tmp_path: Path
) -> None:
    report = tune(cnn_store, tmp_path / "run", made(mode, num_evals=1, val_fraction=0.0))
    before = open_image_tower(cnn_store.tower.spec, weights=cnn_store.tower.weights).backbone.state_dict()
    after = {name.removeprefix("backbone."): tensor for name, tensor in image_weights(report.out).items()}
    moved = [name for name in before if "running" in name and not torch.equal(before[name], after[name])]
    assert bool(moved) == moves


def run_of(store: Store, settings: TuneSettings, out: Path) -> Run:
    return build_run(store, out, settings, torch.device("cpu"))


def test_gradients_flow_to_both_sides_only_where_both_train(vit_store: Store, made: Settings, tmp_path: Path) -> None:
    for mode in MODES:
        run = run_of(vit_store, made(mode), tmp_path)
        run.image_side.open(run.batches, 0, 0)
        images, kept = run.image_side.part(run.train.image_index[run.batches.rows(0)], 0)
        assert kept.tolist() == list(range(16))
        assert isinstance(images, Part) == (mode[0] != "L")
        assert isinstance(run.text_side.part(torch.arange(4)), Part), "the text head always trains"


def test_rates_of_each_tower(vit_store: Store, made: Settings, tmp_path: Path) -> None:
    settings = made(
        "UU",
        lr=1e-3,
        image_lr=1e-4,
        weight_decay=0.1,
        image_weight_decay=0.01,
        warmup_ratio=0.25,
        image_delay=0.5,
        steps=16,
    )
    optimizer = run_of(vit_store, settings, tmp_path).optimizer
    rates = [set_rates(optimizer, step, 16, settings.warmup_ratio) for step in range(16)]
    assert [rate["image_lr"] for rate in rates[:8]] == [0.0] * 8
    assert max(rate["lr"] for rate in rates) == pytest.approx(1e-3, rel=0.02)
    assert rates[3]["lr"] == pytest.approx(1e-3, rel=0.02), "after a quarter of the run"
    assert max(rate["image_lr"] for rate in rates) == pytest.approx(1e-4, rel=0.1)
    assert rates[9]["image_lr"] == pytest.approx(1e-4, rel=0.1), "after a quarter of what is left"
    decays = {(group["peak"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decays == {(1e-3, 0.1), (1e-3, 0.0), (1e-4, 0.01), (1e-4, 0.0)}


def test_image_tower_waits_for_its_start(vit_store: Store, made: Settings, tmp_path: Path) -> None:
    """Until then it is as the store's, and its images are constants."""
    waits = tune(vit_store, tmp_path / "waits", made("UU", steps=4, image_delay=0.9, num_evals=1, val_fraction=0.0))
    assert [line["image_lr"] for line in log_of(waits) if "loss" in line] == [0.0] * 4
    assert waits.fingerprint_after == vit_store.tower.fingerprint
    starts = tune(vit_store, tmp_path / "starts", made("UU", steps=4, image_delay=0.7, num_evals=1, val_fraction=0.0))
    assert [line["image_lr"] > 0 for line in log_of(starts) if "loss" in line] == [False, False, False, True]
    assert starts.fingerprint_after != vit_store.tower.fingerprint


@pytest.mark.slow
def test_unreadable_images_are_skipped_and_listed(
    image_folder: Path, made: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(image_folder, tmp_path / "images")
    store = embedded("test_vit", tmp_path / "images", tmp_path)
    broken = Path(store.column("path")[7])
    broken.write_bytes(b"no longer an image")
    with caplog.at_level(logging.WARNING, "lamplit"):
        report = tune(store, tmp_path / "run", made("UU"))
    assert report.skipped == {str(broken): "not an image"}
    assert f"1 images could not be read and were left out ({broken}: not an image)" in caplog.text
    stopped = tmp_path / "stopped"
    with interrupted_at(stopped / "log.jsonl", 20):  # by then every image was asked for
        tune(store, stopped, made("UU", steps=40, num_evals=40))
    shutil.copy(image_folder / broken.relative_to(tmp_path / "images"), broken)
    assert tune(store, stopped, made("UU", steps=40, num_evals=40)).skipped == report.skipped
    for path in store.column("path"):
        Path(path).write_bytes(b"nor these")
    with pytest.raises(TuneError, match="none of 12 held-out images could be read"):
        tune(store, tmp_path / "none", made("UU"))
    broken.unlink()
    with pytest.raises(TuneError, match=r"mode UU reads images again in every epoch, and 1 of the store's are not"):
        tune(store, tmp_path / "another", made("UU"))


@pytest.mark.parametrize("name", ["shard.tar", "cells.parquet"])
def test_images_inside_a_file_are_read_as_files_are(
    image_folder: Path, made: Settings, tmp_path: Path, name: str
) -> None:
    """The same store with other paths: every loss is the same to the bit."""
    pack(tmp_path, drawings(image_folder))
    store = embedded("test_vit", tmp_path, tmp_path, name)
    settings = made("UU", augment="inception")
    inside = log_of(tune(store, tmp_path / "inside", settings))
    files = {caption: str(image_folder / file) for file, _, caption in drawings(image_folder)}
    rows = store.rows()
    assert not {row["path"] for row in rows} & set(files.values())
    store.replace([Row(row["id"], files[row["texts"][0]], row["hash"], row["texts"], None) for row in rows])
    beside = log_of(tune(Store(store.path), tmp_path / "beside", settings))
    losses = [[line["loss"] for line in log if "loss" in line] for log in (inside, beside)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_images_of_a_compressed_tar_cannot_be_read_again(image_folder: Path, made: Settings, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", samples(drawings(image_folder)))
    store = embedded("test_vit", tmp_path, tmp_path, "a.tar.gz")
    with pytest.raises(TuneError, match=r"are not files here.*; unpack images that are inside a compressed tar into a"):
        tune(store, tmp_path / "run", made("UU"))


def test_image_settings_need_an_image_tower_that_trains(text_folder: Path) -> None:
    for setting in ({"image_lr": 1e-4}, {"image_weight_decay": 0.0}, {"image_delay": 0.5}, {"augment": "inception"}):
        with pytest.raises(UsageError, match=f"{next(iter(setting))} cannot be given in mode LU"):
            TuneSettings(f"hf:{text_folder}", mode="LU", **setting)  # type: ignore[arg-type]


def test_tower_that_cannot_be_opened_cannot_be_tuned(store_path: Path, made: Settings, tmp_path: Path) -> None:
    """The shared store's tower is random, so that opening it again gives another."""
    with pytest.raises(TuneError, match="the image tower timm:test_vit cannot be tuned"):
        tune(store_path, tmp_path / "run", made("UU"))


def test_tower_from_scratch_needs_none_of_its_weights(store_path: Path, made: Settings, tmp_path: Path) -> None:
    report = tune(store_path, tmp_path / "run", made("uu"))
    assert isinstance(lamplit.load(report.out).image_tower, Locked)


def test_image_head_starts_as_the_identity(vit_store: Store, made: Settings, tmp_path: Path) -> None:
    plain = tune(vit_store, tmp_path / "plain", made("LU"))
    headed = tune(vit_store, tmp_path / "headed", made("LU", image_head=True))
    assert headed.start == pytest.approx(plain.start)


def test_tower_saved_is_the_tower_measured(vit_store: Store, made: Settings, tmp_path: Path) -> None:
    report = tune(vit_store, tmp_path / "run", made("Uu"))
    tower = lamplit.load(report.out).image_tower
    assert isinstance(tower, Locked)
    assert isinstance(tower.tower, ImageTower)
    config = json.loads((Path(report.out) / "config.json").read_text())
    assert config["image_tower"]["fingerprint"] == tower.tower.identity().fingerprint
    assert config["image_tower"]["spec"] == f"model:{Path(report.out).resolve()}"


@pytest.mark.slow
def test_tuned_tower_embeds_by_the_models_folder(vit_store: Store, made: Settings, tmp_path: Path) -> None:
    """And what it embedded can be tuned further, in any mode."""
    report = tune(vit_store, tmp_path / "run", made("UU", num_evals=1, val_fraction=0.0))
    embed(pairs_of(vit_store), tmp_path / "again.lance", image_tower=f"model:{report.out}", backend="torch")
    store = Store(tmp_path / "again.lance")
    model = lamplit.load(report.out)
    assert store.tower.fingerprint == model.identity.fingerprint != vit_store.tower.fingerprint
    assert store.tower.spec == model.identity.spec
    assert torch.allclose(model.read_store(store)[:3], model.encode_images(store.column("path")[:3]), atol=2e-3)
    further = tune(store, tmp_path / "further", made("UU", steps=1))
    assert further.image_tower == store.tower.spec
    with pytest.raises(UsageError, match="has its own weights, preprocessing and pooling"):
        open_image_tower(f"model:{report.out}", weights="random")
    with pytest.raises(TowerError, match="no model at"):
        open_image_tower(f"model:{tmp_path}")
