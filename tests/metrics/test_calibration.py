from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lamplit.metrics.calibration import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    balanced_accuracy,
    best_threshold,
    expected_calibration_error,
    f1,
    fit_sigmoid,
    fit_temperature,
    halves,
    keeping_threshold,
    label_thresholds,
    none_threshold,
    reliability_bins,
)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)


def bools(*values: int) -> Tensor:
    return torch.tensor(values).bool()


def random_sample(seed: int, count: int = 200, classes: int = 4, scale: float = 20.0) -> tuple[Tensor, Tensor]:
    """Cosines, and labels that are drawn from their softmax under `scale`."""
    generator = torch.Generator().manual_seed(seed)
    cosines = 0.2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((scale * cosines).softmax(1), 1, generator=generator)[:, 0]
    return cosines, labels


# --- Expected calibration error


def test_error_by_hand() -> None:
    # Bins of a fifth: (0.2, 0.4] holds 0.3 and 0.36 (half right), (0.8, 1] holds 0.9, 0.9 and 1 (two of three right).
    confidences, right = numbers(0.3, 0.36, 0.9, 0.9, 1.0), bools(0, 1, 1, 1, 0)
    low, high = reliability_bins(confidences, right, bins=5)
    assert (low["images"], low["confidence"], low["accuracy"]) == (2, pytest.approx(0.33), 0.5)
    assert (high["images"], high["confidence"], high["accuracy"]) == (3, pytest.approx(2.8 / 3), pytest.approx(2 / 3))
    assert expected_calibration_error(confidences, right, bins=5) == pytest.approx((2 * 0.17 + 3 * 0.8 / 3) / 5)


def test_edges_of_the_bins() -> None:
    found = reliability_bins(numbers(0.0, 0.5, 0.51, 1.0), bools(0, 0, 1, 1), bins=2)
    assert [(row["images"], row["accuracy"]) for row in found] == [(2, 0), (2, 1)]
    assert math.isnan(expected_calibration_error(numbers(), bools()))
    assert reliability_bins(numbers(), bools()) == []


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50), st.integers(1, 20))
def test_error_as_the_slow_one_and_bounded(answers: list[tuple[float, bool]], bins: int) -> None:
    confidences = torch.tensor([confidence for confidence, _ in answers], dtype=torch.float64)
    found = expected_calibration_error(confidences, torch.tensor([right for _, right in answers]), bins)
    slow = 0.0
    for number in range(bins):
        inside = [a for a in answers if number == min(max(math.ceil(a[0] * bins), 1), bins) - 1]
        slow += abs(sum(confidence - right for confidence, right in inside)) / len(answers)
    assert found == pytest.approx(slow, abs=1e-12)
    assert 0 <= found <= 1 + 1e-12


def test_halves_are_all_images_once_and_the_same_each_time() -> None:
    [(fit_on, judge), (other_fit, other_judge)] = halves(7)
    assert sorted([*fit_on.tolist(), *judge.tolist()]) == list(range(7))
    assert fit_on.tolist() == other_judge.tolist()
    assert judge.tolist() == other_fit.tolist()
    assert halves(7)[0][0].tolist() == fit_on.tolist()
    assert fit_on.tolist() != [0, 1, 2]


# --- Temperature


def smoothed_loss(cosines: Tensor, labels: Tensor, scale: float) -> float:
    """Negative log-likelihood with one more image of unknown class, spread over all."""
    logs = (scale * cosines).log_softmax(1)
    count = len(labels)
    return float(-(count * logs[torch.arange(count), labels].mean() + logs.mean()) / (count + 1))


@pytest.mark.parametrize("seed", range(2))
def test_temperature_is_the_best_of_many(seed: int) -> None:
    cosines, labels = random_sample(seed, count=40)
    found = fit_temperature(cosines, labels)
    grid = torch.logspace(0, 3, 601, dtype=torch.float64).tolist()
    assert found == pytest.approx(min(grid, key=lambda scale: smoothed_loss(cosines, labels, scale)), rel=1.2e-2)


def test_temperature_that_made_the_labels_is_found_again() -> None:
    cosines, labels = random_sample(0, count=4000)
    assert fit_temperature(cosines, labels) == pytest.approx(20, rel=0.1)


@settings(max_examples=25)
@given(st.integers(0, 999), st.floats(0.2, 5), st.floats(-1, 1))
def test_temperature_follows_the_size_of_cosines_and_not_their_offset(seed: int, size: float, offset: float) -> None:
    cosines, labels = random_sample(seed, count=30)
    offsets = offset * torch.rand(30, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, other = fit_temperature(cosines, labels), fit_temperature(size * cosines + offsets, labels)
    if SMALLEST_SCALE * 10 < found < LARGEST_SCALE / 10:
        assert other == pytest.approx(found / size, rel=1e-6)
    order = torch.randperm(30)
    assert fit_temperature(cosines[order], labels[order]) == pytest.approx(found, rel=1e-6)


def test_temperature_without_a_mistake_is_finite_and_grows_with_the_sample() -> None:
    def confidence(count: int) -> float:
        cosines = torch.tensor([[0.2, 0.1], [0.1, 0.2]]).repeat(count // 2, 1)
        scale = fit_temperature(cosines, torch.arange(count) % 2)
        return float((scale * cosines).softmax(1).max())

    # One image of unknown class, half of it wrong, beside the right ones.
    assert confidence(2) == pytest.approx((2 + 1 / 2) / 3)
    assert confidence(100) == pytest.approx((100 + 1 / 2) / 101)


def test_temperature_where_there_is_nothing_to_learn() -> None:
    one_class = fit_temperature(torch.rand(5, 1), torch.zeros(5, dtype=torch.long))
    always_wrong = fit_temperature(torch.tensor([[0.1, 0.3], [0.3, 0.1]]), torch.tensor([0, 1]))
    assert one_class == pytest.approx(SMALLEST_SCALE, rel=1e-6)
    assert always_wrong == pytest.approx(SMALLEST_SCALE, rel=1e-6)
    one_label = fit_temperature(torch.tensor([[0.3, 0.1], [0.2, 0.1]]), torch.tensor([0, 0]))
    assert SMALLEST_SCALE < one_label < LARGEST_SCALE


# --- Scale and bias of independent labels


def test_sigmoid_by_hand() -> None:
    # Two cosines only, so that both probabilities are their smoothed shares: 3 of 4 right, then 1 of 5.
    cosines = numbers(0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1)[:, None]
    truth = bools(1, 1, 1, 0, 1, 0, 0, 0, 0)[:, None]
    yes, no = 5 / 6, 1 / 7  # Platt's targets of four positives and five negatives
    scale, bias = fit_sigmoid(cosines, truth)
    found = (scale * numbers(0.5, 0.1) + bias).sigmoid()
    assert found.tolist() == pytest.approx([(3 * yes + no) / 4, (yes + 4 * no) / 5], abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_sigmoid_is_the_best_around(seed: int) -> None:
    cosines = random_sample(seed, count=50)[0]
    truth = torch.rand(50, 4, generator=torch.Generator().manual_seed(seed)) < (15 * cosines - 1).sigmoid()
    positives, negatives = int(truth.sum()), int((~truth).sum())
    targets = torch.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()

    def loss(scale: float, bias: float) -> float:
        return float(F.binary_cross_entropy_with_logits(scale * cosines + bias, targets))

    scale, bias = fit_sigmoid(cosines, truth)
    around = [loss(scale + s, bias + b) for s in (-0.1, 0, 0.1) for b in (-0.02, 0, 0.02) if s or b]
    assert loss(scale, bias) < min(around)


def test_sigmoid_of_samples_that_say_little() -> None:
    apart = fit_sigmoid(torch.tensor([[0.9, 0.1]]), torch.tensor([[True, False]]))
    assert all(map(math.isfinite, apart))
    equal = fit_sigmoid(torch.full((4, 1), 0.3), bools(1, 0, 0, 0)[:, None])
    backwards = fit_sigmoid(numbers(0.1, 0.2, 0.8, 0.9)[:, None], bools(1, 1, 0, 0)[:, None])
    for scale, bias in (equal, backwards):
        assert scale == SMALLEST_SCALE
        assert math.isfinite(bias)
    share = float(torch.tensor(equal[0] * 0.3 + equal[1]).sigmoid())
    assert share == pytest.approx((2 / 3 + 3 / 5) / 4)


# --- Thresholds


@settings(max_examples=50)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0.01, 1))
def test_share_is_kept_and_no_higher_threshold_keeps_it(values: list[float], share: float) -> None:
    cosines = torch.tensor(values, dtype=torch.float64)
    threshold = keeping_threshold(cosines, share)
    assert (cosines >= threshold).sum() >= share * len(values) - 1e-6
    above = cosines[cosines > threshold + 2e-6]
    assert len(above) < share * len(values)


def test_share_by_hand() -> None:
    tenths = torch.arange(1, 21) / 100
    assert keeping_threshold(tenths) == pytest.approx(0.02, abs=1e-5)  # 19 of 20 are 95 %
    assert keeping_threshold(tenths[:10]) == pytest.approx(0.01, abs=1e-5)
    assert keeping_threshold(tenths, 1.0) < 0.01 + 1e-8
    assert keeping_threshold(torch.empty(0)) == -1


def test_none_of_these_by_hand() -> None:
    best = numbers(0.9, 0.8, 0.7, 0.2, 0.6, 0.3, 0.1)
    right, stranger = bools(1, 1, 1, 1, 0, 0, 0), bools(0, 0, 0, 0, 0, 1, 1)
    # 0.6 is a wrong answer and has no vote: between 0.7 and the best stranger, 0.3.
    assert none_threshold(best, right, stranger) == pytest.approx(0.5)
    assert none_threshold(best, right, stranger, keep_rate=1.0) == pytest.approx(0.2, abs=1e-5)
    assert none_threshold(best, right, bools(*[0] * 7), keep_rate=0.75) == pytest.approx(0.7, abs=1e-5)
    assert none_threshold(best, right, bools(*[0] * 7)) == pytest.approx(0.2, abs=1e-5)
    assert none_threshold(best, bools(*[0] * 7), stranger) == -1


@pytest.mark.parametrize("gain", [balanced_accuracy, f1])
@settings(max_examples=30)
@given(st.data())
def test_threshold_as_the_slow_one(gain, data) -> None:
    count = data.draw(st.integers(2, 25))
    values = data.draw(st.lists(st.integers(-5, 5), min_size=count, max_size=count))
    truth = data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(lambda t: any(t) and not all(t)))

    def reached(threshold: float) -> float:
        asked = [value / 10 >= threshold for value in values]
        pairs = list(zip(asked, truth, strict=True))
        return float(gain(*(torch.tensor(float(pairs.count(p))) for p in [(1, 1), (0, 1), (1, 0), (0, 0)])))

    found = best_threshold(torch.tensor(values) / 10, torch.tensor(truth), gain)
    # Only thresholds that something reaches are asked for.
    assert reached(found) == pytest.approx(max(reached(value / 10 - 0.05) for value in values), abs=1e-6)


def test_each_class_has_its_own_threshold_if_it_has_images() -> None:
    cosines = torch.zeros(12, 2)
    cosines[:, 0] = torch.arange(12) / 100
    cosines[:, 1] = 0.5 + torch.arange(12) / 100
    truth = torch.zeros(12, 2, dtype=torch.bool)
    truth[6:, 0] = True
    truth[11, 1] = True  # one image is too few
    first, second = label_thresholds(cosines, truth)
    assert first == pytest.approx(0.055)
    assert second == pytest.approx(best_threshold(cosines.flatten(), truth.flatten(), f1))
    assert label_thresholds(cosines, torch.zeros_like(truth)) == pytest.approx([0.61, 0.61], abs=1e-4)
    assert label_thresholds(cosines, torch.ones_like(truth))[0] == pytest.approx(0.01, abs=1e-5)
