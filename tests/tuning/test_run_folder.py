from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lamplit.errors import UsageError
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.identity import TowerIdentity
from lamplit.tuning.run_folder import claim, read_settings
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


def test_first_version_is_read(tmp_path: Path) -> None:
    write_settings(tmp_path, format=1)
    as_first_version(tmp_path / "settings.json")
    assert {"text", "warmup", "pictures"} <= json.loads((tmp_path / "settings.json").read_text()).keys()
    found = read_settings(tmp_path / "settings.json")
    assert {name: found[name] for name in asdict(SETTINGS)} == asdict(SETTINGS)
    assert (found["format"], found["images"]) == (1, 3)


def test_younger_settings_have_their_defaults(tmp_path: Path) -> None:
    values = {"text": "demo:minilm", "store": str(tmp_path / "a.lance"), "pictures": 3, "tower": "0" * 32}
    (tmp_path / "settings.json").write_text(json.dumps(values))
    assert read_settings(tmp_path / "settings.json").items() >= asdict(TuneSettings("demo:minilm")).items()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"format": 5}', r"has format 5; this lamplit reads up to 4: upgrade it"),
        ('{"format": 1, "magic": 3}', r"has unknown settings magic; tune again with another --out"),
        ('{"format": ', r"is not JSON .*; give another --out"),
        ("[]", r"holds no settings of a run; give another --out"),
        ('{"format": "4"}', r"holds no settings of a run; give another --out"),
    ],
)
def test_unreadable_settings_are_explained(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UsageError, match=expected):
        read_settings(tmp_path / "settings.json")


@pytest.mark.parametrize("content", ['{"out": ', "[]", '{"out": "a"}', '{"magic": 3}'])
def test_unreadable_report_is_explained(content: str, store: Store, tmp_path: Path) -> None:
    assert claim(tmp_path, store, SETTINGS) is None
    (tmp_path / "checkpoints").mkdir()  # it has begun
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UsageError, match=r"report\.json is damaged, or a newer lamplit wrote it .*; delete it"):
        claim(tmp_path, store, SETTINGS)


def test_a_store_or_a_file_is_no_folder_for_a_run(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a store, and a run is a folder of its own; give another --out"):
        claim(Path(store.path), store, SETTINGS)
    (tmp_path / "settings.json").write_text('{"theirs": 1}')
    with pytest.raises(UsageError, match=r"has unknown settings theirs"):
        claim(tmp_path, store, SETTINGS)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"is a file, and a run is a folder of its own"):
        claim(tmp_path / "file", store, SETTINGS)


def test_repr_of_a_report() -> None:
    report = TuneReport("run", "LU", "timm:a", "demo:minilm", 8, 2, 2, {}, 0, best_step=3, steps=5)
    assert repr(report) == "<TuneReport run: LU, demo:minilm reads timm:a, 5 steps>"
    report.best = {"image_to_text/recall@1": 0.388}
    assert repr(report).endswith("timm:a, image_to_text/recall@1 0.388 at step 3 of 5 steps>")


def test_first_version_is_claimed_if_it_is_finished(store: Store, tmp_path: Path) -> None:
    assert claim(tmp_path, store, SETTINGS) is None
    values = json.loads((tmp_path / "settings.json").read_text())
    old = {name: value for name, value in values.items() if name not in ("pairs", "vectors", "test_fraction")}
    (tmp_path / "settings.json").write_text(json.dumps(old))
    as_first_version(tmp_path / "settings.json")
    (tmp_path / "checkpoints").mkdir()  # it has begun
    with pytest.raises(UsageError, match=r"other settings: lr was 0\.5 and is 0\.25\. Give another"):
        claim(tmp_path, store, TuneSettings(**asdict(SETTINGS) | {"lr": 0.25}))
    with pytest.raises(UsageError, match=r"run of an earlier lamplit, which split .*; it cannot go on"):
        claim(tmp_path, store, SETTINGS)
    report = TuneReport("run", "UU", "timm:a", "demo:minilm", 8, 2, 2, {}, 0)
    (tmp_path / "report.json").write_text(json.dumps(asdict(report)))
    assert claim(tmp_path, store, SETTINGS) == report
    elsewhere = shutil.copytree(store.path, tmp_path / "elsewhere.lance")
    with pytest.raises(UsageError, match="has changed: another path"):
        claim(tmp_path, Store(elsewhere), SETTINGS)


def test_run_that_never_began_may_begin_otherwise(store: Store, tmp_path: Path) -> None:
    assert claim(tmp_path, store, TuneSettings("demo:minilmm")) is None
    assert claim(tmp_path, store, SETTINGS) is None
    assert read_settings(tmp_path / "settings.json")["text_tower"] == "demo:minilm"


def made_up(folder: Path, rows: Sequence[int] = range(6), **changes: Any) -> Store:
    """Write six rows of a store, or some of them, in the order given; one of them may be changed."""
    vectors = torch.eye(8)
    written = [Row(f"{i}", f"{i}.png", f"hash {i}", [f"text {i}"], vectors[i], {"n": i}) for i in rows]
    written[-1] = replace(written[-1], **changes)
    tower = TowerIdentity("module:a", "0" * 32, 8, None, {"library": "module", "name": "a"})
    return Store.create(folder, tower, written, backend="torch", metadata_columns=["n"])


@pytest.mark.parametrize("is_finished", [True, False])
def test_store_is_known_by_what_is_in_it(tmp_path: Path, is_finished: bool) -> None:
    out, store = tmp_path / "run", made_up(tmp_path / "a.lance")
    assert claim(out, store, SETTINGS) is None
    (out / "checkpoints").mkdir()
    report = TuneReport("run", "UU", "timm:a", "demo:minilm", 8, 2, 2, {}, 0)
    if is_finished:
        (out / "report.json").write_text(json.dumps(asdict(report)))
    expected = report if is_finished else None
    moved = Store(shutil.copytree(store.path, tmp_path / "b.lance"))
    shuffled = made_up(tmp_path / "c.lance", [3, 4, 5, 0, 1, 2])
    appended = made_up(tmp_path / "d.lance", [0, 1, 2])
    appended.append(list(rows_of(store, [3, 4, 5])))
    unlike = made_up(tmp_path / "e.lance", path="elsewhere.png", metadata={"n": 7})
    for same in (store, moved, shuffled, appended, unlike):
        assert claim(out, same, SETTINGS) == expected, same
        same.finish()  # merges fragments
        assert claim(out, same, SETTINGS) == expected, same
    changes: dict[str, dict[str, Any]] = {
        "it has 5 images and had 6": {"rows": range(5)},
        "other texts, images or ids": {"texts": ["another"]},
        "other texts, images or ids. Tune": {"hash": "another"},
        "other vectors": {"vector": torch.eye(8)[7]},
    }
    for number, (expected_words, change) in enumerate(changes.items()):
        other = made_up(tmp_path / f"other{number}.lance", **change)
        with pytest.raises(UsageError, match=rf"holds a run on other pairs: .* has changed: {expected_words}"):
            claim(out, other, SETTINGS)


def rows_of(store: Store, rows: Sequence[int]) -> Iterator[Row]:
    for row, vector in zip(store.rows(rows), store.vectors_at(rows), strict=True):
        yield Row(row["id"], row["path"], row["hash"], row["texts"], vector, {"n": row["n"]})
