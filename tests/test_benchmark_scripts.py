"""Every benchmark runs, and its figures have the shape that the README quotes; speed is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(name, tmp_path, *options):
    file = tmp_path / "figures.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--json", str(file), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text())["figures"]


def check_sides(figures, num_sides):
    assert len(figures["sides"]) == num_sides
    assert any(name.startswith("lamplit") for name in figures["sides"])
    for side in figures["sides"].values():
        assert 0 < side["min"] <= side["median"] <= side["max"]
        assert side["ratio"] > 0


def test_tune(tmp_path):
    step, whole, padding, large, accumulation = run("tune", tmp_path)
    check_sides(step, 5)
    check_sides(padding, 2)
    check_sides(large, 4)
    check_sides(accumulation, 2)
    assert list(whole["epochs"]) == ["1", "3", "10", "50"]
    for ratios in whole["epochs"].values():
        assert all(ratio > 0 for ratio in ratios.values())


def test_embed(tmp_path):
    decoding, *towers = run("embed", tmp_path)
    check_sides(decoding, 2)
    assert 0 < decoding["mean_difference"] < 1.5
    assert towers
    for tower in towers:
        check_sides(tower, 2)


def test_evaluate(tmp_path):
    long, short, whole, cached = run("evaluate", tmp_path)
    for text in (long, short):
        check_sides(text, 2)
        assert text["largest_difference"] < 1e-5, "the same class vectors on both sides"
    check_sides(whole, 3)
    check_sides(cached, 1)
    assert cached["encoding_the_prompts_once"] > 0


def test_recall(tmp_path):
    [figures] = run("recall", tmp_path, "--folder", str(tmp_path / "recall"), "stamps", "--turns", "2")
    assert len(figures["splits"]) == 2
    for split in figures["splits"]:
        for model in split.values():
            assert 0 <= model["image_to_text/recall@1"] <= model["image_to_text/recall@5"] <= 1
    # The parts are worth less than the whole, on any split seen so far by more than 0.03.
    parts = [name for name in figures["splits"][0] if "alone" in name]
    assert len(parts) == 2
    for part in parts:
        whole = sum(split["start"]["mean_recall"] for split in figures["splits"])
        assert sum(split[part]["mean_recall"] for split in figures["splits"]) < whole


def test_search(tmp_path):
    figures = run("search", tmp_path)
    assert len(figures) == 6
    for building, *timed in (figures[:3], figures[3:]):
        assert building["sides"]["lamplit"]["recall@10"] >= 0.98
        assert building["sides"]["flat product (torch)"]["recall@10"] > 0.999
        for latency in timed:
            check_sides(latency, 8)


def test_start(tmp_path):
    [figures] = run("start", tmp_path)
    check_sides(figures, 2)


def test_plan(tmp_path):
    [stamps] = run("plan", tmp_path)
    [turn] = stamps["turns"]
    assert turn["said"]["vectors"] == turn["took"]["vectors"]
    # The header of the file comes on top, and a few anchors that the held-out captions do not have.
    assert 0.99 < turn["said"]["text tower"] / turn["took"]["text tower"] < 1.01
    assert turn["said"]["tune s"] > 0


def test_scale(tmp_path):
    figures = run("scale", tmp_path)
    titles = [figure["title"] for figure in figures]
    assert titles[0] == "import"
    assert titles[-2:] == ["tune, first start", "tune, later start"]
    assert len(titles) == 11
    for figure in figures:
        assert figure["seconds"] > 0
        assert figure["cpu"] > 0
        assert figure["peak"] > 2**20


def test_memory_of_an_import_does_not_grow_with_its_rows(tmp_path):
    """Python objects take some hundred bytes a row; what is left are buffers of Lance that are full after a file."""
    peaks = {}
    for pairs in (200_000, 800_000):
        options = ["--pairs", str(pairs), "--width", "64", "--only", "import"]
        figures = run("scale", tmp_path, *options)
        peaks[pairs] = next(figure["peak"] for figure in figures if figure["title"] == "import")
    assert peaks[800_000] - peaks[200_000] < 100 * 600_000
