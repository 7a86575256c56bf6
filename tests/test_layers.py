"""The rooms of the house: a room imports only from rooms on the floors below it."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import lamplit

ROOT = Path(lamplit.__file__).parent
# From the ground up. A room is a module or a folder at the top of the package.
FLOORS = [
    {"errors", "_version"},
    {"files", "garbage"},
    {"progress", "unit_vectors", "losses", "metrics", "locations"},
    {"data"},
    {"towers"},
    {"store"},
    {"model"},
    {"retrieval", "zeroshot", "tuning", "exports", "inspection"},
    {"evaluation", "app", "planning"},
    {"publishing"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in ROOT.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
)
FOLDERS = sorted(str(folder.parent.relative_to(ROOT)).replace("/", ".") for folder in ROOT.rglob("*/__init__.py"))
MAX_LINES = 400


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def room(module: str) -> str:
    return module.split(".")[0]


def imports(module: str, *, types: bool = True) -> set[str]:
    """List the modules of lamplit that `module` imports, in functions too, and for type checking if `types`."""
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


def test_floors_name_every_room_once() -> None:
    assert len(FLOOR) == sum(map(len, FLOORS))
    assert {room(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for other in imports(module):
        if not other:  # `import lamplit`, for the public names
            assert room(module) == "cli", f"{module} imports lamplit itself"
        elif room(module) != room(other):
            assert FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other}, which is not on a floor below"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_cycle_inside_a_folder(folder: str) -> None:
    inside = {module for module in MODULES if module.startswith(f"{folder}.")}
    needs = {module: imports(module, types=False) & inside for module in inside}
    done: set[str] = set()
    while inside - done:
        ready = {module for module in inside - done if needs[module] <= done}
        assert ready, f"a cycle among {sorted(inside - done)}"
        done |= ready


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in ("", ".")])
def test_no_cycle_among_what_stands_side_by_side(folder: str) -> None:
    inside = {module for module in MODULES if module.startswith(f"{folder}.")}

    def side(module: str) -> str:
        return module.removeprefix(f"{folder}.").split(".")[0]

    needs: dict[str, set[str]] = {side(module): set() for module in inside}
    for module in inside:
        needs[side(module)] |= {side(other) for other in imports(module, types=False) & inside} - {side(module)}
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name in needs.keys() - done if needs[name] <= done}
        assert ready, f"a cycle among {sorted(needs.keys() - done)}"
        done |= ready


def test_file_names_are_unique() -> None:
    names = Counter(module.rsplit(".", 1)[-1] for module in MODULES)
    assert {name: count for name, count in names.items() if count > 1} == {}


@pytest.mark.parametrize("module", MODULES)
def test_module_is_short_and_has_no_blanket_except_or_print(module: str) -> None:
    assert len(path_of(module).read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ExceptHandler):
            kinds = [] if node.type is None else [name for name in ast.walk(node.type) if isinstance(name, ast.Name)]
            assert kinds or node.type is not None, f"a bare except in line {node.lineno}"
            assert not {kind.id for kind in kinds} & {"Exception", "BaseException"}, f"in line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"in line {node.lineno}"


def test_no_module_for_leftovers() -> None:
    assert not {module.rsplit(".", 1)[-1] for module in MODULES} & {"utils", "util", "common", "misc", "helpers"}
