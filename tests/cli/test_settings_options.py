from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lamplit
from lamplit.cli.main import app
from lamplit.cli.settings_options import field_docs
from lamplit.tuning.comparison import Comparison
from lamplit.tuning.settings import TuneSettings

HEAVY = {"torch", "torchvision", "transformers", "timm", "lance", "matplotlib"}


def test_every_setting_has_a_help_text() -> None:
    docs = field_docs(TuneSettings)
    assert list(docs) == [field.name for field in fields(TuneSettings)]
    assert all(text.endswith(".") and "\n" not in text for text in docs.values())


def test_class_docstring_has_every_setting() -> None:
    docs = inspect.getdoc(TuneSettings) or ""
    assert all(f"\n    {field.name}: " in docs for field in fields(TuneSettings))


def test_further_lines_and_sections_of_a_docstring() -> None:
    @dataclass
    class Few:
        """Few settings.

        Args:
            rate: first line,
                rate: second line.
            size: of what.

        Raises:
            size: never.
        """

        rate: float = 0.1
        size: int = 2

    assert field_docs(Few) == {"rate": "first line, rate: second line.", "size": "of what."}


def test_help_shows_settings_and_choices() -> None:
    for command in ("tune", "compare"):
        printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert "softmax|sigmoid" in printed
        assert "--no-closed-form" in printed
        assert "Passes over the training pairs, rounded" in printed


@pytest.mark.parametrize("command", ["tune", "compare"])
def test_help_brings_no_torch(command: str) -> None:
    code = (
        "import sys; from lamplit.cli.main import app; app(standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True)
    assert "--closed-form" in done.stdout
    assert HEAVY & set(done.stderr.split()) == set()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text('[settings]\ntext_tower = "demo:minilm"\nbatch_size = 64\nsteps = 7\nimage_head = true\n')
    return file


def test_typed_options_win_in_tune(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[TuneSettings] = []

    class StoppedError(RuntimeError):
        pass

    def stop(store: str, out: Path, settings: TuneSettings, **_: Any) -> None:
        found.append(settings)
        raise StoppedError

    monkeypatch.setattr(lamplit, "tune", stop)
    arguments = ["tune", "a.lance", "--out", "run", "--recipe", str(recipe), "--batch-size", "1024", "--no-image-head"]
    with pytest.raises(StoppedError):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert found == [TuneSettings("demo:minilm", steps=7, batch_size=1024)]


def test_typed_options_win_in_compare(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []

    def compare(source: str, out: Path, **given: Any) -> Comparison:
        found.append(given)
        return Comparison(str(out), 3, 10)

    monkeypatch.setattr(lamplit, "compare", compare)
    arguments = ["compare", "a.lance", "--text-towers", "demo:minilm", "--out", "grid", "--recipe", str(recipe)]
    typed = ["--epochs", "3", "--batch-size", "128", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [*arguments, *typed], catch_exceptions=False)
    assert result.exit_code == 0
    assert found[0]["device"] == "cpu"
    assert found[0]["settings"] == {
        "text_tower": "demo:minilm", "batch_size": 128, "steps": 7, "image_head": True, "epochs": 3.0,
    }  # fmt: skip
