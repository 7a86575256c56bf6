from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamplit.metrics.bootstrap import (
    interval,
    measure,
    measure_class_mean,
    measure_clustered_median,
    resample_ratios,
)
from lamplit.metrics.ranking import PairRanks
from lamplit.metrics.scoring import measure_ranks


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=1, max_size=40))
def test_measure_values(values):
    for statistic in ("mean", "median"):
        found = measure(values, statistic=statistic)
        assert found.value == pytest.approx(getattr(np, statistic)(values))
        assert min(values) <= found.low <= found.high <= max(values)
        assert found == measure(values[::-1], statistic=statistic), "their order does not matter, and the seed is fixed"


def test_measure_equals_plain_bootstrap():
    """Resampled one by one, as the textbook does it."""
    values = np.random.default_rng(3).integers(1, 30, 200).astype(float)
    drawn = np.random.default_rng(4).choice(values, (4000, 200))
    for statistic, slow in (("mean", drawn.mean(1)), ("median", np.median(drawn, axis=1))):
        found = measure(values, statistic=statistic)
        low, high = np.percentile(slow, [2.5, 97.5])
        assert found.low == pytest.approx(low, abs=0.5)
        assert found.high == pytest.approx(high, abs=0.5)
    wide = measure(np.repeat([0, 1], 50))
    narrow = measure(np.repeat([0, 1], 5000))
    assert (wide.low, wide.high) == pytest.approx((0.40, 0.60), abs=0.02)
    assert (narrow.low, narrow.high) == pytest.approx((0.49, 0.51), abs=0.003)


def test_ratios_equal_plain_cluster_bootstrap():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 4, 80)
    sums = generator.binomial(counts, 0.6)
    values, draws = resample_ratios(np.stack([sums, counts], 1), np.stack([counts, np.ones(80)], 1))
    assert values == pytest.approx([sums.sum() / counts.sum(), counts.mean()])
    rows = generator.integers(0, 80, (4000, 80))
    slow = sums[rows].sum(1) / counts[rows].sum(1)
    found = interval(values[0], draws[:, 0])
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.015)
    assert np.corrcoef(draws[:, 0], draws[:, 1])[0, 1] == pytest.approx(0, abs=0.3), "figures share their draws"


def test_clustered_median_equals_plain_bootstrap(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    ranks, owners = generator.integers(1, 40, 150), generator.integers(0, 60, 150)
    found = measure_clustered_median(ranks, owners, 60)
    assert found.value == np.median(ranks)
    of_image = [ranks[owners == image] for image in range(60)]
    slow = [np.median(np.concatenate([of_image[i] for i in generator.integers(0, 60, 60)])) for _ in range(3000)]
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=1)
    monkeypatch.setattr("lamplit.metrics.bootstrap._DRAWS_AT_ONCE", 1)
    assert measure_clustered_median(ranks, owners, 60) == found, "how many are drawn at once changes nothing"


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    ranks, right = generator.integers(1, 90, 200), generator.random(200) < 0.4
    counts = generator.integers(1, 5, (200, 2))

    def figures():
        values, draws = resample_ratios(counts - 1, counts)
        medians = [measure(ranks, statistic="median"), measure_clustered_median(ranks, np.arange(200), 200)]
        return [*medians, measure(right), measure_class_mean(right, ranks), values.tolist(), draws.tolist()]

    at_once = figures()
    for cells in (1, 7777):
        monkeypatch.setattr("lamplit.metrics.bootstrap._DRAWS_AT_ONCE", cells)
        assert figures() == at_once


@pytest.mark.parametrize("kind", ["median", "clustered median", "ratios", "class mean"])
def test_memory_does_not_grow_with_images(kind: str, monkeypatch: pytest.MonkeyPatch):
    """As many ranks as images, which is what a model without knowledge gives: 1,000 resamples of them are 24 MB."""
    monkeypatch.setattr("lamplit.metrics.bootstrap._DRAWS_AT_ONCE", 2**16)
    ranks = np.arange(3000)
    tracemalloc.start()
    match kind:
        case "median":
            measure(ranks, statistic="median")
        case "clustered median":
            measure_clustered_median(ranks, ranks, 3000)
        case "ratios":
            resample_ratios(ranks[:, None], ranks[:, None])
        case "class mean":
            measure_class_mean(ranks < 500, ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_class_mean_stays_a_share():
    """One class of two images and one of a thousand, all right but for one image."""
    right = np.array([1, 1] + [1] * 999 + [0])
    found = measure_class_mean(right, [0, 0] + [7] * 1000)
    assert found.value == pytest.approx((1 + 0.999) / 2)
    assert 0.99 < found.low < found.value < found.high <= 1
    assert measure_class_mean([0, 0, 0], [0, 1, 1]).low == 0


def correlated_hits(generator: np.random.Generator, images: int, captions: int) -> np.ndarray:
    """Whether each caption finds its image, 60 % on average, with a correlation of 0.25 within an image."""
    chances = generator.beta(0.6 * 3, 0.4 * 3, images)
    return generator.random((images, captions)) < chances[:, None]


def test_intervals_cover_the_truth():
    """95 % of the intervals of caption to image recall hold the true recall, though captions of an image are alike."""
    generator, images, captions, draws = np.random.default_rng(0), 80, 5, 300
    links = torch.arange(images).repeat_interleave(captions), torch.arange(images * captions)
    covered = {"text_to_image/recall@1": 0, "mean_recall": 0, "captions drawn alone": 0}
    for _ in range(draws):
        hits = correlated_hits(generator, images, captions)
        to_image = torch.from_numpy(np.where(hits, 1, 20)).flatten()
        to_text = torch.from_numpy(np.where(hits.any(1), 1, 20))  # an image whose captions all miss misses too
        found = measure_ranks(PairRanks(to_text, to_image), *links)
        found["captions drawn alone"] = measure(to_image <= 1)
        some = 1 - np.prod([(1.2 + i) / (3 + i) for i in range(captions)])  # E[1 - (1 - p)^5]
        truth = {"mean_recall": (0.6 + some) / 2}
        for name in covered:
            covered[name] += found[name].low <= truth.get(name, 0.6) <= found[name].high
    assert covered["text_to_image/recall@1"] / draws == pytest.approx(0.95, abs=0.03)
    assert covered["mean_recall"] / draws == pytest.approx(0.95, abs=0.03)
    assert covered["captions drawn alone"] / draws < 0.9
