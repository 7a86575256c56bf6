from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lamplit.errors import UsageError
from lamplit.metrics.ranking import (
    ClassScore,
    best_entries,
    class_ranks,
    class_scores,
    cosines,
    median_rank,
    recall_at,
    recall_curve,
    retrieval_metrics,
    retrieval_ranks,
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


@given(st.data())
def test_ranks_as_the_slow_ones(data):
    num_queries, num_gallery, width = (data.draw(st.integers(1, 9)) for _ in range(3))
    # A few eighths: plenty of ties, and no rounding.
    numbers = np.random.default_rng(data.draw(st.integers(0, 99)))
    queries = numbers.integers(-2, 3, (num_queries, width)).astype(np.float32) / 8
    gallery = numbers.integers(-2, 3, (num_gallery, width)).astype(np.float32) / 8
    first = [(query, data.draw(st.integers(0, num_gallery - 1))) for query in range(num_queries)]
    more = st.tuples(st.integers(0, num_queries - 1), st.integers(0, num_gallery - 1))
    links = data.draw(st.permutations(first + data.draw(st.lists(more, max_size=9))))
    rows, columns = torch.tensor(links).T
    expected = slow_ranks(queries @ gallery.T, links)
    for chunk_size in (1, 2, 4, 256):
        ranks = retrieval_ranks(torch.tensor(queries), torch.tensor(gallery), rows, columns, chunk_size=chunk_size)
        assert ranks.tolist() == expected


def unit(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def test_cosines_are_exact():
    queries, gallery = unit(4, 768, seed=0), unit(5, 768, seed=1)
    whole = [[[round(x * 2**26) for x in row] for row in vectors.tolist()] for vectors in (queries, gallery)]
    expected = [[sum(x * y for x, y in zip(a, b, strict=True)) / 2**52 for b in whole[1]] for a in whole[0]]
    assert cosines(queries, gallery).tolist() == expected
    torch.testing.assert_close(cosines(queries, gallery), queries.double() @ gallery.double().T, atol=5e-8, rtol=0)


@pytest.mark.parametrize("width", [3, 65])
def test_neither_chunks_nor_places_change_a_rank(width):
    # A gallery of near and exact ties: a few vectors many times, some of them with another last digit.
    gallery = unit(5, width, seed=0).repeat(103, 1)
    gallery[::3] = torch.nextafter(gallery[::3], torch.tensor(2.0))
    gallery = torch.cat([gallery, unit(4000, width, seed=1)])  # more than a tile
    queries = torch.cat([gallery[:7], unit(10, width, seed=2)])
    rows = torch.arange(17).repeat(2)
    columns = torch.randint(len(gallery), (34,), generator=torch.Generator().manual_seed(3))
    columns[:7] = torch.arange(7)
    ranks = retrieval_ranks(queries, gallery, rows, columns)
    links = torch.stack([rows, columns], dim=1).tolist()
    assert ranks.tolist() == slow_ranks(cosines(queries, gallery).tolist(), links)
    assert 1 < ranks[0] <= 515, "the first query ties with copies of its answer"
    for chunk_size in (1, 2, 5, 16):
        assert torch.equal(retrieval_ranks(queries, gallery, rows, columns, chunk_size=chunk_size), ranks)
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(4))
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    assert torch.equal(retrieval_ranks(queries, gallery[order], rows, place[columns]), ranks)
    single = torch.cat([cosines(query[None], gallery) for query in queries])
    assert torch.equal(single, cosines(queries, gallery))


def test_vectors_must_be_unit():
    rows, index = 3 * torch.eye(3), torch.arange(3)
    for call in (lambda: cosines(rows / 3, rows), lambda: retrieval_ranks(rows, rows / 3, index, index)):
        with pytest.raises(UsageError, match="length 3; expected unit vectors"):
            call()


def test_recall_and_median_by_hand():
    ranks = torch.tensor([7, 1, 2, 11])
    assert [recall_at(ranks, k) for k in (1, 2, 10, 11)] == [0.25, 0.5, 0.75, 1.0]
    assert median_rank(ranks) == 4.5
    assert median_rank(ranks[:3]) == 2.0


@given(st.lists(st.integers(1, 12), min_size=1), st.integers(1, 12))
def test_recall_curve_is_every_recall(ranks, most):
    ranks = torch.tensor(ranks)
    assert recall_curve(ranks, most).tolist() == [recall_at(ranks, k) for k in range(1, most + 1)]


def test_retrieval_metrics_by_hand():
    # Two images, three texts; image 0 has the texts 0 and 1, and text 2 belongs to both.
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
        "mean_recall": pytest.approx((0.5 + 0.5 + 1 / 3 + 1) / 4),
    }
    names = retrieval_metrics(scores, torch.eye(3), links[:, 0], links[:, 1])
    assert {f"image_to_text/recall@{k}" for k in (1, 5, 10)} < set(names)


def test_class_ranks_by_hand():
    scores = torch.tensor([[0.3, 0.5, 0.2], [0.3, 0.5, 0.2], [0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.1, 0.2, 0.3]])
    before = scores.clone()
    # Of the tie in the middle the first class is the answer.
    assert class_ranks(scores, torch.tensor([1, 0, 0, 1, 0])).tolist() == [1, 2, 1, 2, 3]
    assert class_ranks(scores, torch.tensor([[0, 2], [2, -1], [1, 0], [2, 1], [0, 1]])).tolist() == [2, 3, 1, 2, 2]
    assert torch.equal(scores, before)


def slow_class_rank(row, labels):
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    best = next(c for c in order if c in labels)
    return 1 + sum(c not in labels for c in order[: order.index(best)])


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_class_ranks_as_the_slow_ones(count, classes, most, seed):
    numbers = np.random.default_rng(seed)
    scores = numbers.integers(0, 4, (count, classes)) / 4  # ties
    labels = numbers.integers(-1, classes, (count, most))
    kept = [{label for label in row if label >= 0} for row in labels.tolist()]
    expected = [slow_class_rank(row, right) for row, right in zip(scores.tolist(), kept, strict=True) if right]
    scores, labels = torch.tensor(scores), torch.tensor(labels)
    some = torch.tensor([bool(right) for right in kept])
    found = class_ranks(scores[some], labels[some])
    assert found.tolist() == expected
    predictions = scores[some].argmax(1).tolist()
    right = [prediction in labels for prediction, labels in zip(predictions, filter(None, kept), strict=True)]
    assert (found == 1).tolist() == right, "rank 1 is what argmax calls right"


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 9), st.integers(0, 99))
def test_the_best_entry_of_a_class_counts(count, classes, more, seed):
    numbers = np.random.default_rng(seed)
    entry_class = numbers.permutation([*range(classes), *numbers.integers(0, classes, more)])
    scores = numbers.normal(size=(count, classes + more))
    expected = [[max(row[entry_class == c]) for c in range(classes)] for row in scores]
    assert best_entries(torch.tensor(scores), torch.tensor(entry_class)).tolist() == expected


def test_labels_that_cannot_be():
    scores = torch.zeros(2, 3)
    with pytest.raises(UsageError, match="image 1 has no right class"):
        class_ranks(scores, torch.tensor([[0, 2], [-1, -1]]))
    for wrong in (3, -2):
        with pytest.raises(UsageError, match="there are 3 classes"):
            class_ranks(scores, torch.tensor([0, wrong]))
    with pytest.raises(UsageError, match="class 1 has no entry"):
        best_entries(scores, torch.tensor([0, 2, 2]))
    with pytest.raises(UsageError, match="3 entries and classes of 2"):
        best_entries(scores, torch.tensor([0, 1]))


def test_class_ranks_with_what_is_not_a_number():
    scores = torch.tensor([[math.nan, 0.2, 0.1], [math.nan, 0.2, 0.1]])
    assert class_ranks(scores, torch.tensor([0, 1])).tolist() == [3, 2]


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
    # A missed class is mistaken for what was wrongly given, never for another right one; and in the last image, which
    # was given something right, for nothing.
    assert class_scores(given, truth, ["a", "b", "c"]) == [
        ClassScore("a", 3, 1.0, 1 / 3, "c", 1),
        ClassScore("b", 2, 1.0, 1.0, None, 0),
        ClassScore("c", 1, 0.0, 0.0, None, 0),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types(dtype: torch.dtype):
    vectors = F.normalize(torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    links = torch.arange(20)
    assert retrieval_metrics(vectors.to(dtype), vectors.to(dtype), links, links)["mean_recall"] == 1
    assert torch.allclose(cosines(vectors.to(dtype), vectors.to(dtype)), vectors @ vectors.T, atol=0.02)
    with pytest.raises(UsageError, match="expected unit vectors"):
        cosines(2 * vectors.to(dtype), vectors.to(dtype))
