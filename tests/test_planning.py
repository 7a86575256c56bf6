from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import lamplit
from lamplit import planning
from lamplit.data.pairs import Pair, Pairs
from lamplit.errors import UsageError
from lamplit.model import save_image_tower
from lamplit.planning import plan
from lamplit.towers.images.image_tower import ImageTower
from lamplit.tuning.settings import TuneSettings

HEADER = 64 * 1024  # of a safetensors file, at most


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SECONDS", 0.2)


def test_counts_and_bytes_are_those_of_the_runs(
    image_folder: Path, image_tower: ImageTower, text_folder: Path, tmp_path: Path
) -> None:
    settings = TuneSettings(f"hf:{text_folder}", batch_size=16, head="linear", epochs=2, num_evals=1)
    found = plan(image_folder / "pairs.csv", settings, image_tower=image_tower)
    embedded = lamplit.embed(image_folder / "pairs.csv", tmp_path / "s.lance", image_tower=image_tower)
    store = lamplit.Store(tmp_path / "s.lance")
    report = lamplit.tune(store, tmp_path / "run", settings)
    texts = store.texts()
    assert (found.images, found.backend) == (len(store), embedded.backend)
    assert found.pairs == sum(map(len, texts))
    assert found.captions == len({text for row in texts for text in row})
    assert found.steps == report.steps
    halves = np.concatenate(list(store.half_blocks()))
    assert found.embed.disk["vectors"] == halves.nbytes
    text_tower = (tmp_path / "run" / "text_tower.safetensors").stat().st_size
    assert 0 <= text_tower - found.tune.disk["text tower"] < HEADER
    save_image_tower(image_tower, tmp_path)
    saved = (tmp_path / "image_tower.safetensors").stat().st_size
    assert 0 <= saved - found.tune.disk["image tower"] < HEADER
    checkpoint = (tmp_path / "run" / "checkpoints" / "last.safetensors").stat().st_size
    assert 0 <= checkpoint - found.tune.disk["checkpoint"] < HEADER
    for stage in (found.embed, found.tune):
        assert stage.seconds == pytest.approx(sum(stage.parts.values()))
        assert all(seconds >= 0 for seconds in stage.parts.values())
    assert found.dollars is None


def test_more_steps_take_longer(image_folder: Path, image_tower: ImageTower, text_folder: Path) -> None:
    def tuning(**given: int) -> planning.Stage:
        settings = TuneSettings(f"hf:{text_folder}", batch_size=16, **given)
        return plan(image_folder / "pairs.csv", settings, image_tower=image_tower, dollars_per_hour=3600.0).tune

    few, many = tuning(steps=1), tuning(steps=1000)
    assert many.parts["steps"] > 100 * few.parts["steps"]
    assert few.parts["closed form"] > 0


def test_price_is_that_of_the_time(image_folder: Path, image_tower: ImageTower, text_folder: Path) -> None:
    settings = TuneSettings(f"hf:{text_folder}", steps=10**9)
    found = plan(image_folder / "pairs.csv", settings, image_tower=image_tower, dollars_per_hour=2.0)
    assert found.dollars == pytest.approx((found.embed.seconds + found.tune.seconds) / 3600 * 2, abs=0.01)


def test_samples_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SAMPLE", 500)
    pairs = [Pair(str(number), b"", (f"text {number % 700}",), {}) for number in range(5000)]
    census = planning._Census.take(Pairs("numbers", None, None, (), lambda: iter(pairs)))
    assert (census.images, census.pairs, census.captions) == (5000, 5000, 700)
    numbers = sorted(int(pair.id) for pair in census.sample)
    assert len(numbers) == 500
    assert max(b - a for a, b in pairwise(numbers)) < 150


def test_refused(image_folder: Path, image_tower: ImageTower, text_folder: Path, tmp_path: Path) -> None:
    settings = TuneSettings(f"hf:{text_folder}", mode="UU")
    with pytest.raises(UsageError, match="a plan is for a locked image tower, and in mode UU it trains"):
        plan(image_folder / "pairs.csv", settings, image_tower=image_tower)
    (tmp_path / "one.csv").write_text(f"image,text\n{next(image_folder.glob('*.png'))},a dog\n")
    with pytest.raises(UsageError, match=r"one\.csv has 1 pairs of an image and a text; tuning compares pairs"):
        plan(tmp_path / "one.csv", TuneSettings(f"hf:{text_folder}"), image_tower=image_tower)
