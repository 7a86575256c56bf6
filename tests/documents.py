"""What the tests of README, documentation and examples share: the pages, their code blocks, and how these are run.

A fenced block that is tagged `bash` or `python` is run, in the order of the page, in one folder. One that is tagged
`sh` or `py` is only shown: it needs data, time or a network that a test does not have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lamplit

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# The stamps stay in the user's own cache, so that they are fetched once and not in each test run. Read here, because
# conftest gives every test run a cache of its own.
USER_CACHE = os.environ.get("LAMPLIT_CACHE")
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TIMEOUT = 1800


def environment() -> dict[str, str]:
    """The environment of a user: their cache, this lamplit, and its command on the PATH."""
    values = {name: value for name, value in os.environ.items() if name != "LAMPLIT_CACHE"}
    if USER_CACHE is not None:
        values["LAMPLIT_CACHE"] = USER_CACHE
    values["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{values['PATH']}"
    values["PYTHONPATH"] = str(Path(lamplit.__file__).parents[1])
    return values


def run(folder: Path, *command: object) -> str:
    """Run a command as a user would, in `folder`; return what it printed."""
    result = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def need_stamps() -> None:
    """Skip if the stamps are neither in the cache nor to be had; fail in CI, which must not skip them unseen."""
    code = "import lamplit; lamplit.fetch('stamps')"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    if result.returncode and not os.environ.get("CI"):
        pytest.skip("the stamps are not in the cache and cannot be fetched here")
    assert result.returncode == 0, result.stderr


def blocks(text: str, *tags: str) -> list[tuple[str, str]]:
    """Return (tag, code) of the fenced blocks with one of these tags, in order."""
    return [(tag, code) for tag, code in BLOCK.findall(text) if tag in tags]


def run_blocks(text: str, folder: Path) -> list[str]:
    """Run every block that is tagged `bash` or `python` in `folder`; return what each printed."""
    printed = []
    for number, (tag, code) in enumerate(blocks(text, "bash", "python")):
        script = folder / f"block{number}.{tag}"
        script.write_text(code, encoding="utf-8")
        start = ["bash", "-e", "-o", "pipefail"] if tag == "bash" else [sys.executable]
        printed.append(run(folder, *start, script.name))
    return printed
