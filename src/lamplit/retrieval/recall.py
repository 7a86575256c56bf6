"""How many rows the sieves of search must keep, measured on the collection itself.

Shapes: N rows, D width, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamplit.progress import progress_bar
from lamplit.retrieval.bit_planes import BitPlanes
from lamplit.retrieval.nearest import Floats, Found, Vectors, rank_many, to_floats
from lamplit.store.arrays.joined_vectors import JoinedVectors
from lamplit.unit_vectors import normalize

TARGET_RECALL = 0.99  # @10
KINDS = 3  # of queries
_SAMPLE = 128 * KINDS  # queries; 128 of a kind leave an error of 0.003
_MIN_CANDIDATES = 128  # rows for the exact product, which cost next to nothing
_EQUAL = 2e-6  # difference of two float32 products of the same vectors
_TO_ONE, _TO_FOUR = 0.3, 0.25  # cosines of a query to its row, and to the sum of its four rows


def choose_kept(vectors: Vectors, planes: BitPlanes, *, progress: bool = False) -> tuple[tuple[int, int], float]:
    """Find how many rows the sieves must keep for a recall@10 of `TARGET_RECALL`; return that and the measured recall.

    There are three kinds of query, and the recall is that of the worst:

    1. rows of the collection;
    2. rows under noise that leaves a cosine of 0.3, as far away as words are from images, and far harder;
    3. sums of four rows under noise that leaves a cosine of 0.25. Where images come in many near copies (frames of a
       video, a product from all sides), the ten nearest of the other kinds are one row's copies, which pass any sieve.
       The ten nearest of these must be found among the copies of four.
    """
    queries = sample_queries(vectors)
    true = rank_many(vectors, queries, 10, progress=progress)
    kinds = range(min(KINDS, len(queries)))
    ranks = []
    with progress_bar("ranks", len(queries), shown=progress) as advance:
        for query, best in zip(queries, true, strict=True):
            ranks.append(planes.ranks(query, best.rows))
            advance(1, "")

    def needed(sieve: int) -> int:
        # Each sieve may lose a quarter of what may be lost; half of it is left for queries that are not in the sample.
        part = (3 + TARGET_RECALL) / 4
        return max(
            _MIN_CANDIDATES, *(int(np.quantile([row[sieve] for row in ranks[kind::KINDS]], part)) for kind in kinds)
        )

    first, second = needed(0), needed(1)
    while True:
        found = planes.find_all(vectors, queries, 10, (first, second), progress=progress)
        recall = worst_recall(found, true)
        if recall >= TARGET_RECALL or second >= len(vectors):
            return (min(first, len(vectors)), min(second, len(vectors))), recall
        first, second = first * 5 // 4 + 1, second * 5 // 4 + 1


def sample_queries(vectors: Vectors | JoinedVectors, size: int = _SAMPLE, seed: int = 0) -> Floats:
    """Draw (Q, D) unit vectors to measure recall with, the kinds in turn, always the same for one seed.

    See `choose_kept` for the kinds.
    """
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(vectors), min(size, len(vectors)), replace=False))
    rows = normalize(to_floats(vectors[chosen]))
    noise = normalize(random.standard_normal(rows.shape, np.float32))
    for _ in range(3):
        others = random.choice(len(vectors), len(rows[2::KINDS]))
        rows[2::KINDS] += normalize(to_floats(vectors[others]))
    kept = np.ones((len(rows), 1), np.float32)
    kept[1::KINDS], kept[2::KINDS] = _TO_ONE, _TO_FOUR
    return normalize(kept * normalize(rows) + np.sqrt(1 - kept**2) * noise)


def worst_recall(found: Sequence[Found], true: Sequence[Found]) -> float:
    """Return the recall of the worst kind of the queries that `sample_queries` drew."""
    kinds = range(min(KINDS, len(true)))
    return min(recall_of(found[kind::KINDS], true[kind::KINDS]) for kind in kinds)


def recall_of(found: Sequence[Found], true: Sequence[Found]) -> float:
    """Average the part of the true rows that were found; a row as near as the last true one counts as found."""
    parts = [
        min(1.0, float((some.scores >= best.scores.min() - _EQUAL).sum()) / len(best.scores))
        for some, best in zip(found, true, strict=True)
    ]
    return float(np.mean(parts))
