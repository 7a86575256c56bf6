from __future__ import annotations

from itertools import pairwise

import pytest

from lamplit.data import census
from lamplit.data.census import Census
from lamplit.data.pairs import Pair, Pairs
from lamplit.errors import UsageError


def test_samples_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "SAMPLE", 500)
    pairs = [Pair(str(number), b"", (f"text {number % 700}",), {}) for number in range(5000)]
    found = Census.take(Pairs("numbers", None, None, (), lambda: iter(pairs)))
    assert (found.images, found.pairs, found.captions) == (5000, 5000, 700)
    numbers = sorted(int(pair.id) for pair in found.sample)
    assert len(numbers) == 500
    assert max(b - a for a, b in pairwise(numbers)) < 150
    assert found.texts[:700] != [f"text {number}" for number in range(700)], "neighbours in a source are alike"
    assert sorted(found.texts) == sorted(pair.texts[0] for pair in pairs)


def test_a_sample_grows() -> None:
    found = Census(images=60, pairs=90, captions=45)
    assert found.grow(None) == 1
    assert found.grow(90) == 1.5
    assert (found.images, found.pairs, found.captions) == (90, 135, 68)
    with pytest.raises(UsageError, match="89 images were to be reckoned for, and the source has 90"):
        found.grow(89)
