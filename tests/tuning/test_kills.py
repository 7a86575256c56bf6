from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the campaign forks")
def test_some_trials_of_the_campaign() -> None:
    script = Path(__file__).parents[1] / "campaigns" / "kill_tune.py"
    done = subprocess.run([sys.executable, script, "--trials", "5"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
