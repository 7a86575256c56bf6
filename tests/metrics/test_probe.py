from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.errors import UsageError
from lamplit.metrics.probe import draw, fit, ridge_accuracy


def slow_scores(train, labels, test, l2):
    """Scores of the least squares of the data with sqrt(l2) rows under it: another way to the same minimum."""
    mean, std = train.mean(0), train.std(0) + 1e-5

    def features(vectors):
        return np.hstack([(vectors - mean) / std, np.full((len(vectors), 1), 100.0)])

    x, y = features(train), np.where(labels[:, None] == np.arange(labels.max() + 1), 1.0, -1.0)
    penalty = np.sqrt(l2) * np.eye(x.shape[1])
    weight, *_ = np.linalg.lstsq(
        np.vstack([x, penalty]), np.vstack([y, np.zeros((len(penalty), y.shape[1]))]), rcond=None
    )
    return features(test) @ weight


def data(count, width, classes, seed):
    numbers = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), numbers.integers(0, classes, count - classes)])
    return numbers.normal(size=(count, width)) + labels[:, None] / 3, labels


@settings(max_examples=40)
@given(st.integers(3, 30), st.integers(1, 30), st.sampled_from([1.0, 32.0, 1024.0]), st.integers(0, 99))
def test_as_least_squares(count, width, l2, seed):
    (train, labels), (test, truth) = (data(count, width, 3, seed + i) for i in (0, 1000))
    expected = slow_scores(train, labels, test, l2)
    probe = fit(torch.tensor(train), torch.tensor(labels), l2)
    np.testing.assert_allclose(probe.scores(torch.tensor(test)).numpy(), expected, atol=1e-8, rtol=0)
    right = ridge_accuracy(*map(torch.tensor, (train, labels, test, truth)), l2)
    assert right.tolist() == (expected.argmax(1) == truth).tolist()


def test_a_tie_counts_as_wrong():
    """Two classes of the same images: their weights are the same to the bit."""
    train = torch.tensor([[0.0], [0.0], [2.0]])
    right = ridge_accuracy(train[[0, 2]], torch.tensor([0, 1]), train[:1], torch.tensor([0]), l2=2.0)
    assert right.tolist() == [1]
    both = torch.tensor([[0.0], [2.0], [0.0], [2.0]])
    assert ridge_accuracy(both, torch.tensor([0, 0, 1, 1]), train, torch.tensor([0, 1, 0]), l2=2.0).tolist() == [
        0,
        0,
        0,
    ]


def test_by_hand():
    # Mean 1, deviation 1: the features are -1 and 1 (nearly) and 100. Of the offset's targets -1 and 1 nothing is left.
    probe = fit(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), l2=2.0)
    assert probe.mean.tolist() == [1.0]
    torch.testing.assert_close(probe.weight, torch.tensor([[-0.5, 0.5], [0, 0]]).double(), atol=1e-5, rtol=0)
    # Three of class 0 and one of class 1: the offset is (1 + 1 + 1 - 1) * 100 / (4 * 100 * 100 + 1).
    weight = fit(torch.tensor([[1.0], [1.0], [1.0], [1.0]]), torch.tensor([0, 0, 0, 1]), l2=1.0).weight
    assert weight[1].tolist() == pytest.approx([200 / 40001, -200 / 40001], abs=1e-12)
    right = ridge_accuracy(
        torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), torch.tensor([[0.9], [1.1]]), torch.tensor([0, 0])
    )
    assert right.tolist() == [1, 0]


def test_dual_is_primal():
    vectors, labels = data(20, 30, 4, seed=0)
    small = fit(torch.tensor(vectors[:, :19]), torch.tensor(labels))  # 20 features, 20 images: primal
    zeros = np.zeros((20, 11))  # they change no score, but now there are more features than images: dual
    large = fit(torch.tensor(np.hstack([vectors[:, :19], zeros])), torch.tensor(labels))
    torch.testing.assert_close(large.weight[[*range(19), 30]], small.weight, atol=1e-12, rtol=0)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 20), st.integers(0, 99))
def test_draw(shots, classes, more, seed):
    numbers = np.random.default_rng(seed)
    labels = numbers.permutation([*np.repeat(np.arange(classes), shots), *numbers.integers(0, classes, more)])
    rows = draw(torch.tensor(labels), shots, seed)
    assert labels[rows.numpy()].tolist() == np.repeat(np.arange(classes), shots).tolist()
    assert len(set(rows.tolist())) == classes * shots
    # The draw of big_vision: one generator, a permutation of the rows of each class in turn.
    generator = np.random.default_rng(seed)
    expected = [generator.permutation(np.where(labels == label)[0])[:shots] for label in range(classes)]
    assert rows.tolist() == np.concatenate(expected).tolist()


def test_draws_differ_by_seed():
    labels = torch.arange(3).repeat(100)
    draws = [draw(labels, 10, seed).tolist() for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]


def test_errors():
    with pytest.raises(UsageError, match="class 1 has 2 examples and 3 are to be drawn"):
        draw(torch.tensor([0, 0, 1, 0, 1]), 3, 0)
    with pytest.raises(UsageError, match="class 1 has 0 examples"):
        draw(torch.tensor([0, 2]), 1, 0)
    with pytest.raises(UsageError, match="0 shots of 1 examples"):
        draw(torch.tensor([0]), 0, 0)
    with pytest.raises(UsageError, match="10 shots of 0 examples"):
        draw(torch.tensor([], dtype=torch.long))
    vectors, labels = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="2 training vectors and 1 labels"):
        fit(vectors, labels[:1])
    with pytest.raises(UsageError, match="l2 is 0"):
        fit(vectors, labels, 0)
    with pytest.raises(UsageError, match="class 2 has test images but no training images"):
        ridge_accuracy(vectors, labels, vectors, torch.tensor([1, 2]))
    with pytest.raises(UsageError, match="2 test vectors and 1 labels"):
        ridge_accuracy(vectors, labels, vectors, labels[:1])


class Elsewhere(torch.Tensor):
    """A tensor on another device: it can be taken to the CPU, and nothing else, as with labels that are there."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="meta")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        options = options or {}
        if operation is torch.ops.aten._to_copy.default and options.get("device") == torch.device("cpu"):
            return operation(arguments[0].inner, **options)
        raise TypeError(f"{operation} of a tensor on another device")


def test_vectors_on_another_device():
    (train, labels), (test, truth) = (map(torch.tensor, data(20, 5, 3, seed)) for seed in (0, 1))
    train, test = train.float(), test.float()
    expected = ridge_accuracy(train, labels, test, truth)
    for elsewhere in (
        ridge_accuracy(Elsewhere(train), labels, Elsewhere(test), truth),
        ridge_accuracy(Elsewhere(train), Elsewhere(labels), Elsewhere(test), Elsewhere(truth)),
    ):
        assert elsewhere.device.type == "cpu"
        assert torch.equal(elsewhere, expected)
    probe = fit(train, labels)
    assert torch.equal(fit(Elsewhere(train), labels).weight, probe.weight)
    assert torch.equal(probe.scores(Elsewhere(test)), probe.scores(test))


def test_what_is_not_a_number_is_wrong():
    right = ridge_accuracy(
        torch.eye(2), torch.tensor([0, 1]), torch.tensor([[math.nan, 0], [0, 1]]), torch.tensor([0, 1])
    )
    assert right.tolist() == [0, 1]
