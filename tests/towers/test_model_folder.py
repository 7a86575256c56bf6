from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import UsageError
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.model_folder import FORMAT, read_config

TOWER = TowerIdentity.of_imported("a tower", 4)


def test_config_is_read_with_its_tower(tmp_path: Path) -> None:
    values = {"format": FORMAT, "image_tower": TOWER.to_dict(), "text_tower": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    absent = {"center": None, "image_head": None, "logit_bias": None}
    assert read_config(tmp_path) == values | absent | {"image_tower": TOWER}


TEXT = {
    "spec": "scratch:tiny",
    "pooling": "last",
    "context_length": 16,
    "width": 4,
    "feature_width": 192,
    "config": {"library": "transformers", "config": {"model_type": "bert"}},
}
WHOLE = {
    "format": FORMAT,
    "image_tower": TowerIdentity(
        "timm:a", "0", 4, Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3), {"library": "timm"}
    ).to_dict(),
    "center": [0.0] * 4,
    "image_head": 4,
    "logit_bias": 0.0,
    "text_tower": TEXT,
}


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("format",), "1"),
        (("image_tower",), []),
        (("image_tower", "spec"), None),
        (("image_tower", "width"), "4"),
        (("image_tower", "preprocessing", "image_size"), [8]),
        (("image_tower", "preprocessing", "image_size"), [8, 10**9]),
        (("image_tower", "preprocessing", "mean"), [1, 2, "3"]),
        (("image_tower", "preprocessing", "std"), [1, 2, 0]),
        (("image_tower", "preprocessing", "interpolation"), "sharp"),
        (("image_tower", "preprocessing", "crop_fraction"), 0),
        (("image_tower", "preprocessing", "speed"), 1),
        (("image_tower", "config", "library"), 3),
        (("center",), [0.0] * 3),
        (("image_head",), -1),
        (("logit_bias",), "no"),
        (("text_tower",), [1]),
        (("text_tower", "pooling"), "max"),
        (("text_tower", "width"), 0),
        (("text_tower", "config", "library"), "other"),
        (("text_tower", "spec"), "half \ud83d"),
    ],
)
def test_damaged_value_is_named(tmp_path: Path, keys: tuple[str, ...], value: object) -> None:
    values = json.loads(json.dumps(WHOLE))
    (tmp_path / "config.json").write_text(json.dumps(values))
    read_config(tmp_path)
    inside = values
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=rf"config\.json .* damaged: {re.escape('.'.join(keys))} "):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no model at .*it has no config.json"),
        ("{", "is not the config.json of a model"),
        ("[1]", "is not the config.json of a model"),
        ('{"format": 1}', "is not the config.json of a model"),
        ('{"format": 99}', "has format 99; this lamplit reads up to 3: upgrade it"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=told):
        read_config(tmp_path)
