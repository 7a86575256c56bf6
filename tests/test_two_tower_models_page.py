"""The page that `docs/two_tower_models.py` wrote: what the script renders, of every family, and nothing failed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from open_clip_families import open_clip_families
from two_tower_families import families

DOCS = Path(__file__).parents[1] / "docs"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("docs_two_tower_models", DOCS / "two_tower_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


page = load_script()
SEEN = json.loads((DOCS / "two-tower-models.json").read_text())
ROWS = [page.Row(**values) for values in SEEN["rows"]]


def test_page_is_what_the_script_renders() -> None:
    assert (DOCS / "two-tower-models.md").read_text() == page.render(SEEN)


def test_every_family_was_measured() -> None:
    names = [
        *(("hf", each.name) for each in families()),
        ("st", "CLIP"),
        *(("open_clip", each.name) for each in open_clip_families()),
    ]
    names += [("dinotxt", title) for title in page.DINOTXT_TITLES.values()]
    assert [(row.spec, row.family) for row in ROWS] == names
    for row in ROWS:
        assert row.failures() == [], row.family
        assert list(row.differences) == list(page.WORDS)


@pytest.mark.parametrize("name", [name for name in page.WORDS if name != page.UNBOUNDED])
def test_a_difference_is_a_failure(name: str) -> None:
    for value in (2e-5, float("nan")):
        worse = page.Row("x", "hf", ROWS[0].differences | {name: value})
        assert worse.failures() == [name]
        assert page.line(worse).count("FAILED") == 1


def test_a_family_is_measured(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    [family] = [each for each in families() if each.name == "SigLIP"]
    owner = page.of_transformers(family, tmp_path / "owner")
    row = page.measure("SigLIP", f"hf:{tmp_path / 'owner'}", owner, tmp_path / "saved")
    assert row.failures() == []
    wrong = page.Owner(owner.zimg, owner.ztxt.roll(1, 0), owner.pixels, owner.multiplier, owner.bias)
    row = page.measure("SigLIP", f"hf:{tmp_path / 'owner'}", wrong, tmp_path / "again")
    assert row.failures() == ["text vectors"]
