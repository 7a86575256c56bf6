from __future__ import annotations

import numpy as np
import pytest
from unit_rows import unit, unit_rows

from lamplit.retrieval.bit_planes import BitPlanes
from lamplit.retrieval.nearest import Found, rank_many
from lamplit.retrieval.recall import TARGET_RECALL, choose_kept, recall_of, sample_queries, worst_recall


@pytest.mark.parametrize("groups", [0, 40])
def test_chosen_numbers_keep_their_recall_on_queries_not_seen(groups: int) -> None:
    vectors = unit_rows(10_000, 128, groups=groups).astype(np.float16)
    planes = BitPlanes.of(vectors)
    kept, recall = choose_kept(vectors, planes)
    assert recall >= TARGET_RECALL
    assert kept[1] < kept[0] < 5_000
    queries = unit(unit_rows(100, 128, seed=8, groups=groups) + vectors[:100].astype(np.float32))
    true = rank_many(vectors, queries, 10)
    assert recall_of(planes.find_all(vectors, queries, 10, kept), true) > TARGET_RECALL - 0.02
    assert recall_of(planes.find_all(vectors, queries, 10, (50, 20)), true) < recall  # the bits alone would not do


def test_unequal_components_count_by_their_deviation() -> None:
    """As of real towers, whose few strong dimensions decide; a measure of signs alone would need several times more."""
    random = np.random.default_rng(0)
    vectors = unit(random.standard_normal((10_000, 256)) * np.geomspace(1, 0.01, 256)).astype(np.float16)
    kept, recall = choose_kept(vectors, BitPlanes.of(vectors))
    assert recall >= TARGET_RECALL
    assert kept[0] < 5_000


def test_near_copies_are_found_by_words_that_lean_to_several_of_them() -> None:
    """Frames of a video: the ten nearest of a frame are its scene, but words lean to many scenes a little."""
    random = np.random.default_rng(0)
    scenes = np.repeat(unit_rows(600, 256, seed=1), 20, axis=0)
    frames = unit(scenes + random.standard_normal(scenes.shape) * (0.1 / 16)).astype(np.float16)
    kept, recall = choose_kept(frames, BitPlanes.of(frames))
    leaning = sum(unit_rows(600, 256, seed=1)[random.integers(600, size=200)] for _ in range(4))
    queries = unit(0.25 * unit(leaning) + (1 - 0.25**2) ** 0.5 * unit_rows(200, 256, seed=2))
    true = rank_many(frames, queries, 10)
    assert recall >= TARGET_RECALL
    assert recall_of(BitPlanes.of(frames).find_all(frames, queries, 10, kept), true) > TARGET_RECALL - 0.02


def test_queries_are_of_three_kinds() -> None:
    vectors = unit_rows(300, 4096)
    queries = sample_queries(vectors, 60)
    nearest = np.sort(queries @ vectors.T, axis=1)[:, ::-1]
    assert nearest[0::3, 0] == pytest.approx(np.ones(20), abs=1e-5)
    assert nearest[1::3, 0] == pytest.approx(np.full(20, 0.3), abs=0.05)
    assert nearest[2::3, :4].sum(1).mean() == pytest.approx(4 * 0.125, abs=0.04)  # 0.25 in four equal parts
    assert nearest[2::3, 4].max() < 0.08 < np.median(nearest[2::3, 3])
    assert (sample_queries(vectors, 60) == queries).all()


def test_recall_counts_equals_as_found() -> None:
    def found(*scores: float) -> Found:
        return Found(np.arange(len(scores)), np.array(scores, np.float32))

    assert recall_of([found(0.9, 0.5)], [found(0.9, 0.5)]) == 1
    assert recall_of([found(0.9, 0.4)], [found(0.9, 0.5)]) == 0.5
    assert recall_of([found(0.9, 0.4), found(0.1, 0.1)], [found(0.9, 0.5), found(0.1, 0.1)]) == 0.75


def test_the_worst_kind_counts() -> None:
    true = [Found(np.arange(1), np.ones(1, np.float32))] * 6
    lost = Found(np.arange(1), np.zeros(1, np.float32))
    assert worst_recall([true[0], lost, true[0], true[0], true[0], true[0]], true) == 0.5
    assert worst_recall(true[:2], true[:2]) == 1
