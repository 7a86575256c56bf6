from __future__ import annotations

import csv
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import interrupted_at
from ctrl_c import pressed_at

from lamplit.errors import UsageError
from lamplit.tuning.run import tune
from lamplit.tuning.run_logs import numbers_of, open_run_logs, require_logs
from lamplit.tuning.settings import TuneSettings

Numbers = list[tuple[int, float]]


@pytest.fixture
def settings(text_folder: Path) -> TuneSettings:
    return TuneSettings(f"hf:{text_folder}", epochs=6, batch_size=64, num_evals=3)


def logged(out: Path, name: str) -> Numbers:
    """A number of `log.jsonl` by its steps."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], numbers[name]) for line in lines if name in (numbers := numbers_of(line))]


def read_tables(out: Path, name: str) -> Numbers:
    column = name.removeprefix("held_out/")
    with (out / ("steps.csv" if column == name else "held_out.csv")).open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file)]


def read_tensorboard(out: Path, name: str) -> Numbers:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize(("kind", "read"), [("csv", read_tables), ("tensorboard", read_tensorboard)])
def test_it_has_the_numbers_of_the_log_and_each_step_once(
    kind: str, read: Callable[[Path, str], Numbers], words_path: Path, settings: TuneSettings, tmp_path: Path
) -> None:
    pytest.importorskip(kind)
    out = tmp_path / "run"
    for lines in (4, 14):
        with interrupted_at(out / "log.jsonl", lines):
            tune(words_path, out, settings, log_to=[kind])
    report = tune(words_path, out, settings, log_to=[kind])
    for name in ("loss", "lr", "held_out/image_to_text/recall@1", "held_out/mean_recall"):
        found, expected = read(out, name), logged(out, name)
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [value for _, value in found] == pytest.approx([value for _, value in expected]), name
    assert [step for step, _ in read(out, "loss")] == list(range(1, report.steps + 1))
    assert read(out, "held_out/mean_recall")[0][0] == 0


def test_events_of_a_run_that_goes_on_at_once_are_read_last(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "log.jsonl").touch()
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    before = folder / f"events.out.tfevents.{int(time.time())}.zz.9.9"
    before.touch()
    with open_run_logs(tmp_path, ["tensorboard"], {}) as write:
        write({"step": 1, "loss": 2.0})
    first, last = sorted(folder.iterdir())
    assert first == before
    assert last.stat().st_size > 0


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_a_run_that_was_not_logged_so_before(
    kind: str, words_path: Path, settings: TuneSettings, tmp_path: Path
) -> None:
    pytest.importorskip(kind)
    out = tmp_path / "run"
    with interrupted_at(out / "log.jsonl", 14):
        tune(words_path, out, settings)
    tune(words_path, out, settings, log_to=[kind])
    read = read_tables if kind == "csv" else read_tensorboard
    assert [step for step, _ in read(out, "loss")] == [step for step, _ in logged(out, "loss")]


def test_logs_change_nothing_of_the_model(words_path: Path, settings: TuneSettings, tmp_path: Path) -> None:
    for name, kinds in (("plain", []), ("logged", ["csv"])):
        tune(words_path, tmp_path / name, settings, log_to=kinds)
    name = "text_tower.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "logged" / name).read_bytes()


def records(file: Path) -> Iterator[bytes]:
    """The records of a file of wandb's: blocks of 32 KiB of their parts, each with a checksum, length and type."""
    content, whole, position = file.read_bytes(), b"", 7
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # it is all there, or this was its last part
            yield whole
            whole = b""


@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
def test_wandb_offline(
    words_path: Path, settings: TuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in (("MODE", "offline"), ("CONFIG_DIR", tmp_path), ("CACHE_DIR", tmp_path), ("DATA_DIR", tmp_path)):
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    out = tmp_path / "run"
    with pressed_at(out / "log.jsonl", 14):
        tune(words_path, out, settings, log_to=["wandb"])
    tune(words_path, out, settings, log_to=["wandb"])
    found, ids = [], set()
    for file in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, records(file)):
            ids |= {record.run.run_id} if record.HasField("run") else set()
            items = {"/".join(each.nested_key) or each.key: each.value_json for each in record.history.item}
            if "loss" in items:
                found.append((int(items["_step"]), float(items["loss"])))
    expected = logged(out, "loss")
    assert ids == {json.loads((out / "wandb.json").read_text())["id"]}
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def test_numbers_of_a_line() -> None:
    line = {"step": 3, "loss": 0.5, "closed_form": True, "held_out": {"mean_recall": 0.25}}
    assert numbers_of(line) == {"loss": 0.5, "held_out/mean_recall": 0.25}
    assert numbers_of({"step": 0, "held_out": {}}) == {}


def test_kinds_that_are_not_there(tmp_path: Path, words_path: Path) -> None:
    with pytest.raises(UsageError, match="no log of the kind 'mlflow'; expected one of: csv, tensorboard, wandb"):
        require_logs(["mlflow"])
    with pytest.raises(UsageError, match="no log of the kind"):
        tune(words_path, tmp_path / "run", TuneSettings("demo:minilm"), log_to=["xls"])
    assert not (tmp_path / "run").exists()
