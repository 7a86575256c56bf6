from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.errors import UsageError
from lamplit.metrics import (
    ClassScore,
    class_scores,
    median_rank,
    per_class_accuracy,
    recall_at,
    retrieval_metrics,
    retrieval_ranks,
    topk_accuracy,
)


def ranks_of(scores, links):
    """Ranks where the scores are given: the queries are the rows of the matrix, the gallery is the identity."""
    scores = torch.tensor(scores)
    rows, columns = torch.tensor(links).T
    return retrieval_ranks(scores, torch.eye(scores.shape[1]), rows, columns).tolist()


def test_ranks_by_hand():
    scores = [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.8, 0.4]]
    assert ranks_of(scores, [(0, 0), (1, 1), (2, 0)]) == [1, 2, 3]


def test_the_best_of_several_right_answers_counts():
    scores = [[0.4, 0.3, 0.2, 0.1]]
    assert ranks_of(scores, [(0, 3), (0, 1)]) == [2]
    assert ranks_of(scores, [(0, 3), (0, 2), (0, 2)]) == [3]
    # What outranks a right answer but is right itself is not in its way.
    assert ranks_of(scores, [(0, 0), (0, 1)]) == [1]


def test_ties_count_against_us():
    assert ranks_of([[0.5, 0.5, 0.5, 0.1]], [(0, 1)]) == [3]
    assert ranks_of([[0.5, 0.5, 0.5, 0.1]], [(0, 1), (0, 2)]) == [2]


def test_nan_is_never_good():
    assert ranks_of([[math.nan, 0.2, 0.1]], [(0, 0)]) == [3]
    everything = torch.full((4, 4), math.nan)
    pairs = torch.arange(4)
    assert retrieval_ranks(everything, everything, pairs, pairs).tolist() == [4, 4, 4, 4]


def test_every_query_needs_an_answer():
    rows, index = torch.eye(3), torch.tensor([0, 2])
    with pytest.raises(UsageError, match="query 1 has no right answer"):
        retrieval_ranks(rows, rows, index, index)
    with pytest.raises(UsageError, match="there are 3 vectors"):
        retrieval_ranks(rows, rows, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]))


def slow_ranks(scores, links):
    ranks = []
    for query, row in enumerate(scores):
        right = {column for q, column in links if q == query}
        best = max(row[column] for column in right)
        ranks.append(1 + sum(row[column] >= best for column in range(len(row)) if column not in right))
    return ranks


@settings(deadline=None)
@given(st.data())
def test_ranks_as_the_slow_ones(data):
    num_queries, num_gallery, width = (data.draw(st.integers(1, 9)) for _ in range(3))
    # Small whole numbers: plenty of ties, and no rounding.
    numbers = np.random.default_rng(data.draw(st.integers(0, 99)))
    queries = numbers.integers(-2, 3, (num_queries, width)).astype(np.float32)
    gallery = numbers.integers(-2, 3, (num_gallery, width)).astype(np.float32)
    first = [(query, data.draw(st.integers(0, num_gallery - 1))) for query in range(num_queries)]
    more = st.tuples(st.integers(0, num_queries - 1), st.integers(0, num_gallery - 1))
    links = data.draw(st.permutations(first + data.draw(st.lists(more, max_size=9))))
    rows, columns = torch.tensor(links).T
    expected = slow_ranks(queries @ gallery.T, links)
    for chunk_size in (None, 1, 2, 4):
        ranks = retrieval_ranks(torch.tensor(queries), torch.tensor(gallery), rows, columns, chunk_size=chunk_size)
        assert ranks.tolist() == expected


def test_recall_and_median_by_hand():
    ranks = torch.tensor([7, 1, 2, 11])
    assert [recall_at(ranks, k) for k in (1, 2, 10, 11)] == [0.25, 0.5, 0.75, 1.0]
    assert median_rank(ranks) == 4.5
    assert median_rank(ranks[:3]) == 2.0


def test_retrieval_metrics_by_hand():
    # Two pictures, three texts; picture 0 has the texts 0 and 1, and text 2 belongs to both.
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.8, 0.0]])
    links = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 2]])
    metrics = retrieval_metrics(scores, torch.eye(3), links[:, 0], links[:, 1], ks=(1, 2))
    assert metrics == {
        "image_to_text/recall@1": 0.5,  # ranks 1 and 3
        "image_to_text/recall@2": 0.5,
        "image_to_text/median_rank": 2.0,
        "text_to_image/recall@1": pytest.approx(1 / 3),  # ranks 2, 2 and 1
        "text_to_image/recall@2": 1.0,
        "text_to_image/median_rank": 2.0,
    }
    names = retrieval_metrics(scores, torch.eye(3), links[:, 0], links[:, 1])
    assert {f"image_to_text/recall@{k}" for k in (1, 5, 10)} < set(names)


def test_topk_accuracy_by_hand():
    scores = torch.tensor([[0.3, 0.5, 0.2], [0.3, 0.5, 0.2], [0.5, 0.5, 0.1], [0.1, 0.2, 0.3]])
    before = scores.clone()
    assert topk_accuracy(scores, torch.tensor([1, 0, 0, 0]), ks=(1, 2, 5)) == {
        "accuracy@1": 0.25,  # ranks 1, 2, 2 (a tie) and 3
        "accuracy@2": 0.75,
        "accuracy@5": 1.0,
    }
    assert torch.equal(scores, before)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_topk_accuracy_as_sorted(count, classes, seed):
    numbers = np.random.default_rng(seed)
    scores, labels = numbers.normal(size=(count, classes)), numbers.integers(0, classes, count)
    best = np.argsort(-scores, axis=1)
    for k in (1, 2, 5):
        expected = np.mean([label in row[:k] for label, row in zip(labels, best, strict=True)])
        actual = topk_accuracy(torch.tensor(scores), torch.tensor(labels), ks=(k,))
        assert actual[f"accuracy@{k}"] == pytest.approx(expected)


def test_per_class_accuracy_by_hand():
    accuracy = per_class_accuracy(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 0]), num_classes=4)
    assert accuracy[:2].tolist() == [0.5, 0.5]
    assert accuracy[2:].isnan().all()


def test_class_scores_by_hand():
    names = ["cat", "dog", "cow", "hen"]
    answers = [(0, 0), (0, 1), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]  # right class, and the answer
    truth, given = (torch.zeros(8, 4, dtype=torch.bool) for _ in range(2))
    for row, (right, answer) in enumerate(answers):
        truth[row, right] = right >= 0
        given[row, answer] = answer >= 0
    assert class_scores(given, truth, names) == [
        ClassScore("cat", 4, 1.0, 0.25, "dog", 2),
        ClassScore("dog", 2, 0.25, 0.5, "none of these", 1),
        ClassScore("cow", 0, None, None, None, 0),
        ClassScore("hen", 0, None, None, None, 0),
    ]


def test_class_scores_of_several_labels():
    truth = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    given = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 1, 0]]).bool()
    # A missed class is mistaken for what was wrongly given, never for another right one; and in the last picture, which
    # was given something right, for nothing.
    assert class_scores(given, truth, ["a", "b", "c"]) == [
        ClassScore("a", 3, 1.0, 1 / 3, "c", 1),
        ClassScore("b", 2, 1.0, 1.0, None, 0),
        ClassScore("c", 1, 0.0, 0.0, None, 0),
    ]
