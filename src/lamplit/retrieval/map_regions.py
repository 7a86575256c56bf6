"""Regions of a map: where its points lie dense, at several scales, and the words of its captions that fit them.

Shapes: N images, R regions, G cells of a side of the grid, E width of the joint space.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lamplit.unit_vectors import normalize

GRID = 512
_SCALES = (14.0, 7.0, 3.5)  # of the smoothing, in cells; each is a level, and is seen when one looks closer
_MOST = (24, 60, 120)  # regions of each level, the largest
_FEWEST, _SHARE = 4, 2000  # images of a region, and the part of all of them: one of so many
TOLD_BY = 48  # images that tell what a region shows
_CANDIDATES = 12  # words of a region that the text tower reads
_COMMON = 0.2  # part of the regions; a word of more tells nothing
_WORD = re.compile(r"[^\W\d_]{3,}")
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Region:
    """Where points lie dense.

    Attributes:
        x: of its densest place.
        y: of its densest place.
        level: 0 for the regions of the whole map; each further level halves what is seen.
        images: how many it has.
        rows: some of them, ascending.
    """

    x: float
    y: float
    level: int
    images: int
    rows: NDArray[np.int64]


def find_regions(points: NDArray[np.float32]) -> list[Region]:
    """Find the dense regions of (N, 2) points in the square from -1 to 1, the largest of each level first."""
    if not len(points):
        return []
    cells = _cells(points)
    counts = np.bincount(cells, minlength=GRID * GRID).reshape(GRID, GRID).astype(np.float32)
    return [
        region
        for level, (scale, most) in enumerate(zip(_SCALES, _MOST, strict=True))
        for region in _level(counts, cells, points, level, scale, most)
    ]


def name_regions(
    regions: Sequence[Region],
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    captions: Callable[[NDArray[np.int64]], Sequence[Sequence[str]]],
    encode: Callable[[list[str]], NDArray[np.float32]],
) -> list[str]:
    """Name each region by the words of its captions that fit it better than they fit the other regions.

    Args:
        regions: of one map.
        vectors: of some rows, (n, E) unit vectors in the joint space.
        captions: of some rows, the texts of each.
        encode: embeds words, (n, E) unit vectors.

    Returns:
        A word or two for each region; an empty text if its captions share no word.
    """
    told = [_words(captions(region.rows)) for region in regions]
    in_all: Counter[str] = Counter()
    for each in told:
        in_all.update(each)
    spread = Counter(word for words in told for word in words)  # over so many regions
    rare = {word for word, count in spread.items() if count <= max(_COMMON * len(regions), 3)}
    candidates = [_candidates(words, in_all, rare) for words in told]
    words = sorted({word for each in candidates for word in each})
    if not words:
        return ["" for _ in regions]
    means = np.stack([vectors(region.rows).mean(0) for region in regions])
    texts = encode(words)
    # What is alike in all regions, or in all words, says nothing of one of them.
    fit = normalize(means - means.mean(0)) @ normalize(texts - texts.mean(0)).T
    place = {word: number for number, word in enumerate(words)}
    return [
        _name(sorted(each, key=lambda word, of=row: -fit[of, place[word]]))  # type: ignore[misc]
        for row, each in enumerate(candidates)
    ]


def _cells(points: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the cell of each of (N, 2) points, (N,)."""
    cells = np.empty(len(points), np.int32)
    for start in range(0, len(points), _BLOCK):
        places = np.clip((points[start : start + _BLOCK] + 1) * (GRID / 2), 0, GRID - 1).astype(np.int32)
        cells[start : start + _BLOCK] = places[:, 1] * GRID + places[:, 0]
    return cells


def _level(
    counts: NDArray[np.float32],
    cells: NDArray[np.int32],
    points: NDArray[np.float32],
    level: int,
    scale: float,
    most: int,
) -> list[Region]:
    """Find the regions of one scale: each image belongs to the peak to which the density rises from its cell."""
    tops = _tops(ndimage.gaussian_filter(counts, scale, mode="constant"))
    top_of = tops[cells]
    peaks, of_point, sizes = np.unique(top_of, return_inverse=True, return_counts=True)
    found = []
    for number in np.argsort(-sizes, kind="stable")[:most]:
        if sizes[number] < max(_FEWEST, len(points) / _SHARE):
            break
        rows = np.flatnonzero(of_point == number)
        y, x = (np.array(divmod(int(peaks[number]), GRID)) + 0.5) * 2 / GRID - 1
        near = np.square(points[rows] - (x, y)).sum(1)  # what lies in its middle tells more of it than its coast does
        told = np.sort(rows[np.argpartition(near, TOLD_BY)[:TOLD_BY]] if len(rows) > TOLD_BY else rows)
        found.append(Region(float(x), float(y), level, len(rows), told))
    return found


def _tops(density: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return for each cell, (G * G,), the cell of the peak that one reaches by going up steepest."""
    padded = np.pad(density, 1, constant_values=-1)
    around = np.stack([padded[y : y + GRID, x : x + GRID] for y in range(3) for x in range(3)])
    steps = np.array([(y - 1) * GRID + x - 1 for y in range(3) for x in range(3)], np.int32)
    around[4] = np.nextafter(density, np.float32(np.inf))  # among equals one stays
    tops: NDArray[np.int32] = np.arange(GRID * GRID, dtype=np.int32) + steps[around.argmax(0).reshape(-1)]
    while not np.array_equal(further := tops[tops], tops):
        tops = further
    return tops


def _words(captions: Sequence[Sequence[str]]) -> Counter[str]:
    """Count the captions that have a word."""
    return Counter(
        word for texts in captions for word in {word for text in texts[:5] for word in _WORD.findall(text.lower())}
    )


def _candidates(words: Counter[str], in_all: Counter[str], rare: set[str]) -> list[str]:
    """Choose the words of a region that its captions have most, and others' least."""
    shared = [word for word, count in words.items() if count > 1 and word in rare] or [w for w in words if w in rare]
    return sorted(shared, key=lambda word: (-(words[word] ** 2) / in_all[word], word))[:_CANDIDATES]


def _name(words: list[str]) -> str:
    """Join the first two words that are not forms of each other."""
    others = [word for word in words[1:] if word[:4] != words[0][:4]]
    return ", ".join([*words[:1], *others[:1]])
