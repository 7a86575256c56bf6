from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_store

import lamplit
from lamplit.cli import tables
from lamplit.cli.terminal import show
from lamplit.errors import UsageError
from lamplit.inspection import describe
from lamplit.model import load
from lamplit.store.lance_store import Store
from lamplit.tuning.settings import TuneSettings


def test_store(store: Store) -> None:
    found = describe(store.path)
    assert (found["store"], found["images"], found["texts"], found["width"]) == (store.path, 60, 60, 64)
    assert (found["image tower"], found["fingerprint"]) == ("timm:test_vit", store.tower.fingerprint)
    assert (found["backend"], found["centred"], found["image size"]) == ("torch", False, "160x160")
    assert found["metadata columns"] == "german, shape"
    [first, *others] = found["some pairs"].split("\n")
    path, text = first.split(": ")
    assert Path(path).is_file()
    assert text in {texts[0] for texts in store.texts()}
    assert len(others) == 2


def test_long_captions_are_cut(tmp_path: Path) -> None:
    write_store(tmp_path / "long.lance", torch.eye(2), [["猫" * 800], ["a\nb"]])
    [first, second] = describe(tmp_path / "long.lance")["some pairs"].split("\n")
    assert first.endswith(f": {'猫' * 200}...")
    assert second.endswith(": a b")


def test_model(model_path: Path, store: Store) -> None:
    found = describe(model_path)
    assert found["model"] == str(model_path)
    assert found["fingerprint"] == store.tower.fingerprint
    assert found["text tower"].startswith("hf:")
    assert (found["width"], found["context length"], found["centred"]) == (64, 32, False)
    assert (found["text head"], describe(load(model_path))["text head"]) == ("linear", "linear")
    assert found["files"] == "image_tower.safetensors, text_tower.safetensors"
    assert not [name for name in found if name.startswith("held-out")]


def test_model_of_a_run_tells_its_recall(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = TuneSettings(f"hf:{text_folder}", epochs=0.1, batch_size=32)
    report = lamplit.tune(words_path, tmp_path / "run", settings)
    found = describe(tmp_path / "run")
    held_out = {name.removeprefix("held-out "): value for name, value in found.items() if name.startswith("held-out")}
    assert held_out == report.best


def test_figures_are_rounded_once(model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recall = {"image_to_text/recall@1": 0.38848, "image_to_text/median_rank": 2.0, "text_to_image/median_rank": 2.5}
    shutil.copy(model_path / "config.json", tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"best": recall}))
    show(describe(tmp_path), tables.description, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    expected = ["recall@1\t0.388", "median_rank\t2"]
    assert lines[-3:-1] == [f"held-out image_to_text/{line}" for line in expected]
    assert lines[-1] == "held-out text_to_image/median_rank\t2.500"


def test_model_without_a_text_tower(model_path: Path, tmp_path: Path) -> None:
    lamplit.load(model_path, towers="image").save(tmp_path / "image")
    found = describe(tmp_path / "image")
    assert (found["text tower"], found["context length"]) == ("none", "none")
    assert found["files"] == "image_tower.safetensors"


def test_model_whose_config_has_what_is_needed_alone(model_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for key in ("center", "image_head", "logit_bias"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert describe(folder) == describe(model_path) | {"model": str(folder)}
    (folder / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged: format is missing"):
        describe(folder)


def test_neither(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(UsageError, match=r"is neither a model .* nor a store"):
            describe(path)


def test_open_objects(store: Store, model_path: Path) -> None:
    assert describe(store) == describe(store.path)
    model, saved = describe(lamplit.load(model_path, device="cpu")), describe(model_path)
    assert model.pop("device") == "cpu"
    assert model.pop("model") == model_path.name
    assert model == {name: saved[name] for name in model}
