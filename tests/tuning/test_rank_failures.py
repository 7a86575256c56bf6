"""One of the processes of a run fails in the middle of a step: all end, and say why."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from rank_processes import TORCHRUN, finish, launch, start
from test_tune_ranks import arguments, log_of, made, wait_for_log

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")]
# Python imports it by itself. It lets one process have no more memory than it has at its 20th chunk of texts, and then
# asks for a gigabyte there.
LIMITED = """
import os
import resource

if os.environ.get("RANK") == os.environ["LIMITED_RANK"]:
    import torch

    calls = []

    def limit(module, given):
        if type(module).__name__ == "BertModel" and module.training:
            calls.append(1)
            if len(calls) == 20:
                with open("/proc/self/statm") as file:
                    pages = int(file.read().split()[0])
                most = pages * resource.getpagesize() + 2**26
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                torch.empty(2**30, dtype=torch.uint8)

    torch.nn.modules.module.register_module_forward_pre_hook(limit)
"""
SOON = 60  # seconds, in which such a run would not end by itself


@pytest.fixture
def limited(tmp_path: Path) -> dict[str, str]:
    """Make the variables of a process that may be limited."""
    folder = tmp_path / "limited"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LIMITED)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def assert_said(errors: str, rank: int) -> None:
    told = " ".join(errors.split())
    assert f"error: process {rank} of 2 failed: RuntimeError: " in told
    assert "can't allocate memory" in told
    assert "The same command goes on from the last checkpoint" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("rank", [0, 1])
def test_all_end_and_say_which_failed(
    rank: int, words_path: Path, text_folder: Path, tmp_path: Path, limited: dict[str, str]
) -> None:
    out, settings = tmp_path / "run", made(text_folder, steps=2000)
    processes = start(2, *arguments(words_path, out, settings), LIMITED_RANK=rank, **limited)
    wait_for_log(out / "log.jsonl", 5, processes)
    said = finish(processes, 1, limit=SOON)
    assert "can't allocate memory" in said[rank][1].splitlines()[-1]
    assert_said(said[1 - rank][1].rpartition("\n  ")[2], rank)
    assert 0 < len(log_of(out)) < 50


@pytest.mark.parametrize("rank", [0, 1])
def test_command_says_which_failed(
    rank: int, words_path: Path, text_folder: Path, tmp_path: Path, limited: dict[str, str]
) -> None:
    out, settings = tmp_path / "run", made(text_folder, steps=2000)
    process = launch(*arguments(words_path, out, settings), "--processes", 2, LIMITED_RANK=rank, **limited)
    wait_for_log(out / "log.jsonl", 5, [process])
    [(_, errors)] = finish([process], 1, limit=SOON)
    assert errors.count("can't allocate memory") == 1
    if rank == 1:
        assert_said(errors.rpartition("\n  ")[2], rank)
    assert 0 < len(log_of(out)) < 50


CAUGHT = """
import sys
import time

from lamplit.errors import TuneError
from lamplit.tuning.ranks import join_ranks

for run in range(3):
    try:
        with join_ranks() as ranks:
            if ranks.rank == run % 2:
                raise MemoryError(f"in run {run}")
            ranks.exchange(torch.zeros(3))
    except MemoryError:
        assert ranks.rank == run % 2
    except TuneError as error:
        assert str(error).startswith(f"process {run % 2} of 2 failed: MemoryError: in run {run}. "), error
with join_ranks() as ranks:
    assert ranks.exchange(torch.full((2,), float(ranks.rank))).tolist() == [[1.0 - ranks.rank] * 2]
"""


def test_failure_that_a_script_catches(tmp_path: Path) -> None:
    """The process that failed goes on; no other waits for it, and they meet again."""
    (tmp_path / "caught.py").write_text("import torch\n" + CAUGHT)
    finish([launch(*TORCHRUN, tmp_path / "caught.py")], limit=SOON)
    finish(start(2, tmp_path / "caught.py"), limit=SOON)
