"""Units that a Ray cluster embeds: the store is that of one process, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from same_stores import require_equal_stores

from lamplit.data.skipped import Skipped
from lamplit.errors import PairsError, StoreError, TowerError
from lamplit.store.embed.cluster import ClusterJob, UnitWorker, _require_retry
from lamplit.store.embed.embedding import embed
from lamplit.store.embed.unit_embedding import by_kind, kind_of_reason
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
TIMEOUT = 400.0


@pytest.fixture(scope="module")
def tower_file(image_tower: ImageTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tower") / "tower.pth"
    torch.save(image_tower.backbone.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def source(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawings, and what is no image."""
    folder = tmp_path_factory.mktemp("source")
    for file in image_folder.glob("*_*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).with_suffix(".txt").write_text(f"a {file.stem}")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tower_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "whole.lance"
    options: dict[str, Any] = {"image_tower": "timm:test_vit", "image_tower_weights": tower_file, "backend": "torch"}
    embed(source, out, batch_size=4, **options)
    return out


def job(source: Path, out: Path, tower_file: Path) -> ClusterJob:
    return ClusterJob(
        os.getcwd(), str(source), str(out), "timm:test_vit", str(tower_file), None, None, None, None, False,
        "torch", 4, 0, 10**6, "cpu", 4,
    )  # fmt: skip


def command(source: Path, out: Path, tower_file: Path, *more: object) -> list[str]:
    words = [
        sys.executable, "-m", "lamplit", "embed", source, "--out", out, "--image-tower", "timm:test_vit",
        "--image-tower-weights", tower_file, "--backend", "torch", "--batch-size", 4, "--workers", 0,
        "--cluster", "ray", "--cluster-workers", 3, "--unit-rows", 4, "--json", *more,
    ]  # fmt: skip
    return list(map(str, words))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.chdir(os.getcwd())  # comes back
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads == count)


@pytest.mark.usefixtures("one_thread")
def test_a_worker_embeds_units_by_name(source: Path, whole: Path, tower_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts.lance"
    given = job(source, out, tower_file)
    embedder, workers = given.open(), [UnitWorker(given, 1) for _ in range(2)]
    for number, unit in enumerate(embedder.units):
        report = workers[number % 2].embed(unit.name)
        assert report is not None
        assert workers[0].embed(unit.name) is None
    with pytest.raises(PairsError, match=r"sees .* otherwise than the first one"):
        workers[0].embed("another")
    embedder.commit()
    require_equal_stores(out, whole)


def test_a_machine_without_the_folder(source: Path, tower_file: Path, tmp_path: Path) -> None:
    given = job(source, tmp_path / "parts.lance", tower_file)
    given = ClusterJob(**vars(given) | {"folder": str(tmp_path / "none")})
    with pytest.raises(PairsError, match=r"does not have the folder .*none; all machines must see"):
        UnitWorker(given, 1).embed("any")


def test_what_is_tried_again() -> None:
    attempts = Counter[str]()
    for _ in range(2):
        _require_retry(OSError("the disk is away"), "a", attempts)
        _require_retry(OSError("the disk is away"), "b", attempts)
    with pytest.raises(
        StoreError, match=r"unit a failed 3 times \(the disk is away\); what was embedded before is kept"
    ):
        _require_retry(OSError("the disk is away"), "a", attempts)
    told = RuntimeError("of Ray")
    told.cause = TowerError("no such tower")  # type: ignore[attr-defined]
    with pytest.raises(TowerError, match="no such tower"):
        _require_retry(told, "c", attempts)


def test_kinds_of_errors() -> None:
    reasons = ["file not found", "cut off (at 3)", "cut off (at 5)", "empty file", "empty file", "empty file", "odd"]
    kinds = Counter(kind_of_reason(Skipped(str(number), "", reason)) for number, reason in enumerate(reasons))
    assert by_kind(kinds) == "; 7 skipped: 3 empty file, 2 cut off, 1 file not found"
    assert by_kind(Counter()) == ""


@pytest.fixture(scope="module")
def orphans() -> Iterator[list[psutil.Process]]:
    """Processes whose driver was killed. They end by themselves; it takes Ray a minute, so other tests go first."""
    processes: list[psutil.Process] = []
    yield processes
    _, left = psutil.wait_procs(processes, TIMEOUT)
    assert not left


def started(arguments: list[str], log: Path, out: Path) -> tuple[psutil.Popen, list[psutil.Process]]:
    """Start a driver, and wait until the first units are embedded; return it with its processes."""
    with log.open("w") as said:
        driver = psutil.Popen(arguments, stdout=said, stderr=said)
    ends = time.monotonic() + TIMEOUT
    while len(list((out / "_units").glob("*.json"))) < 2:
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.01)
    return driver, driver.children(recursive=True)


@with_ray
@pytest.mark.slow
def test_the_driver_is_killed(
    source: Path, whole: Path, tower_file: Path, orphans: list[psutil.Process], tmp_path: Path
) -> None:
    out, log = tmp_path / "parts.lance", tmp_path / "log"
    driver, processes = started(command(source, out, tower_file), log, out)
    driver.kill()
    driver.wait()
    ids = Store(out).column("id")
    assert len(ids) == len(set(ids))
    again = subprocess.run(command(source, out, tower_file), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    require_equal_stores(out, whole)
    orphans += processes


@with_ray
@pytest.mark.slow
def test_a_worker_is_killed(source: Path, whole: Path, tower_file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "parts.lance", tmp_path / "log"
    driver, processes = started(command(source, out, tower_file), log, out)
    workers = [process for process in processes if "UnitWorker" in " ".join(process.cmdline())]
    workers[0].kill()
    assert driver.wait(TIMEOUT) == 0, log.read_text()
    require_equal_stores(out, whole)


@with_ray
@pytest.mark.slow
def test_three_workers_make_the_store_of_one_process(
    source: Path, whole: Path, tower_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "parts.lance"
    for expected in (60, 0):
        done = subprocess.run(
            command(source, out, tower_file), capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert (report["embedded"], report["units"], report["units_left"]) == (expected, 16, 0)
        require_equal_stores(out, whole)
    [line] = out.with_suffix(".skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "broken.png"


@with_ray
@pytest.mark.slow
def test_an_error_of_a_worker_is_one_sentence(source: Path, tower_file: Path, tmp_path: Path) -> None:
    arguments = command(source, tmp_path / "parts.lance", tower_file, "--device", "nothing")
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.returncode == 2
    assert "error: device 'nothing' cannot be used here" in done.stderr
    assert "Traceback" not in done.stderr
