from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import lamplit
from lamplit.cli.interruption import _KEPT, Commands
from lamplit.cli.main import app


@pytest.mark.parametrize("name", ["embed", "info", "tune"])
def test_one_line_says_what_is_kept(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = typer.Typer(cls=Commands)

    @commands.command(name)
    def run() -> None:
        raise KeyboardInterrupt

    commands.command("other")(lambda: None)
    done = CliRunner().invoke(commands, [name])
    assert done.exit_code == 130
    [line] = (done.stderr or capsys.readouterr().err).splitlines()
    assert line.startswith("stopped: ")
    assert line.endswith("type the same command again")


def test_every_sentence_is_of_a_command() -> None:
    assert set(_KEPT) <= set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C in another way")
def test_a_real_run_stops_and_goes_on(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "lamplit", "tune", str(words_path), "--text-tower", f"hf:{text_folder}", "--steps", "400",
        "--batch-size", "16", "--out", str(out), "--log-to", "csv",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(lamplit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log, patience = out / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_bytes().count(b"\n") > 5) and time.monotonic() < patience:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes of the command
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("stopped: ")
    assert (out / "checkpoints" / "last.safetensors").is_file()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((out / "steps.csv").read_text().splitlines()) == 401
