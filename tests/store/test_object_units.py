"""Units of a source that several processes embed into one store in object storage."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from object_server import ObjectServer
from same_stores import require_equal_stores

from lamplit.data.sources import read_pairs
from lamplit.data.units import Unit
from lamplit.store.embed.embedding import embed
from lamplit.store.embed.unit_embedding import HowToEmbed, UnitEmbedder
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower


def embedder_of(tower: ImageTower, source: Path, out: str) -> UnitEmbedder:
    how = HowToEmbed(False, "torch", torch.device("cpu"), 64, 0, 10**8)
    return UnitEmbedder(read_pairs(source), copy.deepcopy(tower), out, how, 30)


@pytest.mark.slow
def test_shards_make_the_store_of_one_process(
    objects: ObjectServer, image_folder: Path, image_tower: ImageTower, store_path: Path
) -> None:
    out = f"{objects.root}/pairs.lance"
    first, second = (
        embed(image_folder / "pairs.csv", out, image_tower=image_tower, backend="torch", shard=(index, 2), unit_rows=20)
        for index in range(2)
    )
    assert (first.units, first.units_left) == (3, 1)
    assert (second.units_left, first.embedded + second.embedded) == (0, 60)
    require_equal_stores(out, store_path)


@pytest.mark.slow
def test_answers_that_are_lost(objects: ObjectServer, image_folder: Path, image_tower: ImageTower) -> None:
    """The record of a unit is written, as is the commit that takes it; neither answer arrives."""
    out = f"{objects.root}/pairs.lance"
    embedder = embedder_of(image_tower, image_folder / "pairs.csv", out)
    lost: list[str] = []

    def lose(method: str, path: str) -> str | None:
        if method != "PUT" or not ("/_units/" in path or "/_versions/" in path) or len(lost) % 2:
            return None
        lost.append(path)
        return "lose"

    for unit in embedder.units:
        objects.fault = lose
        assert embedder.embed(unit, lambda _: None) is not None
        objects.fault = lambda method, path: None
        lost.clear()
    objects.fault = lose
    embedder.commit()
    objects.fault = lambda method, path: None
    assert "_versions/" in lost[0]
    assert len(Store(out)) == 60
    assert len(set(Store(out).column("id"))) == 60


def test_the_second_attempt_at_a_unit_loses(objects: ObjectServer, image_folder: Path, image_tower: ImageTower) -> None:
    out = f"{objects.root}/pairs.lance"
    first, second = (embedder_of(image_tower, image_folder / "pairs.csv", out) for _ in range(2))
    unit: Unit = first.units[0]
    assert first.embed(unit, lambda _: None) is not None
    assert second.embed(unit, lambda _: None) is None
    second.commit()
    first.commit()
    assert len(Store(out)) == 30
    files = [path for path in objects.system.find(f"{objects.bucket}/pairs.lance/data") if path.endswith(".lance")]
    assert len(files) == 1  # that of the second attempt is gone
