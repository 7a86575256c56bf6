from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "loss.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "loss.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(file)]
    wide = os.environ | {"COLUMNS": "160"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=wide)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(file.read_text())


def test_every_figure_is_there(run):
    _, results = run
    for kind, names in (("softmax", {"ClipLoss", "softmax_loss"}), ("sigmoid", {"SigLipLoss", "sigmoid_loss"})):
        (comparison,) = results[kind]
        assert comparison["size"] == 256
        assert set(comparison["sides"]) == names
        assert comparison["limit"] > 0
        for side in comparison["sides"].values():
            assert len(side["seconds"]) == 1
            assert side["median"] == side["seconds"][0] > 0
            assert side["times_faster"] > 0
            assert side["spread"] == 0
            assert 0 <= side["peak_megabytes"] < 200


def test_both_sides_are_exact(run):
    _, results = run
    for kind in ("softmax", "sigmoid"):
        rows = results[f"{kind}_exactness"]
        assert any("adversarial" in row["case"] for row in rows)
        for row in rows:
            ours = f"{kind}_loss"
            assert math.isclose(row["losses"][ours], row["float64_loss"], rel_tol=1e-5)
            assert row["errors"][ours] < 2e-6


def test_the_tables_show_both_sides(run):
    stdout, _ = run
    for word in ("ClipLoss", "softmax_loss", "SigLipLoss", "sigmoid_loss", "times faster", "adversarial"):
        assert word in stdout
