"""Features of a classifier's names, kept in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_closed_form import World

from lamplit.towers.images.backbone import ClassHead
from lamplit.tuning.head import kept_features
from lamplit.tuning.head.closed_form import ClosedForm
from lamplit.tuning.head.kept_features import MOST_KEPT, features_file, read_or_encode
from lamplit.tuning.sides import token_features


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def world() -> World:
    return World(anchors=60)


def never(*_: object, **__: object) -> torch.Tensor:
    raise AssertionError("they were computed anew")


def test_second_reading_is_the_first(world: World, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = world.tower.tokenize(world.texts[:20])
    expected = token_features(world.tower, tokens)
    assert torch.equal(read_or_encode(world.tower, tokens), expected)
    assert [file.name for file in cache.iterdir()] == [features_file(world.tower, tokens).name]
    monkeypatch.setattr(kept_features, "token_features", never)
    assert torch.equal(read_or_encode(world.tower, tokens), expected)


def test_another_encoder_and_other_texts_are_read_anew(world: World, cache: Path) -> None:
    tokens = world.tower.tokenize(world.texts[:20])
    read_or_encode(world.tower, tokens)
    read_or_encode(world.tower, tokens[:10])
    with torch.no_grad():
        world.tower.head.values.weight.add_(1.0)  # type: ignore[union-attr, operator]
    read_or_encode(world.tower, tokens)
    assert len(list(cache.iterdir())) == 2, "the head has no part in them"
    with torch.no_grad():
        next(world.tower.encoder.parameters()).mul_(2.0)
    assert torch.equal(read_or_encode(world.tower, tokens), token_features(world.tower, tokens))
    assert len(list(cache.iterdir())) == 3


def test_damaged_file_is_computed_again(world: World) -> None:
    tokens = world.tower.tokenize(world.texts[:20])
    expected, file = read_or_encode(world.tower, tokens), features_file(world.tower, tokens)
    whole = file.read_bytes()
    half = whole[: len(whole) // 2]
    for content in (b"", whole[:-8], b"\xff" * len(whole), half + bytes(len(whole) - len(half))):
        file.write_bytes(content)
        assert torch.equal(read_or_encode(world.tower, tokens), expected)
        assert file.read_bytes() == whole


def test_oldest_files_go(world: World, cache: Path) -> None:
    for count in range(1, MOST_KEPT + 4):
        tokens = world.tower.tokenize(world.texts[:count])
        read_or_encode(world.tower, tokens)
        os.utime(features_file(world.tower, tokens), (count, count))
    assert sorted(file.stat().st_mtime for file in cache.iterdir()) == list(range(4, MOST_KEPT + 4))


def test_cache_that_cannot_be_written(world: World, cache: Path) -> None:
    cache.parent.mkdir()
    cache.touch()  # a file where the folder would be
    tokens = world.tower.tokenize(world.texts[:20])
    assert torch.equal(read_or_encode(world.tower, tokens), token_features(world.tower, tokens))


def test_fit_is_the_same(world: World, cache: Path) -> None:
    classes = ClassHead([world.texts[60:62], world.texts[61:64], world.texts[:1]], world.zimg[60:63])
    heads = []
    for keeps_names in (False, True, True):
        fit = ClosedForm(world.tower, world.texts[:40], classes, keeps_names=keeps_names)
        assert cache.exists() == keeps_names
        fit.fit(world.zimg[:40], torch.arange(40))
        heads.append({name: value.clone() for name, value in world.tower.head.state_dict().items()})
    for name, value in heads[0].items():
        assert torch.equal(heads[1][name], value), name
        assert torch.equal(heads[2][name], value), name
