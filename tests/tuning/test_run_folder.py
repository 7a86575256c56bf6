from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lamplit.tuning.run_folder import settings_of_run
from lamplit.tuning.settings import TuneSettings


def test_settings_of_a_run_belong_to_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TuneSettings("demo:minilm", lr=0.5, patience=3)
    assert settings_of_run(tmp_path, "a.lance") is None
    values = asdict(settings) | {"store": str(tmp_path / "a.lance"), "images": 3, "tower": "0" * 32}
    (tmp_path / "settings.json").write_text(json.dumps(values))
    assert settings_of_run(tmp_path, str(tmp_path / "a.lance")) == settings
    assert settings_of_run(tmp_path, str(tmp_path / "b.lance")) is None
    monkeypatch.chdir(tmp_path)
    assert settings_of_run(Path(), "a.lance") == settings
