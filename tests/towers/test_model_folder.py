from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamplit.errors import UsageError
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.model_folder import FORMAT, read_config

TOWER = TowerIdentity.of_imported("a tower", 4)


def test_config_is_read_with_its_tower(tmp_path: Path) -> None:
    values = {"format": FORMAT, "image_tower": TOWER.to_dict(), "text_tower": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == values | {"image_tower": TOWER}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no model at .*it has no config.json"),
        ("{", "is not the config.json of a model"),
        ("[1]", "is not the config.json of a model"),
        ('{"format": 1}', "is not the config.json of a model"),
        ('{"format": 99}', "has format 99; this lamplit reads up to 1: upgrade it"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=told):
        read_config(tmp_path)
