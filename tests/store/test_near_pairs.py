"""Near pairs found through sieves, against the plain product of all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lamplit.store import near_pairs as module
from lamplit.store.near_pairs import near_pairs

ROUNDING = 1e-5


def all_pairs(halves: torch.Tensor, limit: float, chunk_size: int) -> dict[tuple[int, int], float]:
    found: dict[tuple[int, int], float] = {}
    total = 0
    for done, pairs in near_pairs(halves, limit, chunk_size):
        total += done
        for left, right, cosine in zip(*(part.tolist() for part in pairs), strict=True):
            assert left < right
            assert (left, right) not in found
            found[left, right] = cosine
    assert total == len(halves)
    return found


@given(
    st.integers(0, 90), st.sampled_from([3, 64, 130, 300]), st.sampled_from([0.05, 0.5, 0.95]),
    st.sampled_from([1, 7, 40, 128]), st.floats(0, 2), st.integers(0, 3), st.sampled_from([1e-3, 1.0, 100.0]),
)  # fmt: skip
def test_all_and_only_near_pairs(
    size: int, width: int, limit: float, chunk: int, spread: float, seed: int, length: float
) -> None:
    random = np.random.default_rng(seed)
    centers = random.standard_normal((5, width)) * random.exponential(size=width)
    rows = centers[random.integers(5, size=size)] + spread * random.standard_normal((size, width))
    halves = torch.from_numpy(rows * length / np.linalg.norm(rows, axis=1, keepdims=True)).half()
    units = F.normalize(halves.double(), dim=1)
    cosines = (units @ units.T).numpy()
    found = all_pairs(halves, limit, chunk)
    for left in range(size):
        for right in range(left + 1, size):
            if cosines[left, right] >= limit + ROUNDING:
                assert (left, right) in found
            elif cosines[left, right] < limit - ROUNDING:
                assert (left, right) not in found
    assert all(abs(cosines[pair] - cosine) < ROUNDING for pair, cosine in found.items())


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_dense_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch, dense: float) -> None:
    vectors = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) + 0.7
    expected = all_pairs(vectors.half(), 0.4, 64)
    monkeypatch.setattr(module, "_DENSE", dense)
    found = all_pairs(vectors.half(), 0.4, 64)
    assert len(expected) > 1000
    near = {pair for pair, cosine in expected.items() if cosine > 0.4 + ROUNDING}
    assert near <= found.keys()
    assert all(abs(expected[pair] - found[pair]) < ROUNDING for pair in near)


def test_most_pairs_are_ruled_out_by_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it is as slow as the plain product, and nothing says so."""
    random = torch.Generator().manual_seed(0)
    strength = torch.linspace(1, 6, 256).exp2().flip(0)
    centers = torch.randn(500, 256, generator=random) * strength
    vectors = (centers.repeat(4, 1) + 0.1 * torch.randn(2000, 256, generator=random) * strength).half()
    multiplied = []
    exact = module._cosines
    monkeypatch.setattr(
        module, "_cosines", lambda *arguments: (multiplied.append(len(arguments[2])), exact(*arguments))[1]
    )
    found = all_pairs(vectors, 0.95, 512)
    assert len(found) > 2900
    assert sum(multiplied) < 1.2 * len(found)
