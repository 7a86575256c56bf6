from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lamplit

HOMES: dict[str, str] = vars(lamplit)["_HOMES"]


def test_all_is_sorted_and_complete() -> None:
    assert lamplit.__all__ == sorted(lamplit.__all__)
    assert set(lamplit.__all__) == {*HOMES, "__version__"}
    assert list(HOMES) == sorted(HOMES)
    assert dir(lamplit) == lamplit.__all__


@pytest.mark.parametrize("name", sorted(HOMES))
def test_name_is_what_its_home_defines(name: str) -> None:
    value = getattr(lamplit, name)
    assert value is getattr(import_module(f"lamplit.{HOMES[name]}"), name)
    assert value.__module__ == f"lamplit.{HOMES[name]}", "defined elsewhere"
    assert (value.__doc__ or "").strip(), "has no docstring"


def test_imports_for_type_checkers_are_the_homes() -> None:
    tree = ast.parse(Path(lamplit.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        found |= {alias.name: f"{node.module}".removeprefix("lamplit.") for alias in node.names}
    assert found == HOMES


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lamplit' has no attribute 'tune_it'"):
        _ = lamplit.tune_it


@pytest.mark.parametrize("statement", ["import lamplit", "import lamplit.cli.main", "from lamplit import LamplitError"])
def test_import_is_light(statement: str) -> None:
    heavy = {"torch", "numpy", "transformers", "timm", "datasets", "lance", "pyarrow", "PIL", "matplotlib"}
    command = f"import sys; {statement}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
