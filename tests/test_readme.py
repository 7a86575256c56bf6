"""The README's own code blocks run, in their order, in one empty folder; and what it says of them holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks():
    return re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Run every block; return what each printed."""
    folder = tmp_path_factory.mktemp("readme")
    # The stamps come from the user's own cache, so that they are fetched once and not for each test run.
    environment = {name: value for name, value in os.environ.items() if name != "LAMPLIT_CACHE"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    printed = []
    for number, (language, code) in enumerate(blocks()):
        script = folder / f"block{number}.{language}"
        script.write_text(code)
        command = ["bash", "-e", script.name] if language == "bash" else [sys.executable, script.name]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, f"{code}\n{result.stderr}"
        printed.append(result.stdout)
    return printed


@pytest.mark.slow
def test_code_blocks_run(outputs):
    commands, program, german = outputs
    assert "image_to_text/recall@1" in commands
    assert re.search(r"captions.*held out", commands)
    assert re.search(r"owl\.png\W+bird", commands)
    assert len(re.findall(r"^\d\.\d\d .*\.png$", program, re.MULTILINE)) == 3
    assert "A chicken." in german


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_is_shown():
    for command in ("embed", "tune", "search", "evaluate", "classify"):
        assert f"lamplit {command} " in README


def test_figures_are_filled_in():
    assert "@@" not in README
