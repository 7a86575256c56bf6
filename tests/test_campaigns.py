"""A few trials of the campaigns that kill processes; by hand they run hundreds."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the campaigns fork")
@pytest.mark.parametrize(
    ("script", "trials"),
    [
        ("kill_cluster.py", 1),  # a worker; tests/store/test_cluster.py kills the driver
        ("kill_embed.py", 3),
        ("kill_shards.py", 4),
        ("kill_tune.py", 5),
    ],
)
def test_some_trials(script: str, trials: int) -> None:
    if script == "kill_cluster.py" and find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    file = Path(__file__).parent / "campaigns" / script
    done = subprocess.run([sys.executable, file, "--trials", str(trials)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
