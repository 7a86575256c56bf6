from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lamplit.unit_vectors import as_array, normalize


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_rows_are_made_unit_and_the_given_ones_stay(kind: type) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 33)).astype(kind)
    before = vectors.copy()
    made = normalize(vectors)
    assert made.dtype == np.float32
    assert np.abs(made - F.normalize(torch.from_numpy(vectors).float(), dim=1).numpy()).max() < 2e-7
    assert (vectors == before).all()


def test_zeros_and_nothing_stay_as_they_are() -> None:
    assert (normalize(np.zeros((2, 3), np.float16)) == 0).all()
    assert normalize(np.empty((0, 3), np.float16)).shape == (0, 3)


def test_tensors_become_arrays() -> None:
    given = torch.nn.Parameter(torch.randn(3, 4))
    assert np.array_equal(as_array(given), given.detach().numpy())
    assert as_array(given.half()).dtype == np.float32
    array = np.ones(3, np.float32)
    assert as_array(array) is array
