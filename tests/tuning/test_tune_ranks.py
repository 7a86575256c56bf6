"""Real processes that share the batches of one run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import interrupted_at, write_store
from rank_processes import LIMIT, TORCHRUN, finish, launch, start
from safetensors.torch import load_file, save_model

from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import open_image_tower
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals")]
FILES = {
    "checkpoints", "config.json", "curves.png", "log.jsonl", "report.json", "settings.json", "split.safetensors",
    "text_tower.safetensors", "tokenizer",
}  # fmt: skip


@pytest.fixture(scope="module")
def still_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the BERT without its dropout, which draws other numbers in each process."""
    folder = tmp_path_factory.mktemp("still")
    for file in text_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def made(folder: Path, **changes: Any) -> TuneSettings:
    values = {"text_tower": f"hf:{folder}", "batch_size": 45, "steps": 20, "num_evals": 5, "test_fraction": 0.1}
    return TuneSettings(**values | {"precision": "fp32"} | changes)


def arguments(store: Path, out: Path, settings: TuneSettings) -> list[object]:
    options = {
        "text-tower": settings.text_tower, "batch-size": settings.batch_size, "steps": settings.steps,
        "num-evals": settings.num_evals, "precision": settings.precision, "test-fraction": settings.test_fraction,
        "loss": settings.loss, "mode": settings.mode, "out": out, "device": "cpu",
    }  # fmt: skip
    options |= {name: value for name in ("lr", "lora") if (value := getattr(settings, name)) is not None}
    options |= {} if settings.image_lr is None else {"image-lr": settings.image_lr, "image-delay": settings.image_delay}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    flags = ["--image-head"] if settings.image_head else []
    return ["-m", "lamplit", "tune", store, *words, *flags, "--json"]


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(out: Path, whole: Path, rounding: float = 1e-5) -> None:
    """Two runs took the same pairs, and their weights are equal but for rounding."""
    steps, expected = ([line for line in log_of(folder) if "loss" in line] for folder in (out, whole))
    assert [line["step"] for line in steps] == [line["step"] for line in expected] == list(range(1, 21))
    assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in expected], rel=50 * rounding)
    found, true = (load_file(folder / "checkpoints" / "last.safetensors") for folder in (out, whole))
    weights = [name for name in true if name.startswith("model.")]
    far = sum(float((found[name] - true[name]).double().norm() ** 2) for name in weights)
    size = sum(float(true[name].double().norm() ** 2) for name in weights)
    assert (far / size) ** 0.5 < rounding


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "sigmoid", "image_head": True, "mode": "LL"},
        {"text_tower": "scratch:tiny", "lr": 1e-5},
        {"lora": 4, "lr": 1e-3},
    ],
    ids=str,
)
def test_two_processes_tune_as_one(
    changes: dict[str, Any], words_path: Path, still_folder: Path, tmp_path: Path
) -> None:
    settings, whole, out = made(still_folder, **changes), tmp_path / "whole", tmp_path / "run"
    alone = tune(words_path, whole, settings)
    [(said, _), second] = finish(start(2, *arguments(words_path, out, settings)))
    assert second == ("", ""), "the second process says nothing"
    report = json.loads(said)
    assert_same_run(out, whole)
    assert {file.name for file in out.iterdir()} - {"text_tower.onnx"} >= FILES
    for name in ("start", "best", "last", "test"):
        figures, expected = (
            {key: value for key, value in found.items() if "median" not in key}  # rounding may move it by a half
            for found in (report[name], getattr(alone, name))
        )
        assert figures == pytest.approx(expected, abs=0.03)
    assert json.loads((out / "report.json").read_text()) == report
    assert tune(words_path, out, settings).steps == 20, "one process takes the run for finished"


@pytest.fixture(scope="module")
def many_words_path(words_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Join captions of the store of words by twos: pairs enough to leave texts out of the closed form."""
    store, generator = Store(words_path), torch.Generator().manual_seed(0)
    texts, vectors = [caption for [caption] in store.texts()], store.vectors()
    chosen = torch.randperm(len(texts) ** 2, generator=generator)[:7_300]
    first, second = chosen // len(texts), chosen % len(texts)
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    path = tmp_path_factory.mktemp("many") / "words.lance"
    write_store(path, vectors[first] + 0.5 * vectors[second], [[f"{texts[a]} and {texts[b]}"] for a, b in pairs])
    return path


def test_two_processes_leave_texts_out_as_one(many_words_path: Path, still_folder: Path, tmp_path: Path) -> None:
    """Each fit of the head magnifies what rounding has changed."""
    settings, whole, out = made(still_folder, lr=3e-5, num_evals=2), tmp_path / "whole", tmp_path / "run"
    alone = tune(many_words_path, whole, settings)
    assert alone.trains["text head"]["state"] == "fitted"
    finish(start(2, *arguments(many_words_path, out, settings)))
    assert_same_run(out, whole, rounding=1e-4)


def test_all_processes_measure_the_best_head(many_words_path: Path, still_folder: Path, tmp_path: Path) -> None:
    """The start is the best here, and the head was fitted again since."""
    settings = made(still_folder, lr=0.1, num_evals=1)
    alone = tune(many_words_path, tmp_path / "whole", settings)
    assert alone.best_step == 0
    [(said, _), _] = finish(start(2, *arguments(many_words_path, tmp_path / "run", settings)))
    assert json.loads(said)["test"] == pytest.approx(alone.test, abs=5e-3)


@pytest.fixture(scope="module")
def drawings_path(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embed copies of the drawings with a tower that can be opened again, and then break one of the images."""
    folder = tmp_path_factory.mktemp("drawings")
    shutil.copytree(image_folder, folder / "images")
    torch.manual_seed(0)
    save_model(open_image_tower("timm:test_vit", weights="random").backbone, str(folder / "tower.safetensors"))
    embed(
        folder / "images" / "pairs.csv", folder / "drawings.lance", image_tower="timm:test_vit",
        image_tower_weights=folder / "tower.safetensors", backend="torch",
    )  # fmt: skip
    broken = sorted((folder / "images").glob("*_*.*"))[7]
    broken.write_bytes(b"no image any more")
    return folder / "drawings.lance"


@pytest.mark.parametrize(
    "changes",
    [{"mode": "UU", "image_head": True, "loss": "sigmoid", "image_delay": 0.5}, {"mode": "uu"}],
    ids=str,
)
def test_two_processes_tune_an_image_tower_as_one(
    changes: dict[str, Any], drawings_path: Path, still_folder: Path, tmp_path: Path
) -> None:
    """One of the images cannot be read, and only the process whose image it is finds that out by itself.

    Of each element of a gradient the optimizer sees little but the sign, which rounding decides where it is zero. So
    runs part later, and the steps until the tower has moved once are compared: loss, and norm of all gradients.
    """
    values = {"batch_size": 15, "lr": 3e-4, "image_lr": 1e-4, "test_fraction": 0.0}
    settings, whole, out = made(still_folder, **values | changes), tmp_path / "whole", tmp_path / "run"
    alone = tune(drawings_path, whole, settings)
    [(said, _), second] = finish(start(2, *arguments(drawings_path, out, settings)))
    assert second == ("", "")
    report = json.loads(said)
    steps, expected = ([line for line in log_of(folder) if "loss" in line] for folder in (out, whole))
    assert len(steps) == len(expected) == 20
    first = next(number for number, line in enumerate(expected) if line["image_lr"] > 0)
    assert first == (10 if settings.image_delay else 0)
    for line, true in zip(steps[: first + 1], expected, strict=False):
        assert [line["loss"], line["grad_norm"]] == pytest.approx([true["loss"], true["grad_norm"]], rel=1e-4)
    assert len(alone.skipped) == 1
    assert report["skipped"] == alone.skipped


def test_interrupted_run_goes_on_with_another_number_of_processes(
    words_path: Path, still_folder: Path, tmp_path: Path
) -> None:
    settings = made(still_folder)
    tune(words_path, tmp_path / "whole", settings)
    less, more = tmp_path / "less", tmp_path / "more"
    processes = start(2, *arguments(words_path, less, settings))
    wait_for_log(less / "log.jsonl", 9, processes)
    for process in processes:
        process.kill()
    finish(processes, -9)
    with interrupted_at(more / "log.jsonl", 9):
        tune(words_path, more, settings)
    assert all(0 < log_of(folder)[-1]["step"] < 20 for folder in (less, more))
    tune(words_path, less, settings)
    finish(start(2, *arguments(words_path, more, settings)))
    for out in (less, more):
        assert_same_run(out, tmp_path / "whole")


def wait_for_log(log: Path, lines: int, processes: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 120
    while not log.is_file() or log.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.002)


def test_a_run_that_diverges_says_so_in_all(words_path: Path, still_folder: Path, tmp_path: Path) -> None:
    for _, errors in finish(start(2, *arguments(words_path, tmp_path / "run", made(still_folder, lr=1e30))), 1):
        assert "Lower --lr (it peaks at 1e+30)" in errors.replace("\n", " ")
        assert "Traceback" not in errors


# As users start them


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line.keys() - {"seconds", "pairs_per_second"}} for line in lines]


def kill_rank(process: subprocess.Popen[str], rank: int) -> None:
    [found] = [
        child for child in psutil.Process(process.pid).children()
        if child.environ().get("RANK") == str(rank)
    ]  # fmt: skip
    found.kill()


def test_killed_process_is_started_again_by_torchrun(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    """With dropout: the undisturbed run ends in the same bytes, though it was never started again."""
    settings, killed, whole = made(text_folder, lr=3e-4, steps=60), tmp_path / "killed", tmp_path / "whole"
    process = launch(*TORCHRUN, "--max-restarts", 1, *arguments(words_path, killed, settings))
    wait_for_log(killed / "log.jsonl", 30, [process])
    kill_rank(process, 1)
    finish([process])
    [(said, _)] = finish([launch(*arguments(words_path, whole, settings), "--processes", 2)])
    assert json.loads(said)["steps"] == 60
    for name in ("text_tower.safetensors", "checkpoints/last.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert comparable(log_of(killed)) == comparable(log_of(whole))


def test_processes_of_the_command_tell_what_failed(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = made(text_folder, lr=3e-4, steps=2000)
    process = launch(*arguments(words_path, tmp_path / "run", settings), "--processes", 2)
    wait_for_log(tmp_path / "run" / "log.jsonl", 10, [process])
    kill_rank(process, 1)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "error: process 1 of 2 ended with exit code -9" in errors
    assert "Traceback" not in errors
