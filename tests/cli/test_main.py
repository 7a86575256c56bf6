from __future__ import annotations

import inspect
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import typer
from pyarrow import parquet
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from two_tower_families import families

from lamplit._version import __version__
from lamplit.cli import main as cli
from lamplit.cli import tables, training
from lamplit.cli.terminal import print_note, read_lines
from lamplit.data.decoding.images import Skipped
from lamplit.evaluation.evaluator import evaluate
from lamplit.retrieval.searcher import Hit
from lamplit.store.arrays.derived import SMALL, measured_recall
from lamplit.store.embed.embedding import EmbedReport
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower
from lamplit.tuning.settings import TuneSettings

COMMANDS = [
    "embed",
    "import",
    "embed-texts",
    "tune",
    "classes",
    "classify",
    "search",
    "locate",
    "index",
    "duplicates",
    "evaluate",
    "report",
    "compare",
    "merge",
    "export",
    "app",
    "info",
    "data",
]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Lamplit = Callable[..., Result]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Undo what `main` sets for its process."""
    logger = logging.getLogger("lamplit")
    level, environment = logger.level, dict(os.environ)
    yield
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def lamplit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lamplit:
    """Run the command line in this process."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["lamplit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Result(int(ended.value.code or 0), *capfd.readouterr())

    return run


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "lamplit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


# --- Help and errors


def test_home_is_expanded_behind_an_option(lamplit: Lamplit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells expand `~` at the beginning of a word alone, so `--out=~/x` comes as it was typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "vectors.npy", np.eye(3, dtype=np.float32))
    done = lamplit("import", "vectors.npy", "--image-tower", "mine", "--out=~/a.lance")
    assert done.code == 0, done.err
    assert len(Store(tmp_path / "a.lance")) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"vectors.npy", "a.lance"}


def test_python_m_lamplit_is_the_command(lamplit: Lamplit) -> None:
    done = process("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"lamplit {__version__}\n"
    assert lamplit("--version").out == done.stdout


def test_help_brings_no_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']; from lamplit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as ended: sys.exit(ended.code or 3 * bool({'torch', 'numpy', 'lance'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_one_says_otherwise(given: dict[str, str], expected: str) -> None:
    code = (
        "import os, sys; sys.argv[1:] = ['--version']; from lamplit.cli.main import main\n"
        "try: main()\n"
        "finally: print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1] == expected, done.stderr


@pytest.mark.parametrize("command", [*COMMANDS, "data get"])
def test_every_command_has_help(lamplit: Lamplit, command: str) -> None:
    code, out, _ = lamplit(*command.split(), "--help")
    assert code == 0
    assert "Usage: lamplit" in out
    if command != "data":
        assert "--json" in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["info"],
        ["info", "a", "b"],
        ["tune", "a.lance", "--text-tower", "demo:minilm", "--out", "b", "--lr", "fast"],
        ["tune", "a.lance", "--text-tower", "demo:minilm"],
        ["search", "model", "store", "words", "-k", "0"],
        ["embed", "a.csv", "--image-tower", "timm:test_vit", "--out", "b", "--backend", "steam"],
        ["embed", "a.csv", "--image-tower", "timm:test_vit", "--out", "b", "--shard", "2"],
        ["embed", "a.csv", "--image-tower", "timm:test_vit", "--out", "b", "--shard", "2/2"],
        ["embed", "a.csv", "--image-tower", "timm:test_vit", "--out", "b", "--cluster", "dask"],
        ["tune", "a.lance", "--text-tower", "demo:minilm", "--out", "b", "--loss", "hinge"],
        ["tune", "a.lance", "--text-tower", "demo:minilm", "--out", "b", "--batch-size", "1"],
        ["search", "model", "store"],
        ["search", "none", "none.lance", " "],
        ["search", "model", "store", "words", "--json", "-0"],
        ["classify", "model", "a.png"],
        ["classify", "model", "a.png", "--classes", "a", "--classes-file", "b"],
        ["classify", "model", "a.png", "--classes-file", "none.txt"],
        ["info", "none"],
        ["data", "get", "nothing"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_no_traceback(lamplit: Lamplit, arguments: list[str]) -> None:
    code, out, err = lamplit(*arguments)
    assert code == 2
    assert "Traceback" not in out + err
    assert err if arguments else out + err


def test_search_with_words_outside_quotes(lamplit: Lamplit) -> None:
    code, _, err = lamplit("search", "model", "store", "a", "red", "ring", "-k", 3)
    assert code == 2
    assert err.splitlines() == ['error: put the words in quotes: lamplit search MODEL STORE "a red ring"']


def test_evaluate_with_classes_but_no_labels(lamplit: Lamplit, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ring\n")
    code, _, err = lamplit("evaluate", "model", "store", "--classes-file", tmp_path / "classes.txt")
    assert code == 2
    assert "--classes-file needs --label-column" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["store", "--resize-mode", "squash"], "--resize-mode is for benchmarks, and there is none: give --benchmark "),
        (["store", "--few-shot", "3", "--canonical"], "--canonical and --few-shot are for benchmarks"),
        (["store", "--workers", "0"], "--workers is for benchmarks"),
        (["--benchmark", "folder=x", "--split", "auto"], "--split is for own data, and there is none: give a store "),
        (["--benchmark", "folder=x", "--text-column", "a", "--label-column", "b"], "--text-column and --label-column "),
        (["--benchmark", "folder=x", "--classes-file", "none"], "--classes-file is for own data"),
        (["--split", "all"], "nothing to evaluate on"),
        (["store", "--benchmark", "folder", "--few-shot", "3", "--split", "all"], "'folder' is not NAME=PATH"),
    ],
)
def test_evaluate_refuses_options_that_change_nothing(lamplit: Lamplit, arguments: list[str], message: str) -> None:
    code, out, err = lamplit("evaluate", "model", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tune", "none.lance", "--text-tower", "demo:minilm", "--out", "x"],
            "error: no store at none.lance; make one",
        ),
        (["embed", "none.csv", "--image-tower", "timm:test_vit", "--out", "x.lance"], "error: "),
    ],
)
def test_our_errors_are_1_and_one_line(
    lamplit: Lamplit, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = lamplit(*arguments)
    assert code == 1
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith(message)


@pytest.mark.slow
def test_long_error_stays_one_line_in_a_real_process(tmp_path: Path) -> None:
    path = tmp_path / ("long name " * 15) / "[bold]none[/bold].lance"
    done = process("info", path, COLUMNS="40", OMP_NUM_THREADS="1")
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {path} is neither a model")


def test_folder_that_cannot_be_made_is_one_line(lamplit: Lamplit, words_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = lamplit("tune", words_path, "--text-tower", "scratch:tiny", "--out", tmp_path / "file" / "run")
    assert code == 1
    assert "Traceback" not in err
    assert str(tmp_path / "file" / "run") in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--debug", "info", "none"], ["info", "none", "--debug"]])
def test_debug_shows_the_traceback_before_the_line(lamplit: Lamplit, arguments: list[str]) -> None:
    code, _, err = lamplit(*arguments)
    assert code == 2
    assert "Traceback" in err
    assert "inspection.py" in err
    assert err.splitlines()[-1].startswith("error: none is neither")
    assert "Traceback" not in lamplit("info", "none").err


def test_debug_behind_two_dashes_is_a_word(lamplit: Lamplit) -> None:
    _, _, err = lamplit("info", "--", "--debug")
    assert err.startswith("error: --debug is neither")


# --- The settings of a run


def test_options_of_tune_are_the_settings() -> None:
    parameters = inspect.signature(training.tune).parameters
    options = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in ("context", "store", "out", "recipe", "workers", "processes", "log_to", "device", "as_json")
    }
    # A recipe may name the text tower, so that it is no option that must be given.
    assert options == {field.name: field.default for field in fields(TuneSettings)} | {"text_tower": None}
    assert list(options) == [field.name for field in fields(TuneSettings)], "in the same order"
    typed: Any = typer.main.get_command(cli.app)
    flags = {flag for parameter in typed.commands["tune"].params for flag in parameter.opts}
    assert {f"--{field.name.replace('_', '-')}" for field in fields(TuneSettings)} <= flags


# --- The main job


@pytest.fixture(scope="module")
def tower_file(image_tower: ImageTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tower") / "tower.safetensors"
    save_model(image_tower.backbone, str(file))
    return file


def parsed(result: Result) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_pooling(lamplit: Lamplit, image_folder: Path, tower_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "both.lance"
    embedding = [
        "embed",
        image_folder / "pairs.csv",
        "--out",
        store,
        "--backend",
        "torch",
        "--workers",
        0,
        "--image-tower",
    ]
    vit = [*embedding, "timm:test_vit", "--image-tower-weights", tower_file]
    assert parsed(lamplit(*vit, "--pool", "cls+mean", "--json"))["embedded"] == 60
    described = parsed(lamplit("info", store, "--json"))
    assert described["pooling"] == "cls+mean"
    assert described["width"] == 128
    convolutions = lamplit(*embedding, "timm:test_resnet", "--image-tower-weights", "random", "--pool", "cls")
    assert convolutions.code == 1
    assert "it offers mean." in convolutions.err
    unknown = lamplit(*vit, "--pool", "max")
    assert unknown.code == 2
    assert "expected cls, mean, map, cls+mean" in unknown.err


def test_embed_shards(lamplit: Lamplit, image_folder: Path, tower_file: Path, tmp_path: Path) -> None:
    embedding = [
        "embed", image_folder / "pairs.csv", "--image-tower", "timm:test_vit", "--image-tower-weights", tower_file,
        "--out", tmp_path / "a.lance", "--backend", "torch", "--workers", 0, "--unit-rows", 7,
    ]  # fmt: skip
    first = lamplit(*embedding, "--shard", "1/2")
    assert first.code == 0
    assert "units\t9\n" in first.out
    assert "note: 5 of 9 units are not in the store yet; the last process finishes it" in first.err
    last = lamplit(*embedding, "--shard", "0/2", "--json")
    report = parsed(last)
    assert (report["embedded"], report["units"], report["units_left"]) == (32, 9, 0)
    assert "note:" not in last.err
    assert len(Store(tmp_path / "a.lance")) == 60


def test_main_job(lamplit: Lamplit, image_folder: Path, tower_file: Path, text_folder: Path, tmp_path: Path) -> None:
    """Embed, tune, ask: every command once as a table and once as JSON."""
    store, run = tmp_path / "[red] drawings.lance", tmp_path / "runs" / "[bold]run"
    embedding = [
        "embed", image_folder / "pairs.csv", "--image-tower", "timm:test_vit", 
        "--image-tower-weights", tower_file, "--out", store,
        "--backend", "torch", "--workers", 0,
    ]  # fmt: skip
    made = parsed(lamplit(*embedding, "--json"))
    assert made["store"] == str(store)
    assert made["embedded"] == 60
    assert made["skipped"] == []
    again = lamplit(*embedding)
    assert again.code == 0
    assert f"store\t{store}\n" in again.out
    assert "unchanged\t60\n" in again.out

    tuning = ["tune", store, "--text-tower", f"hf:{text_folder}", "--out", run, "--epochs", 2, "--batch-size", 16]
    report = parsed(lamplit(*tuning, "--lr", "1e-4", "--json"))
    assert report["out"] == str(run)
    assert report["training_pairs"] == 48
    assert report["held_out_pairs"] == 12
    table = lamplit(*tuning, "--lr", "1e-4")
    assert table.code == 0
    assert f"model\t{run}\n" in table.out
    assert f"fingerprint before\t{report['fingerprint_after']}\n" in table.out
    assert f"fingerprint after\t{report['fingerprint_after']}\n" in table.out
    assert f"image_to_text/recall@1\t{report['start']['image_to_text/recall@1']:.3f}\t" in table.out
    changed = lamplit(*tuning, "--lr", "1e-3")
    assert changed.code == 2
    assert "lr was 0.0001 and is 0.001" in changed.err

    assert parsed(lamplit("info", store, "--json"))["images"] == 60
    assert parsed(lamplit("info", run, "--json"))["model"] == str(run)
    assert "images\t60\n" in lamplit("info", store).out
    assert f"model\t{run}\n" in lamplit("info", run).out

    hits = parsed(lamplit("search", run, store, "a red ring", "-k", 4, "--json"))
    assert len(hits) == 4
    assert set(hits[0]) == {"score", "id", "path", "texts", "metadata", "copies"}
    lines = lamplit("search", run, store, "a red ring", "-k", 4).out.splitlines()
    assert lines == ["score\tpath\ttexts", *(f"{h['score']:.3f}\t{h['path']}\t{h['texts'][0]}" for h in hits)]
    by_image = parsed(lamplit("search", run, store, "--image", hits[0]["path"], "--json"))
    assert by_image[0]["path"] == hits[0]["path"]
    assert len(by_image) == 10

    retrieval, zero_shot = parsed(lamplit("evaluate", run, store, "--label-column", "shape", "--json"))
    assert retrieval["captions"] == 12
    assert zero_shot["classes"] == 5
    assert {name: metric["value"] for name, metric in retrieval["metrics"].items()} == pytest.approx(report["best"])
    assert "held out" in retrieval["protocol"]["split"]
    assert [result.captions for result in evaluate(run, store)] == [12], "the function measures what the command does"
    [everything] = parsed(lamplit("evaluate", run, store, "--split", "all", "--json"))
    assert (everything["protocol"]["split"], everything["captions"]) == ("all captions, column texts", 60)
    shown = lamplit("evaluate", run, store, "--label-column", "shape", "--out", tmp_path / "results")
    assert f"accuracy@1\t{zero_shot['metrics']['accuracy@1']['value']:.3f}\t" in shown.out
    assert len(list((tmp_path / "results").glob("*.json"))) == 2


@pytest.mark.slow
def test_model_of_another_library(lamplit: Lamplit, image_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """From its image side to a table with one's own tuned text tower beside it."""
    families()[0].save(tmp_path / "clip")
    clip, store, run = f"hf:{tmp_path / 'clip'}", tmp_path / "s.lance", tmp_path / "run"
    assert lamplit("embed", image_folder / "pairs.csv", "--image-tower", clip, "--out", store).code == 0
    assert len(parsed(lamplit("search", clip, store, "a red ring", "-k", 4, "--json"))) == 4
    assert lamplit("classify", clip, image_folder / "large_red_ring.png", "--classes", "ring,cross").code == 0
    assert f"model\t{clip}\n" in lamplit("info", clip).out
    tuned = lamplit("tune", store, "--text-tower", f"hf:{text_folder}", "--steps", 2, "--batch-size", 8, "--out", run)
    assert tuned.code == 0
    shown = lamplit("evaluate", run, store, "--beside", clip).out
    assert "model\tbenchmark\tlanguage\tmetric" in shown
    assert {"run", "clip"} <= {line.split("\t")[0] for line in shown.splitlines()}
    mine, theirs = parsed(lamplit("evaluate", run, store, "--beside", clip, "--json"))
    assert mine["captions"] == theirs["captions"] == 12


def test_folder_that_changes(lamplit: Lamplit, image_folder: Path, tower_file: Path, tmp_path: Path) -> None:
    """Embed, list the duplicates, rename and delete, embed again."""
    folder, store = tmp_path / "[red] folder", tmp_path / "drawings.lance"
    folder.mkdir()
    for file in sorted(image_folder.glob("*_red_*"))[:5]:
        shutil.copy(file, folder)
    first, second, *_ = sorted(folder.iterdir())
    copy = folder / f"copy of {first.name}"
    shutil.copy(first, copy)
    embedding = [
        "embed", folder, "--image-tower", "timm:test_vit", 
        "--image-tower-weights", tower_file, "--out", store,
        "--backend", "torch", "--workers", 0,
    ]  # fmt: skip
    report = parsed(lamplit(*embedding, "--json"))
    assert (report["embedded"], report["copies"]) == (5, 1)

    sheet = tmp_path / "sheet.png"
    [group] = parsed(lamplit("duplicates", store, "--threshold", "0.99999", "--sheet", sheet, "--json"))
    assert [image_file["path"] for image_file in group["images"]] == [str(copy), str(first)]
    assert [image_file["copy_of"] for image_file in group["images"]] == [None, copy.name]
    assert sheet.is_file()
    lines = lamplit("duplicates", store, "--threshold", "0.99999").out.splitlines()
    assert lines == [
        "2 images in 1 groups",
        "group\tnearest\tpath\tsame content as",
        f"1\t1.000\t{copy}\t",
        f"\t1.000\t{first}\t{copy.name}",
    ]
    assert lamplit("duplicates", store, "--threshold", "2").code == 2

    copy.unlink()
    second.rename(folder / "new.png")
    again = lamplit(*embedding).out
    assert "moved or copied\t1\n" in again
    assert "missing\t2; their rows stay, --prune deletes them\n" in again
    assert "pruned\t2\n" in lamplit(*embedding, "--prune").out
    assert parsed(lamplit("info", store, "--json"))["images"] == 5
    assert parsed(lamplit("duplicates", store, "--threshold", "0.99999", "--json")) == []


@pytest.mark.slow
def test_import(lamplit: Lamplit, text_folder: Path, tmp_path: Path) -> None:
    for name in ("img_emb", "metadata"):
        (tmp_path / "clip" / name).mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float16)
    vectors[3] = 0
    np.save(tmp_path / "clip" / "img_emb" / "img_emb_0.npy", vectors)
    table = pa.table({"image_path": [f"{i}.png" for i in range(9)], "alt": [f"ring {i}" for i in range(9)]})
    parquet.write_table(table, tmp_path / "clip" / "metadata" / "metadata_0.parquet")
    store, run, tower = tmp_path / "[red].lance", tmp_path / "run", "acme:[bold]v3"
    command = ["import", tmp_path / "clip", "--image-tower", tower, "--out", store, "--text-column", "alt"]

    shown = lamplit(*command)
    assert shown.code == 0
    assert f"tower\t{tower}\n" in shown.out
    assert "width\t16\n" in shown.out
    assert "imported\t8\n" in shown.out
    assert "skipped\t1; reasons in " in shown.out
    again = lamplit(*command)
    assert again.code == 0
    assert "imported\t0\n" in again.out
    assert "known\t8\n" in again.out
    made = parsed(lamplit(*command[:-3], tmp_path / "other.lance", "--json"))
    assert made["image_tower"] == tower
    assert made["imported"] == 8
    assert made["texts"] == 0
    assert len(made["skipped"]) == 1

    assert parsed(lamplit("info", store, "--json"))["image tower"] == tower
    report = parsed(lamplit("tune", store, "--text-tower", f"hf:{text_folder}", "--out", run, "--epochs", 1, "--json"))
    assert report["image_tower"] == tower
    assert len(parsed(lamplit("search", run, store, "ring 5", "-k", 3, "--json"))) == 3
    assert "held out" in parsed(lamplit("evaluate", run, store, "--json"))[0]["protocol"]["split"]
    (tmp_path / "a.png").touch()
    for asked in (
        ["search", run, store, "--image", tmp_path / "a.png"],
        ["classify", run, tmp_path / "a.png", "--classes", "a,b"],
    ):
        result = lamplit(*asked)
        assert result.code == 1
        assert result.err.splitlines()[-1].startswith(
            f"error: this model was tuned on imported vectors, made by {tower}"
        )


def test_classify(lamplit: Lamplit, model_path: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new.folder"
    (folder / "inner.png").mkdir(parents=True)
    shutil.copy(next(image_folder.glob("large_red_ring.*")), folder / "inner.png" / "[red]ring.png")
    (folder / "bad.png").write_text("no image")
    for name in (".DS_Store", "._ring.png", "Thumbs.db", "ring.txt", "holiday.mp4"):  # not images, as for embed
        (folder / name).write_text("x")
    (tmp_path / "classes.txt").write_text("ring\n\n  Größe \ncircle\n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("a {}\n")
    by_words = ["classify", model_path, folder, "--classes", "ring, Größe,circle,", "--top", 2]
    by_files = [
        "classify", model_path, folder, "--classes-file", tmp_path / "classes.txt", "--templates",
        tmp_path / "templates.txt",
    ]  # fmt: skip
    result = lamplit(*by_words, "--json")
    [prediction] = parsed(result)
    assert prediction["path"] == str(folder / "inner.png" / "[red]ring.png")
    assert len(prediction["classes"]) == 2
    [line] = result.err.splitlines()
    assert line.startswith(f"skipped {folder / 'bad.png'}: ")
    [whole] = parsed(lamplit(*by_files, "--json"))
    assert set(whole["classes"]) == {"ring", "Größe", "circle"}
    plain = lamplit(*by_words).out.splitlines()
    assert plain[1] == f"{prediction['path']}\t{prediction['classes'][0]}\t{prediction['probabilities'][0]:.3f}"
    options = ["--device", "cpu", "--batch-size", 1, "--workers", 1]
    assert parsed(lamplit(*by_words, "--json", *options)) == [prediction]
    assert parsed(lamplit(*by_words, "--templates", "clip-80", "--json"))
    misspelt = lamplit(*by_words, "--templates", "clip-81")
    assert misspelt.code == 2
    assert "there are no templates 'clip-81'; expected prompts with {}" in misspelt.err
    refused = lamplit(*by_words, "--device", "gpu")
    assert refused.code == 2
    assert "device 'gpu' cannot be used here" in refused.err
    only_bad = lamplit("classify", model_path, folder / "bad.png", "--classes", "a,b")
    assert only_bad.code == 2
    assert only_bad.err.splitlines()[-1] == "error: none of 1 images could be used"


def test_classes(lamplit: Lamplit, model_path: Path, store_path: Path, image_folder: Path, tmp_path: Path) -> None:
    file, image_file = tmp_path / "[red] classes.json", next(image_folder.glob("large_red_ring.*"))
    names = ["--classes", "ring,circle,square,cross,triangle", "--out", file]
    plain = lamplit("classes", model_path, *names)
    assert plain.code == 0
    assert plain.out == f"{file}\n"
    assert parsed(lamplit("classes", model_path, *names, "--json", "--device", "cpu")) == {"classes": str(file)}

    sampled = ["classes", model_path, *names, "--sample", store_path, "--label-column", "shape"]
    report = parsed(lamplit(*sampled, "--json", "--templates", "suggest"))
    assert report["classes"] == str(file)
    assert report["images"] == 60
    assert len(report["per_class"]) == 5
    shown = lamplit(*sampled, "--templates", "suggest").out.splitlines()
    assert shown[0].startswith("templates: the best is taken, and its figure flatters")
    assert f"accuracy, nearest class\t{report['accuracy']:.3f}" in shown
    assert f"error before\t{report['error_before']:.3f}" in shown
    assert f"error after\t{report['error_after']:.3f}" in shown
    for score in report["per_class"]:
        [line] = [line for line in shown if line.startswith(f"{score['name']}\t")]
        cells = line.split("\t")
        assert str(score["images"]) in cells
        assert f"{score['recall']:.3f}" in cells

    asked = ["classify", model_path, image_file, "--classes-file", file, "--top", 2]
    [prediction] = parsed(lamplit(*asked, "--json"))
    lines = lamplit(*asked).out.splitlines()
    assert lines[0] == "image\tclass\tprobability\tgiven"
    assert lines[1].split("\t")[1] == (prediction["given"] or ["none of these"])[0]

    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"thresholds": [1.0] * 5}))
    [prediction] = parsed(lamplit(*asked, "--json"))
    assert prediction["given"] == []
    first, second, _ = lamplit(*asked).out.splitlines()[1:]
    assert first == f"{image_file}\tnone of these\t\tyes"
    assert second == f"\t{prediction['classes'][0]}\t{prediction['probabilities'][0]:.3f}\tno"

    refused = lamplit(
        "classify", model_path, image_file, "--classes-file", file, "--templates", image_folder / "pairs.csv"
    )
    assert refused.code == 2
    assert "has templates of its own" in refused.err
    both = lamplit("classify", model_path, image_file, "--classes-file", file, "--classes", "a")
    assert both.code == 2
    assert "give the classes once" in both.err
    multi_label = parsed(lamplit(*sampled, "--multi-label", "--json"))
    assert multi_label["multi_label"] is True
    assert multi_label["error_before"] is None
    shown = lamplit(*sampled, "--multi-label").out.splitlines()
    assert f"F1 of the labels\t{multi_label['accuracy']:.3f}" in shown
    assert f"error after\t{multi_label['error_after']:.3f}" in shown
    assert not [line for line in shown if line.startswith(("error before", "threshold"))]


def test_export(lamplit: Lamplit, model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = lamplit("export", model_path, "--to", "sentence-transformers", "--out", out)
    assert done.code == 0, done.err
    assert re.search(r"^model\.safetensors\t\d+\.\d\d$", done.out, re.MULTILINE)
    assert re.search(r"^text vectors\tlargest difference \d\.\de[-+]\d\d$", done.out, re.MULTILINE)

    assert lamplit("export", model_path, "--to", "sentence-transformers", "--out", out).code == 2
    refused = lamplit("export", model_path, "--to", "gguf", "--out", tmp_path / "other")
    assert refused.code == 2
    assert "there is no export to 'gguf'" in refused.err

    as_json = lamplit("export", model_path, "--to", "transformers", "--out", tmp_path / "json", "--json")
    assert json.loads(as_json.out)["files"].keys() >= {"config.json", "model.safetensors"}


def test_evaluate_says_what_it_skipped(
    lamplit: Lamplit, model_path: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("large_red_ring", "small_blue_cross"):
        shutil.copy(next(image_folder.glob(f"{name}.*")), tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "bad.png").write_text("no image")
    result = lamplit("evaluate", model_path, tmp_path, "--json")
    assert parsed(result)[0]["captions"] == 2
    assert [line for line in caplog.messages if line.startswith("skipped ") and "bad.png" in line]


def test_data_get(lamplit: Lamplit, tmp_path: Path) -> None:
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps" / "pairs.csv").touch()  # fetched before
    expected = str(tmp_path / "stamps" / "pairs.csv")
    assert lamplit("data", "get", "stamps", "--folder", tmp_path).out == f"{expected}\n"
    assert parsed(lamplit("data", "get", "stamps", "--folder", tmp_path, "--json")) == {"pairs": expected}


def test_import_prepares_search_of_a_large_store(lamplit: Lamplit, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((SMALL + 1, 8), np.float32))
    store = tmp_path / "large.lance"
    assert lamplit("import", tmp_path / "vectors.npy", "--image-tower", "acme", "--out", store).code == 0
    assert measured_recall(Store(store)) is not None


def test_notes_are_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_note("a.csv is separated by [bold]bars")
    print_note("b")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "note: a.csv is separated by [bold]bars\nnote: b\n")


@pytest.mark.parametrize(("encoding", "note"), [("utf-8-sig", ""), ("cp1252", "c.txt is not UTF-8"), ("utf-16", "")])
def test_lines_of_a_file_in_any_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str, note: str
) -> None:
    (tmp_path / "c.txt").write_bytes("Käse\n\n Brot \n".encode(encoding))
    assert read_lines(tmp_path / "c.txt") == ["Käse", "Brot"]
    assert note in (said := capsys.readouterr().err)
    assert bool(said) == bool(note)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_unicode_are_printed(model_path: Path, image_folder: Path, tmp_path: Path) -> None:
    os.rename(
        shutil.copy(next(image_folder.glob("*.png")), tmp_path), os.path.join(os.fsencode(tmp_path), b"a\xff.png")
    )
    done = process(
        "classify",
        model_path,
        tmp_path,
        "--classes",
        "a,b",
        "--json",
        "--device",
        "cpu",
        PYTHONIOENCODING="utf-8:strict",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["path"] == f"{tmp_path}/a\udcff.png"


def test_record_shows_every_value_of_a_report() -> None:
    skipped = [Skipped("a", "a.png", "not an image")] * 2
    report = EmbedReport("[red].lance", "timm:a", embedded=1234, missing=2, skipped=skipped, skipped_file="s.jsonl")
    assert cells_of(tables.record(replace(report, seconds=12.34))) == {
        "store": "[red].lance",
        "image tower": "timm:a",
        "backend": "none",
        "embedded": "1234",
        "updated": "0",
        "unchanged": "0",
        "moved or copied": "0",
        "copies": "0",
        "without text": "0",
        "missing": "2; their rows stay, --prune deletes them",
        "pruned": "0",
        "skipped": "2; reasons in s.jsonl",
        "seconds": "12.3",
    }
    assert cells_of(tables.record({"text tower": "none", "recall": 0.5, "none": None, "per class": [1]})) == {
        "text tower": "none",
        "recall@10": "0.500",
    }


def cells_of(made: list[Table]) -> dict[str, str]:
    [table] = made
    names, values = ([str(cell) for cell in column.cells] for column in table.columns)
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("width", [40, 200])
def test_paths_are_whole_on_a_terminal(width: int) -> None:
    path = "/images/[bold]/" + "long_name_" * 8 + "[/end].png"
    [table] = tables.hits([Hit(0.5, "1", path, ["[red] text"], {})])
    screen = io.StringIO()
    Console(file=screen, width=width, force_terminal=True, color_system=None).print(table)
    rows = [line.split("│")[1:-1] for line in screen.getvalue().splitlines() if line.startswith("│")]
    score, shown, text = ("".join(cell.strip() for cell in cells) for cells in zip(*rows, strict=True))
    assert score == "0.500"
    assert shown == path
    assert text.replace(" ", "") == "[red]text"


@pytest.mark.slow
def test_paths_are_whole_in_a_real_pipe(model_path: Path, store_path: Path) -> None:
    done = process("search", model_path, store_path, "ring", "-k", 3, COLUMNS="30", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    [header, *lines] = done.stdout.splitlines()
    assert header.split("\t") == ["score", "path", "texts"]
    paths = set(Store(store_path).column("path"))
    assert len(lines) == 3
    assert {line.split("\t")[1] for line in lines} <= paths


# --- Recipes, modes, comparison


@pytest.mark.slow
def test_recipe_gives_way_to_options(lamplit: Lamplit, store_path: Path, text_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'[settings]\ntext_tower = "hf:{text_folder}"\nsteps = 2\nlr = 1e-3\nbatch_size = 16\n')
    out = tmp_path / "run"
    code, _, err = lamplit("tune", store_path, "--recipe", recipe, "--out", out, "--lr", "2e-3", "--mode", "LL")
    assert code == 0, err
    settings = json.loads((out / "settings.json").read_text())
    assert settings["steps"] == 2
    assert settings["lr"] == 2e-3
    assert settings["batch_size"] == 16
    assert settings["mode"] == "LL"
    code, _, err = lamplit("tune", store_path, "--out", tmp_path / "other")
    assert code == 2
    assert "no text tower: give --text-tower" in err


@pytest.mark.slow
def test_compare(lamplit: Lamplit, store_path: Path, text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    arguments = (
        "compare", store_path, "--text-towers", f"hf:{text_folder},scratch:tiny", "--modes", "LU,Lu", "--seeds", "1",
        "--out", out, "--epochs", "1", "--batch-size", "16",
    )  # fmt: skip
    code, printed, err = lamplit(*arguments)
    assert code == 0, err
    assert printed.count(" ± ") == 3 * 4
    assert "scratch:tiny has no pre-trained weights" in printed
    code, as_json, err = lamplit(*arguments, "--json")
    assert code == 0, err
    cells = json.loads(as_json)["cells"]
    assert [(cell["mode"], len(cell["seconds"])) for cell in cells] == [("LU", 1), ("Lu", 1), ("Lu", 1)]


def test_search_in_many_ways(
    lamplit: Lamplit, model_path: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(model_path, tmp_path / "model")
    (model / "text_tower.onnx").write_bytes(b"")  # goes on with torch; test_start.py has the other way
    search = ("search", model, store_path)
    first = parsed(lamplit(*search, "ring", "-k", 6, "--json"))
    pages = [parsed(lamplit(*search, "ring", "-k", 2, "--page", page, "--json")) for page in (1, 2, 3)]
    assert [hit for page in pages for hit in page] == first
    assert lamplit(*search, "ring", "-k", 2, "-0").out == f"{first[0]['path']}\0{first[1]['path']}\0"
    assert lamplit(*search, "ring", "-k", 2, "--paths").out.splitlines() == [first[0]["path"], first[1]["path"]]
    assert parsed(lamplit(*search, '"ring"', "-k", 6, "--json", "--exact")) == first
    assert parsed(lamplit(*search, "ring", "-k", 6, "--json", "--device", "cpu")) == first
    blank = lamplit(*search, "  ")
    assert blank.code == 2
    assert blank.err == "error: the query is blank; type words to search for\n"
    crosses = parsed(lamplit(*search, "ring", "--where", "shape = 'cross'", "--json"))
    assert {hit["metadata"]["shape"] for hit in crosses} == {"cross"}
    both = parsed(lamplit(*search, "ring", "--image", first[0]["path"], "-k", 1, "--json"))
    assert both[0]["path"] == first[0]["path"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("ring\n\na red cross\n"))
    sheet = tmp_path / "found.png"
    many = parsed(lamplit(*search, "-", "-k", 6, "--json", "--sheet", sheet))
    assert [answer["query"] for answer in many] == ["ring", "a red cross"]
    assert many[0]["hits"] == first
    assert sheet.read_bytes().startswith(b"\x89PNG")
    code, _, err = lamplit(*search, '"ring" "cross"')
    assert code == 2
    assert err.splitlines()[1:] == ['  "ring" "cross"', "         ^"]
    code, _, err = lamplit(*search, "ring", "--where", "colour = 'red'")
    assert code == 2
    assert "there are: id, path, hash, texts, german, shape" in err


def test_search_with_a_lowest_score(lamplit: Lamplit, model_path: Path, store_path: Path, tmp_path: Path) -> None:
    store, model = (shutil.copytree(path, tmp_path / path.name) for path in (store_path, model_path))
    (model / "text_tower.onnx").write_bytes(b"")  # goes on with torch
    search = ("search", model, store, "a red ring", "-k", 6, "--json")
    hits = parsed(lamplit(*search))
    above = lamplit(*search, "--min-score", (hits[2]["score"] + hits[3]["score"]) / 2)
    assert parsed(above) == hits[:3]
    assert "note: 3 of 6 images are hidden: their score is below " in above.err
    least = lamplit(*search, "--min-score", "auto")
    assert parsed(least) == hits[: len(parsed(least))]
    code, _, err = lamplit(*search, "--min-score", "much")
    assert code == 2
    assert err == "error: --min-score is 'much'; expected auto, or a number such as 0.3\n"
    code, _, err = lamplit("search", model, store, "--image", hits[0]["path"], "--min-score", "auto")
    assert code == 2
    assert "for an image give a number" in err
