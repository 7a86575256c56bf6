from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.data.decoding.crops import inception_crop
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.tuning.batches import Batches
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import Links

PATHS = pa.array([f"{i}.png" for i in range(20)])


def made(num_pairs: int, **changes: object) -> Batches:
    pairs = Links([f"text {i}" for i in range(num_pairs)], torch.arange(num_pairs).flip(0), torch.arange(num_pairs))
    return Batches(pairs, TuneSettings("demo:minilm", mode="UU", **changes))  # type: ignore[arg-type]


@given(st.integers(2, 60), st.integers(2, 70), st.sampled_from([0.5, 1, 2, 3, 4.7]), st.integers(0, 3))
@settings(max_examples=60)
def test_every_pair_is_seen_as_often_as_epochs_say(num_pairs: int, batch_size: int, epochs: float, seed: int) -> None:
    batches = made(num_pairs, batch_size=batch_size, seed=seed, epochs=epochs)
    assert batches.batch_size == min(batch_size, num_pairs)
    assert batches.total_steps == max(1, round(epochs * num_pairs / batches.batch_size))
    rows = torch.cat([batches.rows(step) for step in range(batches.total_steps)])
    assert len(rows) == batches.total_steps * batches.batch_size
    times = torch.bincount(rows, minlength=num_pairs)
    assert times.max() - times.min() <= 1
    whole, rest = divmod(len(rows), num_pairs)
    assert times.min() == whole
    assert (times > whole).sum() == rest
    assert batches.epochs(batches.total_steps) == pytest.approx(len(rows) / num_pairs)


@pytest.mark.parametrize(("num_pairs", "epochs", "steps"), [(2047, 20, 40), (1500, 20, 29), (130, 1, 1), (562, 3, 3)])
def test_epochs_are_passes_whatever_the_batch_size(num_pairs: int, epochs: float, steps: int) -> None:
    assert made(num_pairs, batch_size=1024 if num_pairs > 200 else 128, epochs=epochs).total_steps == steps


def test_rows_depend_on_the_step_alone() -> None:
    """Steps may be asked for in any order: workers read ahead, and a resumed run begins in the middle."""
    batches, others = made(20, batch_size=4, epochs=6), made(20, batch_size=4, epochs=6)
    expected = [batches.rows(step).tolist() for step in range(30)]
    assert [others.rows(step).tolist() for step in reversed(range(30))] == expected[::-1]
    assert expected[:5] != expected[5:10], "every epoch has an order of its own"
    assert [made(20, batch_size=4, seed=1).rows(step).tolist() for step in range(5)] != expected[:5]


def test_steps_stand_in_for_epochs() -> None:
    assert made(20, batch_size=4, epochs=2).total_steps == 10
    assert made(20, batch_size=4, epochs=2, steps=7).total_steps == 7
    assert made(20, batch_size=4, epochs=0.01).total_steps == 1
    assert made(20, batch_size=4, steps=7, num_evals=3).eval_every == 3


def test_crops_are_those_of_the_rows() -> None:
    batches = made(20, batch_size=4, steps=9)
    crops = list(batches.crops(6, PATHS))
    assert len(crops) == 3
    for step, batch in zip(range(6, 9), crops, strict=True):
        assert [crop.path for crop in batch] == [f"{19 - row}.png" for row in batches.rows(step).tolist()]
        assert all(crop.seed is None for crop in batch)


def test_every_crop_has_its_own_seed() -> None:
    batches = made(20, batch_size=4, steps=9, augment="inception")
    seeds = [crop.seed for batch in batches.crops(0, PATHS) for crop in batch]
    assert len(set(seeds)) == 36
    assert [crop.seed for batch in batches.crops(6, PATHS) for crop in batch] == seeds[24:]
    others = made(20, batch_size=4, steps=9, augment="inception", seed=1)
    assert not {crop.seed for batch in others.crops(0, PATHS) for crop in batch} & set(seeds)


@pytest.mark.parametrize("seed", [20_240_101, 2**63 - 1])
def test_large_seeds_are_taken(seed: int) -> None:
    batches = made(20, batch_size=4, steps=9, augment="inception", seed=seed)
    seeds = [crop.seed for batch in batches.crops(0, PATHS) for crop in batch]
    assert len(set(seeds)) == 36
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    for number in seeds:
        assert number is not None
        assert inception_crop(image, Preprocessing((4, 4), (0.5,) * 3, (0.5,) * 3), number).shape == (3, 4, 4)
