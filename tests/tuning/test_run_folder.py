from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lamplit.errors import UsageError
from lamplit.store.lance_store import Store
from lamplit.tuning.run_folder import FORMAT, claim, read_settings, settings_of_run
from lamplit.tuning.settings import OLD_NAMES, TuneSettings
from lamplit.tuning.tune_report import TuneReport

SETTINGS = TuneSettings("demo:minilm", mode="UU", lr=0.5, patience=3, warmup_ratio=0.25, image_delay=0.5)


def write_settings(folder: Path, **changes: Any) -> None:
    values = asdict(SETTINGS) | {"store": str(folder / "a.lance"), "images": 3, "tower": "0" * 32} | changes
    (folder / "settings.json").write_text(json.dumps(values))


def as_first_version(file: Path) -> None:
    """Rewrite settings.json with the names of the first lamplit, which wrote no format."""
    names = {new: old for old, new in OLD_NAMES.items()} | {"images": "pictures"}
    values = json.loads(file.read_text())
    del values["format"]
    file.write_text(json.dumps({names.get(name, name): value for name, value in values.items()}))


def test_settings_of_a_run_belong_to_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of_run(tmp_path, "a.lance") is None
    write_settings(tmp_path, format=FORMAT)
    assert settings_of_run(tmp_path, str(tmp_path / "a.lance")) == SETTINGS
    assert settings_of_run(tmp_path, str(tmp_path / "b.lance")) is None
    monkeypatch.chdir(tmp_path)
    assert settings_of_run(Path(), "a.lance") == SETTINGS


def test_first_version_is_read(tmp_path: Path) -> None:
    write_settings(tmp_path, format=FORMAT)
    as_first_version(tmp_path / "settings.json")
    assert {"text", "warmup", "pictures"} <= json.loads((tmp_path / "settings.json").read_text()).keys()
    assert settings_of_run(tmp_path, str(tmp_path / "a.lance")) == SETTINGS
    assert read_settings(tmp_path / "settings.json")["images"] == 3


def test_younger_settings_have_their_defaults(tmp_path: Path) -> None:
    values = {"text": "demo:minilm", "store": str(tmp_path / "a.lance"), "pictures": 3, "tower": "0" * 32}
    (tmp_path / "settings.json").write_text(json.dumps(values))
    assert settings_of_run(tmp_path, str(tmp_path / "a.lance")) == TuneSettings("demo:minilm")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"format": 2}', r"has format 2; this lamplit reads up to 1: upgrade it"),
        ('{"format": 1, "magic": 3}', r"has unknown settings magic; tune again with another --out"),
        ('{"format": ', r"is not JSON .*; give another --out"),
    ],
)
def test_unreadable_settings_are_explained(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UsageError, match=expected):
        settings_of_run(tmp_path, "a.lance")


def test_repr_of_a_report() -> None:
    report = TuneReport("run", "LU", "timm:a", "demo:minilm", 8, 2, 2, {}, 0, best_step=3, steps=5)
    assert repr(report) == "<TuneReport run: LU, demo:minilm reads timm:a, 5 steps>"
    report.best = {"image_to_text/recall@1": 0.388}
    assert repr(report).endswith("timm:a, image_to_text/recall@1 0.388 at step 3 of 5 steps>")


def test_first_version_is_claimed(store: Store, tmp_path: Path) -> None:
    assert claim(tmp_path, store, SETTINGS) is None
    written = (tmp_path / "settings.json").read_text()
    as_first_version(tmp_path / "settings.json")
    (tmp_path / "checkpoints").mkdir()  # it has begun
    with pytest.raises(UsageError, match=r"other settings: lr was 0\.5 and is 0\.25\. Give another"):
        claim(tmp_path, store, TuneSettings(**asdict(SETTINGS) | {"lr": 0.25}))
    assert claim(tmp_path, store, SETTINGS) is None
    assert (tmp_path / "settings.json").read_text() == written, "rewritten under today's names"
    report = TuneReport("run", "UU", "timm:a", "demo:minilm", 8, 2, 2, {}, 0)
    (tmp_path / "report.json").write_text(json.dumps(asdict(report)))
    as_first_version(tmp_path / "settings.json")
    assert claim(tmp_path, store, SETTINGS) == report


def test_run_that_never_began_may_begin_otherwise(store: Store, tmp_path: Path) -> None:
    assert claim(tmp_path, store, TuneSettings("demo:minilmm")) is None
    assert claim(tmp_path, store, SETTINGS) is None
    assert settings_of_run(tmp_path, store.path) == SETTINGS
