from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_store
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import gumbel_r

import lamplit
from lamplit.errors import UsageError
from lamplit.retrieval.nearest import rank
from lamplit.retrieval.relevance import (
    Law,
    Relevance,
    law_of_names,
    measure_law,
    open_relevance,
    upper_end_of_mixture,
    where_they_balance,
)
from lamplit.retrieval.searcher import Searcher
from lamplit.store.lance_store import Store
from lamplit.unit_vectors import normalize

COMMON = {"on"}  # of the captions of `words_path`


class Words:
    """A text tower that knows the words of `words_path` as its images were made, and any other word as noise."""

    def __init__(self, store: Store, seed: int = 0) -> None:
        self.identity, self.space, self.seed = store.tower, store.tower.fingerprint, seed
        rows = np.asarray(store.vectors())
        self.middle = rows.mean(0)
        told = [texts[0].split() for texts in store.texts()]
        words = sorted({word for caption in told for word in caption})
        mean_of = {word: rows[[word in caption for caption in told]].mean(0) - self.middle for word in words}
        self.meanings: dict[str, NDArray[np.float32]] = mean_of

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[sum(word.encode()) * 31 + len(word) for word in text.split()] for text in texts]

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = []
        for text in texts:
            generator = np.random.default_rng([self.seed, *text.encode()])
            known = [self.meanings[word] for word in text.split() if word in self.meanings and word not in COMMON]
            vectors.append(np.sum(known, axis=0) if known else generator.standard_normal(len(self.middle)))
        return normalize((-1) ** self.seed * np.asarray(vectors, np.float32))

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        raise NotImplementedError

    def project_rows(self, zimg: NDArray[np.float32]) -> NDArray[np.float32]:
        return zimg


@pytest.fixture
def store(words_path: Path, tmp_path: Path) -> Store:
    shutil.copytree(words_path, tmp_path / "words.lance")
    return Store(tmp_path / "words.lance")


def centred(store: Store) -> NDArray[np.float32]:
    rows = np.asarray(store.vectors())
    return normalize(rows - rows.mean(0))


def test_law_of_captions_is_that_of_a_slow_reference(store: Store) -> None:
    reader, rows = Words(store), centred(store)
    captions = [texts[0] for texts in store.texts()]
    right, wrong, spreads = [], [], []
    for caption in dict.fromkeys(captions):
        [vector] = reader.encode_texts([caption])
        scores = rows @ vector
        nearest = np.argsort(-scores, kind="stable")[:50]
        # Every word is in more of these captions than a word may be that tells something: only the same are related.
        is_own = np.array([captions[row] == caption for row in nearest])
        heights = (scores[nearest] - scores.mean()) / scores.std()
        right.append(heights[is_own].max() if is_own.any() else -np.inf)
        wrong.append(heights[~is_own].max() if not is_own.all() else heights[-1])
        spreads.append(scores.std())
    law = measure_law(store, reader, rows, lambda vector, k: rank(rows, vector, k))
    assert law.deviations == pytest.approx(slow_balance(np.array(right), np.array(wrong)), rel=1e-4)
    assert law.largest == pytest.approx(float(np.quantile(spreads, 0.95)), rel=1e-4)


def slow_balance(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> float:
    values = sorted({float(value) for value in [*right, *wrong] if np.isfinite(value)})
    for before, value in pairwise([values[0], *values]):
        if sum(right < value) * len(wrong) >= sum(wrong >= value) * len(right):
            return (before + value) / 2
    return (values[-2] + values[-1]) / 2 if len(values) > 1 else values[0]


HEIGHTS = st.lists(st.integers(0, 8).map(lambda number: number / 2), min_size=1, max_size=12)


@given(
    right=st.lists(st.one_of(st.just(-np.inf), st.integers(0, 8).map(float)), min_size=1, max_size=12), wrong=HEIGHTS
)
def test_as_many_right_ones_are_below_as_wrong_ones_above(right: list[float], wrong: list[float]) -> None:
    assert where_they_balance(np.array(right), np.array(wrong)) == slow_balance(np.array(right), np.array(wrong))


def test_a_bound_between_two_laws_that_overlap_loses_as_much_of_both() -> None:
    generator = np.random.default_rng(0)
    right, wrong = generator.normal(8, 2, 5000), generator.normal(6, 1, 5000)
    bound = where_they_balance(right, wrong)
    assert (right < bound).mean() == pytest.approx((wrong >= bound).mean(), abs=0.01)
    assert bound == pytest.approx(6 + 2 / 3, abs=0.1)  # (8 - b) / 2 = (b - 6) / 1


def test_related_images_are_left_out(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(300, 32, generator=generator)
    names = [f"thing{i // 2} photo" for i in range(300)]  # two images of each thing
    vectors[1::2] = vectors[::2] + 0.1 * torch.randn(150, 32, generator=generator)
    store = write_store(tmp_path / "a.lance", vectors, [[name] for name in names])

    class Own(Words):
        def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
            unknown = [text for text in texts if text not in names]
            assert len(unknown) in (0, len(texts))
            if unknown:
                return super().encode_texts(texts)
            return rows[[names.index(text) for text in texts]]

        def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
            return [
                [int(word.removeprefix("thing") or 0) if word != "photo" else 999 for word in t.split()] for t in texts
            ]

    rows = np.asarray(store.vectors())
    reader = Own(store)
    law = measure_law(store, reader, rows, lambda vector, k: rank(rows, vector, k))
    relevance = Relevance(law, rows)
    new = normalize(np.random.default_rng(1).standard_normal((2000, 32)).astype(np.float32))
    least = np.array([relevance.min_score(vector) for vector in new])
    assert ((new @ rows.T).max(1) >= least).mean() < 0.05
    own = np.array([relevance.min_score(vector) for vector in rows])
    assert (np.sort(rows @ rows.T, axis=1)[:, -2] >= own).mean() > 0.95  # the other image of the same thing is kept


@pytest.mark.parametrize("shown", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_upper_end_of_a_law_that_is_mixed_with_higher_values(shown: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    law = gumbel_r(4.6, 1.0)
    none = law.rvs(int(1400 * (1 - shown)), random_state=generator)
    values = np.concatenate([none, generator.uniform(7, 16, int(1400 * shown))])
    end = upper_end_of_mixture(values)
    assert 0.01 < (none > end).mean() < 0.15


def test_names_serve_a_store_without_captions(store: Store) -> None:
    reader, rows = Words(store), centred(store)

    def find(vector: NDArray[np.float32], k: int) -> Any:
        return rank(rows, vector, k)

    law = law_of_names(reader, rows, find)  # whose words this reader does not know: they are noise, and so are these
    relevance = Relevance(law, rows)
    new = reader.encode_texts([f"word{i}" for i in range(2000)])
    least = np.array([relevance.min_score(vector) for vector in new])
    assert 0.01 < ((new @ rows.T).max(1) >= least).mean() < 0.15


def test_a_deviation_counts_up_to_the_largest() -> None:
    rows = np.eye(2, dtype=np.float32)
    vector = np.array([1.0, 0.0], np.float32)  # cosines 1 and 0: mean 0.5, deviation 0.5
    assert Relevance(Law(2.0, 9.0), rows).min_score(vector) == pytest.approx(1.5)
    assert Relevance(Law(2.0, 0.1), rows).min_score(vector) == pytest.approx(0.7)


def test_it_is_measured_once_for_a_store_and_a_model(store: Store) -> None:
    reader, rows = Words(store), centred(store)

    def find(vector: NDArray[np.float32], k: int) -> Any:
        return rank(rows, vector, k)

    first = open_relevance(store, reader, rows, find)
    [file] = Path(store.path).glob("_search/*/answers.json")
    noted = json.loads(file.read_text())
    assert noted["deviations"] == first.law.deviations
    file.write_text(json.dumps(noted | {"deviations": 123.0}))
    assert open_relevance(store, reader, rows, find).law.deviations == 123.0
    assert open_relevance(store, Words(store, seed=1), rows, find).law.deviations != 123.0  # of another model
    file.write_text("{")
    assert open_relevance(store, reader, rows, find).law == first.law


def test_search_with_a_lowest_score(model_path: Path, store_path: Path, image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(store_path, tmp_path / "a.lance")
    searcher = Searcher(lamplit.load(model_path, device="cpu"), tmp_path / "a.lance")
    hits = searcher.search("A red ring.", k=60)
    assert searcher.search("A red ring.", k=60, min_score=hits[9].score) == hits[:10]
    assert searcher.search("A red ring.", k=60, min_score=2.0) == []
    least = searcher.min_score(searcher.encode("A red ring."))
    assert searcher.search("A red ring.", k=60, min_score="auto") == [hit for hit in hits if hit.score >= least]
    with pytest.raises(UsageError, match="is for words"):
        searcher.search(image=next(image_folder.glob("*.png")), min_score="auto")
    with pytest.raises(UsageError, match=r"min_score is '0.3'; expected a number, 'auto' or None"):
        searcher.search("A red ring.", min_score="0.3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="min_score is nan; expected a number"):
        searcher.search("A red ring.", min_score=float("nan"))
    assert searcher.search("A red ring.", min_score=np.float32(-1)) == searcher.search("A red ring.")
