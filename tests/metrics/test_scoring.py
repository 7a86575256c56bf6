from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lamplit.metrics import scoring
from lamplit.metrics.ranking import retrieval_metrics
from lamplit.metrics.scoring import Answers, accuracies, answer, confusions, per_class, retrieval


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Eighths, so that cosines are exact and ties are real ones.
vector = st.lists(st.integers(-5, 5).map(lambda x: x / 8), min_size=2, max_size=2)
rows = st.integers(1, 12).flatmap(
    lambda classes: st.tuples(
        st.lists(vector, min_size=classes, max_size=classes),
        st.lists(
            st.tuples(vector, st.sets(st.integers(0, classes - 1), min_size=1, max_size=3)), min_size=1, max_size=15
        ),
    )
)


def rank_by_hand(scores: list[float], right: set[int]) -> int:
    order = sorted(range(len(scores)), key=lambda label: (-scores[label], label))
    best = next(label for label in order if label in right)
    return 1 + sum(label not in right for label in order[: order.index(best)])


def product(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


@given(rows)
def test_answers_equal_a_slow_reference_ties_and_several_labels_included(drawn):
    entries, asked = drawn
    labels = [tuple(sorted(right)) for _, right in asked]
    zimg = torch.tensor([vector for vector, _ in asked], dtype=torch.float32)
    found = answer(zimg, torch.tensor(entries, dtype=torch.float32), labels, logit_multiplier=0.5)
    for place, (vector, right) in enumerate(asked):
        scores = [product(vector, entry) for entry in entries]
        assert found.ranks[place] == rank_by_hand(scores, right)
        assert found.predictions[place] == scores.index(max(scores))
        exp = np.exp(0.5 * np.array(scores, dtype=np.float64))
        assert float(found.confidences[place]) == pytest.approx(exp.max() / exp.sum(), rel=1e-9)


@given(rows, st.integers(1, 4), st.randoms(use_true_random=False))
def test_class_of_several_entries_is_as_good_as_its_best(drawn, num_classes, random):
    entries, asked = drawn
    owners = [*range(num_classes), *(random.randrange(num_classes) for _ in entries)][: max(len(entries), num_classes)]
    entries = [*entries, *([0, 0] for _ in range(len(owners) - len(entries)))]
    labels = [(random.randrange(num_classes),) for _ in asked]
    zimg = torch.tensor([vector for vector, _ in asked], dtype=torch.float32)
    found = answer(zimg, torch.tensor(entries, dtype=torch.float32), labels, entry_class=owners)
    for place, (vector, _) in enumerate(asked):
        by_class = [[e for e, owner in zip(entries, owners, strict=True) if owner == c] for c in range(num_classes)]
        scores = [max(product(vector, entry) for entry in own) for own in by_class]
        assert found.ranks[place] == rank_by_hand(scores, set(labels[place]))


@settings(max_examples=20)
@given(st.integers(1, 200))
def test_how_many_are_scored_at_once_changes_nothing(size):
    zimg, entries, labels = unit(60, 8, 0), unit(7, 8, 1), [(i % 7,) for i in range(60)]
    whole = answer(zimg, entries, labels, logit_multiplier=20.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_SCORES_AT_ONCE", size)
        parts = answer(zimg, entries, labels, logit_multiplier=20.0)
    assert torch.equal(whole.ranks, parts.ranks)
    assert torch.equal(whole.predictions, parts.predictions)
    assert torch.equal(whole.confidences, parts.confidences)


def answers(ranks: list[int], predictions: list[int]) -> Answers:
    return Answers(torch.tensor(ranks), torch.tensor(predictions), torch.full((len(ranks),), 0.5))


def test_accuracies_by_hand():
    """Class 0 has three images, two of them right; class 1 one, wrong by far; class 2 none."""
    found = accuracies(answers([1, 1, 3, 6], [0, 0, 1, 0]), [(0,), (0,), (0,), (1,)])
    assert found["accuracy@1"].value == 0.5
    assert found["accuracy@5"].value == 0.75
    assert found["mean_class_accuracy"].value == pytest.approx((2 / 3 + 0) / 2)
    assert found["accuracy@1"].low < 0.5 < found["accuracy@1"].high


def test_per_class_and_confusions_by_hand():
    labels = [(0,), (0,), (0,), (1,), (1,), (2,)]
    said = answers([1, 2, 2, 2, 2, 1], [0, 1, 1, 2, 0, 2])
    assert per_class(said, labels, ["cat", "dog", "hen", "owl"]) == [
        {"name": "cat", "images": 3, "accuracy": pytest.approx(1 / 3)},
        {"name": "dog", "images": 2, "accuracy": 0.0},
        {"name": "hen", "images": 1, "accuracy": 1.0},
    ]
    assert confusions(said, labels) == [(1, 2, [3]), (0, 1, [1, 2])]
    assert confusions(said, labels, max_classes=1) == [(1, 2, [3])]


def test_retrieval_by_hand():
    """Two images, three captions; the second image's best caption is the first one's."""
    zimg = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    ztxt = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    metrics, curves = retrieval(zimg, ztxt, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    # Image 0: captions 1 (1.0), 0 (0.8), 2 (0.0), so rank 1. Image 1: captions 0 (0.96), 2 (0.8), so rank 2.
    assert metrics["image_to_text/recall@1"].value == 0.5
    assert metrics["image_to_text/recall@5"].value == 1.0
    assert metrics["image_to_text/median_rank"].value == 1.5
    # Caption 0: image 1 (0.96) before 0 (0.8), so rank 2. Caption 1: rank 1. Caption 2: rank 1.
    assert metrics["text_to_image/recall@1"].value == pytest.approx(2 / 3)
    assert metrics["text_to_image/median_rank"].value == 1.0
    mean = metrics["mean_recall"]
    assert mean.value == pytest.approx((0.5 + 1 + 1 + 2 / 3 + 1 + 1) / 6)
    assert mean.low < mean.value < mean.high
    assert {name: each.value for name, each in metrics.items()} == pytest.approx(
        retrieval_metrics(zimg, ztxt, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    )
    assert curves["image_to_text"][:3] == [0.5, 1.0, 1.0]
    assert curves["text_to_image"][:2] == pytest.approx([2 / 3, 1.0])
    assert len(curves["text_to_image"]) == 100
