"""Figures with their 95 % percentile bootstrap intervals (Efron & Tibshirani, 1993).

Images are drawn again, as the data set drew them. All captions of an image are drawn with it (a cluster bootstrap),
since they are not independent; the mean over classes draws again within each class, since the classes are given.
Resamples are drawn and summed up a block at a time; what is drawn does not depend on the size of the blocks.

Shapes: N clusters (images), Q queries, C classes, F figures, U distinct rows, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamplit.metrics.results import Measure

RESAMPLES = 1000
_DRAWS_AT_ONCE = 2**22  # cells of a block of resamples, 32 MB

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def measure(values: ArrayLike, *, statistic: Literal["mean", "median"] = "mean", seed: int = 0) -> Measure:
    """Return the mean or median of independent values with its interval.

    Only the count of each distinct value is drawn, which is multinomial: right or wrong answers have only two.

    Args:
        values: one of each image or query, (N,).
        statistic: `mean` or `median`.
        seed: of the resamples.

    Example:
        >>> measure([1, 1, 0, 1]).value
        0.75
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    summarize = _means if statistic == "mean" else _medians
    draws = np.concatenate([summarize(distinct, drawn) for drawn in _draw_again(counts, seed)])
    return interval(float(summarize(distinct, counts[None])[0]), draws)


def interval(value: float, draws: Floats) -> Measure:
    """Put a value together with the 2.5 and 97.5 percentiles of its resamples, (R,)."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return Measure(value, float(low), float(high))


def resample_ratios(sums: ArrayLike, counts: ArrayLike, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Resample clusters, all figures by the same draws, so that functions of several figures have an interval too.

    Args:
        sums: what each cluster adds to each numerator, (N, F).
        counts: what it adds to each denominator, (N, F).
        seed: of the resamples.

    Returns:
        The ratios of all clusters, (F,), and those of the resamples, (R, F).
    """
    rows = np.concatenate([np.asarray(sums, np.float64), np.asarray(counts, np.float64)], axis=1)
    distinct, times = np.unique(rows, axis=0, return_counts=True)
    draws = np.concatenate([_ratios(drawn @ distinct) for drawn in _draw_again(times, seed)])
    return _ratios(times[None] @ distinct)[0], draws


def measure_clustered_median(values: ArrayLike, clusters: ArrayLike, num_clusters: int, *, seed: int = 0) -> Measure:
    """Return the median of values that come in clusters, with its interval.

    Args:
        values: (Q,).
        clusters: the cluster of each value, (Q,), from 0 to `num_clusters` - 1; one may have no value.
        num_clusters: N.
        seed: of the resamples.
    """
    distinct, index = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    order = np.argsort(index, kind="stable")
    owners, ends = np.asarray(clusters)[order], np.searchsorted(index[order], np.arange(len(distinct)), "right") - 1
    value = _medians(distinct, np.bincount(index, minlength=len(distinct))[None])[0]
    generator = np.random.default_rng(seed)
    parts: list[Floats] = []
    for size in _blocks(len(owners) + num_clusters):
        drawn = generator.integers(0, num_clusters, (size, num_clusters)) + num_clusters * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * num_clusters).reshape(size, num_clusters)
        reached = weights[:, owners].cumsum(1)[:, ends]
        parts.append(_medians(distinct, np.diff(reached, axis=1, prepend=0)))
    return interval(float(value), np.concatenate(parts))


def measure_class_mean(right: ArrayLike, labels: ArrayLike, *, seed: int = 0) -> Measure:
    """Return the mean of the accuracies of all classes that have images; images are drawn again within their class.

    Args:
        right: whether each image was classified right, (N,) of bool.
        labels: the class of each image, (N,).
        seed: of the resamples.
    """
    _, index, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    accuracies = np.bincount(index, np.asarray(right, np.float64), minlength=len(counts)) / counts
    generator = np.random.default_rng(seed)
    parts = [
        (generator.binomial(counts, accuracies, (size, len(counts))) / counts).mean(1) for size in _blocks(len(counts))
    ]
    return interval(float(accuracies.mean()), np.concatenate(parts))


def _blocks(cells: int) -> Iterator[int]:
    """Cut all resamples, of so many cells each, into blocks, and yield the number in each."""
    at_once = max(1, _DRAWS_AT_ONCE // max(1, cells))
    for done in range(0, RESAMPLES, at_once):
        yield min(at_once, RESAMPLES - done)


def _draw_again(counts: Integers, seed: int) -> Iterator[Integers]:
    """Yield how often each value is drawn, (R, U) in blocks of rows, if it is there `counts` times, (U,)."""
    generator, total = np.random.default_rng(seed), counts.sum()
    for size in _blocks(len(counts)):
        yield generator.multinomial(total, counts / total, size)


def _ratios(totals: Floats) -> Floats:
    """Divide the first half of the columns by the second, (R, 2 F) to (R, F); 0 / 0, which no data drew, is 0."""
    sums, counts = np.split(totals, 2, axis=1)
    ratios: Floats = sums / np.maximum(counts, 1)
    return ratios


def _means(distinct: Floats, counts: Integers) -> Floats:
    """Mean of each row of counts, (R, U), of the sorted values, (U,)."""
    means: Floats = counts @ distinct / counts.sum(1)
    return means


def _medians(distinct: Floats, counts: Integers) -> Floats:
    """Median of each row of counts: the mean of the two middle values if their number is even."""
    reached, total = counts.cumsum(1), counts.sum(1, keepdims=True)
    middle = [(reached > rank).argmax(1) for rank in ((total - 1) // 2, total // 2)]
    medians: Floats = (distinct[middle[0]] + distinct[middle[1]]) / 2
    return medians
