from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.data.crops import inception_crop
from lamplit.data.preprocessing import Preprocessing
from lamplit.tuning.batches import Batches
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import Links


def made(num_pairs: int, **changes: object) -> Batches:
    pairs = Links([f"text {i}" for i in range(num_pairs)], torch.arange(num_pairs).flip(0), torch.arange(num_pairs))
    paths = [f"{i}.png" for i in range(num_pairs)]
    return Batches(pairs, paths, TuneSettings("demo:minilm", mode="UU", **changes))  # type: ignore[arg-type]


@given(st.integers(2, 60), st.integers(2, 40), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_an_epoch_has_every_pair_at_most_once(num_pairs: int, batch_size: int, seed: int) -> None:
    batches = made(num_pairs, batch_size=batch_size, seed=seed, epochs=3)
    assert batches.batch_size == min(batch_size, num_pairs)
    for epoch in range(3):
        steps = [epoch * batches.steps_per_epoch + index for index in range(batches.steps_per_epoch)]
        rows = torch.cat([batches.rows(step) for step in steps]).tolist()
        assert len(rows) == len(set(rows)) == batches.steps_per_epoch * batches.batch_size


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
    crops = list(batches.crops(6))
    assert len(crops) == 3
    for step, batch in zip(range(6, 9), crops, strict=True):
        assert [crop.path for crop in batch] == [f"{19 - row}.png" for row in batches.rows(step).tolist()]
        assert all(crop.seed is None for crop in batch)


def test_every_crop_has_its_own_seed() -> None:
    batches = made(20, batch_size=4, steps=9, augment="inception")
    seeds = [crop.seed for batch in batches.crops(0) for crop in batch]
    assert len(set(seeds)) == 36
    assert [crop.seed for batch in batches.crops(6) for crop in batch] == seeds[24:]
    others = made(20, batch_size=4, steps=9, augment="inception", seed=1)
    assert not {crop.seed for batch in others.crops(0) for crop in batch} & set(seeds)


@pytest.mark.parametrize("seed", [20_240_101, 2**63 - 1])
def test_large_seeds_are_taken(seed: int) -> None:
    batches = made(20, batch_size=4, steps=9, augment="inception", seed=seed)
    seeds = [crop.seed for batch in batches.crops(0) for crop in batch]
    assert len(set(seeds)) == 36
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    for number in seeds:
        assert number is not None
        assert inception_crop(image, Preprocessing((4, 4), (0.5,) * 3, (0.5,) * 3), number).shape == (3, 4, 4)
