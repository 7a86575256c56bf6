"""From which score on a hit is an answer: measured on the store itself, by its own captions.

A query of words has a cosine with every image, and the best of them is above 0 whatever the words mean. How far above
is measured in deviations of the query's own cosines, which makes queries alike. Captions of the store are asked for.
Of each the best image is looked at that is related (its texts share a word with the caption), and the best that is not.
The bound lies where as many of the first are below it as of the second above: as many right answers are hidden as
wrong ones shown. Among 700 images that is some 7 deviations and a tenth of each; among 300,000 drawings, where there is
always one that is near by chance, the two overlap more. Words that many images show spread their own cosines, so a
deviation counts no more than that of 95 % of the captions.

A store without captions is asked for the names of 1,400 things and places. Most of them it does not show, and the low
side of the law, which they alone make, tells where its high side ends: at the upper 5 %.

Shapes: N images, S of them sampled, E width of the model's joint space.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamplit.files import replacing, write_text
from lamplit.retrieval.model_reader import Reader
from lamplit.retrieval.nearest import Found, Vectors
from lamplit.store.arrays.derived import search_folders, search_name
from lamplit.store.arrays.joined_vectors import JoinedVectors
from lamplit.store.lance_store import Store

logger = logging.getLogger(__name__)
_FALSE = 0.05  # without captions: share of the words that nothing shows, and that get an answer all the same
_LARGEST = 0.95  # share of the queries whose deviation counts in full
SAMPLE = 4096  # images, for the mean and the deviation of a query's cosines
_CAPTIONS = 512  # of the store, to ask it by
_FEWEST = 50  # below so many, names are asked for
_LOOKED_AT = 50  # images for each, the nearest
_COMMON = 0.02  # share of the captions from which on a token says nothing
_PROBE, _PROBED = "a red bicycle", 16  # numbers of this text's vector, by which a model is known again
_NAMES = ("imagenet", "sun397")
_FILE = "answers.json"
Find = Callable[[NDArray[np.float32], int], Found]


@dataclass(frozen=True)
class Law:
    """How high the best of N images must be, to be an answer.

    Attributes:
        deviations: how far above the mean of the query's cosines; in deviations of these.
        largest: deviation that a query's own counts for at most.
    """

    deviations: float
    largest: float


@dataclass(frozen=True)
class Relevance:
    """What tells an answer from the best of many images that are none; `rows` are (S, E) vectors of some of them."""

    law: Law
    rows: NDArray[np.float32]

    def min_score(self, vector: NDArray[np.float32]) -> float:
        """Return the lowest cosine of an answer to a query, (E,)."""
        scores = self.rows @ vector
        return float(scores.mean() + self.law.deviations * min(float(scores.std()), self.law.largest))


def open_relevance(store: Store, reader: Reader, vectors: Vectors | JoinedVectors, find: Find) -> Relevance:
    """Measure what an answer is, or read what was measured of this store and model before.

    Args:
        store: an open store.
        reader: a model that reads it.
        vectors: (N, E) unit vectors of its images.
        find: returns the k nearest images to a vector.
    """
    rows = np.asarray(vectors[spread(len(vectors), SAMPLE)], np.float32)
    probe = [round(float(value), 3) for value in reader.encode_texts([_PROBE])[0][:_PROBED]]
    places = [folder / search_name(store, f"relevance-{reader.space}") for folder in search_folders(store)]
    for place in places:
        if (law := _read(place / _FILE, probe)) is not None:
            return Relevance(law, rows)
    logger.info("measuring, once, which scores of words are answers in this store")
    law = measure_law(store, reader, rows, find)
    for place in places:
        try:
            with replacing(place) as partial:
                partial.mkdir()
                write_text(partial / _FILE, json.dumps({"probe": probe, **asdict(law)}) + "\n")
            break
        except OSError as error:  # no permission, or a full disk
            logger.warning("what was measured is not kept in %s: %s", place, error)
    return Relevance(law, rows)


def measure_law(store: Store, reader: Reader, rows: NDArray[np.float32], find: Find) -> Law:
    """Measure by its captions what an answer reaches in a store, of which `rows` are a sample."""
    captions = _captions(store)
    if len(captions) < _FEWEST:
        return law_of_names(reader, rows, find)
    # A model's own tokens are words, or parts of them, in every language.
    tokens = [set(row) for row in reader.tokenize(captions)]
    counts = Counter(token for row in tokens for token in row)
    common = {token for token, count in counts.items() if count > max(2, _COMMON * len(captions))}

    def best_of_both(caption: int, found: Found) -> tuple[float, float]:
        texts_of = store.take(found.rows.tolist(), ["texts"])["texts"].to_pylist()
        said = [(place, text) for place, texts in enumerate(texts_of) for text in texts or ()]
        words = reader.tokenize([text for _, text in said])
        own = tokens[caption] - common
        related = {
            place
            for (place, text), row in zip(said, words, strict=True)
            if text == captions[caption] or not own.isdisjoint(row)
        }
        scores = found.scores.tolist()
        others = (score for place, score in enumerate(scores) if place not in related)
        return max((scores[place] for place in related), default=-math.inf), next(others, scores[-1])

    heights, deviations = _measure(captions, reader, rows, best_of_both, find)
    return Law(where_they_balance(*heights.T), float(np.quantile(deviations, _LARGEST)))


def law_of_names(reader: Reader, rows: NDArray[np.float32], find: Find) -> Law:
    """Measure the law by names of which the store shows some, nobody knows which."""
    heights, deviations = _measure(_names(), reader, rows, lambda _, found: (float(found.scores[0]),), find)
    return Law(upper_end_of_mixture(heights[:, 0]), float(np.quantile(deviations, _LARGEST)))


def where_they_balance(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> float:
    """Return a bound with as large a share of `right` below it as of `wrong` above it, amid what lies around it."""
    values = np.unique(np.concatenate([right[np.isfinite(right)], wrong]))
    hidden = np.searchsorted(np.sort(right), values) * len(wrong)
    shown = (len(wrong) - np.searchsorted(np.sort(wrong), values)) * len(right)
    place = int((hidden >= shown).argmax()) if hidden[-1] >= shown[-1] else len(values) - 1
    return float(values[max(0, place - 1) : place + 1].mean())


def upper_end_of_mixture(values: NDArray[np.float64]) -> float:
    """Return where the upper 5 % of Gumbel's law begin, of which some of the `values` are, the others above it.

    The law's mode is where the values are densest, on a logarithmic scale; its width is read below the mode.
    """
    from scipy.stats import gaussian_kde  # a search without this question does without

    logs = np.log(np.maximum(values, 1e-3))
    grid = np.linspace(logs.min(), logs.max(), 512)
    mode = math.exp(grid[gaussian_kde(logs)(grid).argmax()])
    # Half of what is below the mode, e^-1 of the law, is below mode + width * log(-log(e^-1 / 2)) * -1.
    width = (mode - float(np.median(values[values <= mode]))) / math.log(-math.log(math.exp(-1) / 2))
    return mode - width * math.log(-math.log(1 - _FALSE))


def _measure(
    texts: Sequence[str],
    reader: Reader,
    rows: NDArray[np.float32],
    best: Callable[[int, Found], tuple[float, ...]],
    find: Find,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return of each text how many of its deviations its best images are above the mean, and the deviation."""
    heights, deviations = [], []
    for number, vector in enumerate(reader.encode_texts(list(texts))):
        scores = rows @ vector
        deviations.append(max(float(scores.std()), 1e-9))
        heights.append((np.array(best(number, find(vector, _LOOKED_AT))) - float(scores.mean())) / deviations[-1])
    return np.array(heights), np.array(deviations)


def _captions(store: Store) -> list[str]:
    """Return distinct captions of images all over the store."""
    texts = store.take(spread(len(store), 2 * _CAPTIONS).tolist(), ["texts"])["texts"].to_pylist()
    distinct = list(dict.fromkeys(each[0] for each in texts if each and each[0].strip()))
    return [distinct[i] for i in spread(len(distinct), _CAPTIONS)]


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return at most so many of the first `count` numbers, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64) if count else np.empty(0, np.int64)


def _names() -> list[str]:
    """Return the names of many things and places."""
    facts = json.loads((files("lamplit") / "zeroshot" / "facts" / "class_names.json").read_text(encoding="utf-8"))
    names = [name if isinstance(name, str) else name[0] for each in _NAMES for name in facts[each]["names"]]
    return list(dict.fromkeys(f"A {name.replace('_', ' ')}." for name in names))


def _read(file: Path, probe: Sequence[float]) -> Law | None:
    """Return what was measured with a model of this probe before."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        is_same = np.allclose(found["probe"], probe, atol=0.002)
        return Law(float(found["deviations"]), float(found["largest"])) if is_same else None
    except (OSError, ValueError, LookupError, TypeError):  # not measured yet, or damaged
        return None
