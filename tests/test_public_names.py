from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

import lamplit
from lamplit import errors


def homes() -> dict[str, str]:
    """The module of each public name, as type checkers are told."""
    tree = ast.parse(Path(lamplit.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        found |= {alias.name: str(node.module) for alias in node.names}
    return found


HOMES = homes()


def test_all_is_sorted_and_complete() -> None:
    assert lamplit.__all__ == sorted(lamplit.__all__)
    assert set(lamplit.__all__) == {*HOMES, "__version__"}


@pytest.mark.parametrize("name", sorted(HOMES))
def test_name_is_what_its_home_defines(name: str) -> None:
    value = getattr(lamplit, name)
    assert value is getattr(import_module(HOMES[name]), name)
    assert value.__module__ == HOMES[name], "defined elsewhere"
    first = (value.__doc__ or "").strip().splitlines()[:1]
    assert first, "has no docstring"
    assert first[0].endswith((".", ":")), "the first line is no sentence"


@pytest.mark.parametrize("name", [name for name in sorted(HOMES) if is_dataclass(getattr(lamplit, name))])
def test_docstring_tells_every_field(name: str) -> None:
    value = getattr(lamplit, name)
    docs = inspect.getdoc(value) or ""
    assert [field.name for field in fields(value) if f"\n    {field.name}: " not in docs] == []


@pytest.mark.parametrize("name", sorted(HOMES))
def test_help_has_no_marks_of_doctest(name: str) -> None:
    value = getattr(lamplit, name)
    texts = [inspect.getdoc(each) or "" for each in (value, *vars(value).values()) if callable(each)]
    assert not [text for text in texts if "doctest:" in text]


def test_every_error_is_public() -> None:
    classes = (value for value in vars(errors).values() if inspect.isclass(value))
    raised = {each.__name__ for each in classes if issubclass(each, errors.LamplitError)}
    assert raised <= set(lamplit.__all__)
    with pytest.raises(lamplit.UsageError):
        lamplit.load("no/model")


def test_lists_of_names() -> None:
    assert "public-l16l" in lamplit.list_recipes()
    assert {"imagenet", "coco", "folder"} <= set(lamplit.list_benchmarks())
    assert "lit:B16B_2" in lamplit.list_published()
    for names in (lamplit.list_recipes(), lamplit.list_benchmarks(), lamplit.list_published()):
        assert names == sorted(set(names))


def test_no_module_hides_a_public_name() -> None:
    root = Path(lamplit.__file__).parent
    assert not {path.stem for path in root.iterdir()} & set(HOMES)


def test_dir_has_public_names_and_imported_modules() -> None:
    import_module("lamplit.errors")
    assert set(lamplit.__all__) | {"errors"} <= set(dir(lamplit))
    assert not [name for name in dir(lamplit) if name.startswith("_") and not name.startswith("__")]
    assert not {"import_module", "TYPE_CHECKING", "Any"} & set(dir(lamplit))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lamplit' has no attribute 'tune_it'"):
        _ = lamplit.tune_it


@pytest.mark.parametrize("statement", ["import lamplit", "import lamplit.cli.main", "from lamplit import LamplitError"])
def test_import_is_light(statement: str) -> None:
    heavy = {"torch", "numpy", "transformers", "timm", "datasets", "lance", "pyarrow", "PIL", "matplotlib"}
    command = f"import sys; {statement}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
