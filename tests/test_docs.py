"""The documentation is complete, its links resolve, its commands and names exist, and its code blocks run."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import DOCS, PAGES, ROOT, blocks, need_stamps, run, run_blocks

import lamplit

GENERATED = {"commands.md", "api.md"}
TEXTS = {file: file.read_text(encoding="utf-8") for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]}
# Its blocks need a folder of each target, which tests/exports/test_exporting.py makes before it runs them.
RUN_ELSEWHERE = {"export.md"}
TUTORIAL = DOCS / "tutorial.md"
RUNNABLE = [
    page for page in PAGES
    if page != TUTORIAL and page.name not in RUN_ELSEWHERE and blocks(TEXTS[page], "bash", "python")
]  # fmt: skip


def load_hooks() -> Any:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> Any:
    return load_hooks()


@pytest.fixture(scope="module")
def options(hooks: Any) -> dict[str, set[str]]:
    """Every command with its options."""
    return {
        name: {option for p in command.params for option in [*p.opts, *p.secondary_opts] if option.startswith("-")}
        for name, command in hooks.commands().items()
    }


# The reference


def test_reference_has_every_option(hooks: Any, options: dict[str, set[str]]) -> None:
    parts = re.split(r"^## lamplit ", hooks.command_reference(), flags=re.MULTILINE)
    sections = {part.partition("\n")[0]: part for part in parts[1:]}
    assert set(sections) == set(options)
    for name, expected in options.items():
        assert {option for option in expected if f"`{option}`" not in sections[name]} == set(), name


def test_reference_has_every_public_name(hooks: Any) -> None:
    listed = re.findall(r"^::: lamplit\.(\w+)$", hooks.name_reference(), re.MULTILINE)
    assert sorted(listed) == sorted(name for name in lamplit.__all__ if not name.startswith("__"))


def test_every_command_is_on_a_page(options: dict[str, set[str]]) -> None:
    text = "\n".join(text for file, text in TEXTS.items() if file.name not in GENERATED)
    assert [name for name in options if not re.search(rf"\blamplit {name}\b", text)] == []


# What the pages name exists


def commands_in(text: str) -> list[list[str]]:
    """Every call of lamplit in the shell blocks, as its words."""
    found = []
    for _, code in blocks(text, "bash", "sh"):
        for line in re.sub(r"\\\n", " ", code).splitlines():
            if call := re.search(r"(?:^|\(|\| )(lamplit [a-z].*)", line):
                found.append(shlex.split(re.sub(r"\$\(.*\)", "X", call[1]), comments=True))
    return found


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_commands_and_options_exist(file: Path, options: dict[str, set[str]]) -> None:
    for words in commands_in(TEXTS[file]):
        name = next((n for n in (" ".join(words[1:3]), words[1]) if n in options), None)
        assert name is not None, f"no such command: {words}"
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z0]", word)}
        assert given - options[name] - {"--help"} == set(), words


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_public_names_exist(file: Path) -> None:
    named = set(re.findall(r"\blamplit\.([A-Za-z]\w*)", re.sub(r"https?://\S+", "", TEXTS[file])))
    assert named - set(lamplit.__all__) == set()


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_python_blocks_parse(file: Path) -> None:
    for _, code in blocks(TEXTS[file], "python", "py"):
        ast.parse(code)


def test_design_names_every_room_and_only_files_that_exist() -> None:
    package = Path(lamplit.__file__).parent
    design = TEXTS[DOCS / "design.md"]
    rooms = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    told = {word.removesuffix("/") for line in design.splitlines() if line.startswith("| `")
            for word in re.findall(r"`(\w+/?)`", line.split("|")[1])}  # fmt: skip
    assert {room for room in rooms if not room.startswith("_")} - told == set()
    files = {file.name for folder in (package, ROOT / "tests", ROOT / "benchmarks") for file in folder.rglob("*.py")}
    assert {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", design)} - files == set()


def test_scripts_that_are_named_exist() -> None:
    for file, text in TEXTS.items():
        for script in re.findall(r"\b(?:benchmarks|examples|docs|tests)/[\w/-]+\.(?:py|md|json|ipynb)\b", text):
            assert (ROOT / script).is_file(), f"{file.name} names {script}"


# Links


FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    without_code = FENCED.sub("", text)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)) for heading in headings)
    return {re.sub(r"\s+", "-", heading.strip().lower()) for heading in plain}


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_links_resolve(file: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCED.sub("", TEXTS[file])):
        path, _, anchor = target.partition("#")
        page = (file.parent / path).resolve() if path else file
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), target


# The site and the blocks


@pytest.mark.slow
def test_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    run(ROOT, sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site")
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"', text)
        assert [a or b for a, b in loaded if re.match(r"(https?:)?//", a or b)] == [], page


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that the tutorial leaves, and what its blocks printed."""
    need_stamps()
    folder = tmp_path_factory.mktemp("tutorial")
    return folder, run_blocks(TEXTS[TUTORIAL], folder)


@pytest.mark.slow
@pytest.mark.xdist_group("tutorial")  # which takes minutes, so one process runs it once
def test_tutorial(tutorial: tuple[Path, list[str]]) -> None:
    _, printed = tutorial
    _, embedded, tuned, found, evaluated, classified, program = printed
    assert re.search(r"embedded\W+700", embedded)
    assert "image_to_text/recall@5" in tuned
    assert "A horse." in found
    assert "recall@5" in evaluated
    assert re.search(r"owl\.png\W+bird", classified)
    assert "a guitar" in program


@pytest.mark.slow
@pytest.mark.xdist_group("tutorial")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_blocks_run_beside_what_the_tutorial_leaves(
    page: Path, tutorial: tuple[Path, list[str]], tmp_path: Path
) -> None:
    home, _ = tutorial
    (tmp_path / "stamps").symlink_to((home / "stamps").resolve())
    for name in ("stamps.lance", "runs/stamps"):
        shutil.copytree(home / name, tmp_path / name)
    printed = run_blocks(TEXTS[page], tmp_path)
    assert all(printed[:1])  # that something came out; what it says is the matter of other tests
    if page.name == "languages.md":
        assert "A chicken." in printed[0]
