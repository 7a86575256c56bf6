"""The first search of a process: the command imports nothing heavy, and gives the hits that torch gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxscript")

HEAVY = {"torch", "torchvision", "transformers", "timm", "numba", "matplotlib", "datasets", "huggingface_hub", "peft"}
CODE = """
import sys
from lamplit.cli.main import main
try:
    main()
finally:
    sys.stderr.write("imported " + " ".join(sorted(sys.modules)))
"""


def run(*arguments: object, stdin: str = "") -> tuple[str, set[str]]:
    """Search in a new process; return what it prints and the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, "search", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.rpartition("imported ")[2].split())


@pytest.fixture(scope="module")
def folder(model_path: Path, store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy a model and search it once, so that its text_tower.onnx is written."""
    folder = Path(shutil.copytree(model_path, tmp_path_factory.mktemp("start") / "model"))
    (folder / "text_tower.onnx").unlink(missing_ok=True)
    first, modules = run(folder, store_path, "ring", "-k", 3, "--paths")
    assert "torch" in modules
    assert (folder / "text_tower.onnx").stat().st_size > 0
    assert run(folder, store_path, "ring", "-k", 3, "--paths")[0] == first
    return folder


@pytest.mark.slow
def test_search_by_words_imports_nothing_heavy(folder: Path, store_path: Path) -> None:
    printed, modules = run(folder, store_path, "ring", "-k", 3)
    assert len(printed.splitlines()) == 4
    assert modules & HEAVY == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["A small red circle."], ""),
        (['"ring" - 0.5 * "red"', "--where", "shape = 'ring'"], ""),
        (["-", "-k", "60"], "ring\nein blaues Kreuz\n"),
        (["ring", "--page", "2", "--exact"], ""),
    ],
)
def test_hits_are_those_of_torch(folder: Path, store_path: Path, tmp_path: Path, arguments: Any, stdin: str) -> None:
    slow = Path(shutil.copytree(folder, tmp_path / "slow"))
    (slow / "text_tower.onnx").write_bytes(b"")  # an empty file: the export has failed before
    (found, quick), (expected, torch) = (
        run(model, store_path, *arguments, "--json", stdin=stdin) for model in (folder, slow)
    )
    assert "torch" in torch - quick
    for hits, others in zip(lists(found), lists(expected), strict=True):
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in others]
        assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in others], abs=1e-4)


def lists(printed: str) -> list[list[dict[str, Any]]]:
    values = json.loads(printed)
    return [answer["hits"] for answer in values] if "hits" in values[0] else [values]


@pytest.mark.slow
def test_images_are_searched_with_torch(folder: Path, store_path: Path, image_folder: Path) -> None:
    [file] = image_folder.glob("large_blue_triangle.*")
    printed, modules = run(folder, store_path, "--image", file, "-k", 1, "--paths")
    assert Path(printed.strip()).name == file.name
    assert "torch" in modules
