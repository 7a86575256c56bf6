"""The floors of the house: a module imports from floors below it, never from above or beside."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import pytest

import lamplit

ROOT = Path(lamplit.__file__).parent
FLOORS = [
    {"errors", "kernels", "unit_vectors", "_version"},
    {
        "cache",
        "calibration",
        "preprocessing",
        "prompts",
        "tiles",
        "nearest",
        "queries",
        "optimizers",
        "metrics",
        "probe",
        "progress",
        "results",
        "onnx_files",
        "tuning.settings",
        "tuning.large_batch",
    },
    {"losses", "scoring", "arrow_rows", "data.*", "towers.*", "tuning.recipes"},
    {"store", "engines", "protocols.*", "tuning.curves", "tuning.checkpoint", "tuning.sides"},
    {"model", "collection", "tuning.split", "tuning.head_start"},
    {"classes"},
    {
        "duplicates",
        "embedding",
        "zeroshot",
        "indexing",
        "inspection",
        "exports.*",
        "text_vectors",
        "tuning.report",
        "tuning.batches",
        "tuning.assembly",
    },
    {"retrieval", "evaluation", "class_making", "exchange", "tuning.folder", "report.*"},
    {"sheet", "tuning.run", "benchmarks", "app.*"},
    {"comparison"},
    {"tables"},
    {"terminal"},
    {"thumbnails"},
    {"commands.*"},
    {"cli"},
]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in ROOT.rglob("*.py") if file.name != "__init__.py"
)
MOST_LINES = 400


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def room(module: str) -> str:
    """Name a module as the floors do: those of a folder share a name, but the parts of a run have their own."""
    folder = module.split(".")[0]
    rooms = ("data", "towers", "exports", "protocols", "report", "commands", "app")
    return f"{folder}.*" if folder in rooms else module


def floor(module: str) -> int:
    [number] = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    return number


def imports(module: str, *, types: bool = True) -> set[str]:
    """Modules of lamplit that `module` imports anywhere in it, in functions too, and for its types if these count."""
    tree = tree_of(module)
    if not types:
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import in line {node.lineno}"
            home = node.module or ""
            if home.split(".")[0] == "lamplit":
                names = [f"{home}.{alias.name}".removeprefix("lamplit.") for alias in node.names]
                inside = home.removeprefix("lamplit").removeprefix(".")
                found |= {name if path_of(name).is_file() else inside for name in names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "lamplit"]
            found |= {name.removeprefix("lamplit").removeprefix(".") for name in names}
    return found


def test_every_module_has_one_floor_and_every_floor_its_modules() -> None:
    rooms = [name for names in FLOORS for name in names]
    assert len(rooms) == len(set(rooms))
    assert {room(module) for module in MODULES} == set(rooms)


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_lower_floors(module: str) -> None:
    for other in imports(module):
        if not other:  # `import lamplit`: the public names
            assert room(module) in ("cli", "commands.*"), f"{module} imports the package it is part of"
        elif room(module) != room(other):
            assert floor(other) < floor(module), f"{module} imports {other}, which is not on a floor below"


@pytest.mark.parametrize("folder", ["data", "towers", "exports", "protocols", "report", "app"])
def test_no_cycle_inside_a_folder(folder: str) -> None:
    inside = {module for module in MODULES if module.startswith(f"{folder}.")}
    needs = {module: imports(module, types=False) & inside for module in inside}
    done: set[str] = set()
    while inside - done:
        ready = {module for module in inside - done if needs[module] <= done}
        assert ready, f"a cycle among {sorted(inside - done)}"
        done |= ready


def test_folders_do_not_import_each_other() -> None:
    for module in MODULES:
        if module.startswith(("data.", "towers.")):
            assert {room(other) for other in imports(module) if "." in other} <= {room(module)}


@pytest.mark.parametrize("module", MODULES)
def test_module_is_short_and_has_no_blanket_except_or_print(module: str) -> None:
    assert len(path_of(module).read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ExceptHandler):
            kinds = [] if node.type is None else [name for name in ast.walk(node.type) if isinstance(name, ast.Name)]
            assert kinds or node.type is not None, f"a bare except in line {node.lineno}"
            assert not {kind.id for kind in kinds} & {"Exception", "BaseException"}, f"in line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"in line {node.lineno}"


def test_no_module_for_leftovers() -> None:
    assert not {module.rsplit(".", 1)[-1] for module in MODULES} & {"utils", "util", "common", "misc", "helpers"}


def test_every_floor_is_needed() -> None:
    for below, above in pairwise(FLOORS):
        needed = {room(other) for module in MODULES if room(module) in above for other in imports(module)}
        assert needed & below, f"{sorted(above)} could stand beside {sorted(below)}"
