"""What the page draws of a store's map: points, colours with their legend, named regions, and what lies in an area.

Shapes: N images, E width of the joint space.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lamplit.errors import UsageError
from lamplit.retrieval.map_regions import Region, find_regions, name_regions
from lamplit.retrieval.projection import FEWEST, Projection, find_map, principal_axes
from lamplit.retrieval.searcher import Searcher
from lamplit.store.arrays.row_vectors import read_vectors
from lamplit.store.lance_store import Store
from lamplit.unit_vectors import normalize

MOST_VALUES = 12  # of a column that have a colour of their own
STEPS = 16  # of a scale of colours
NONE = "none"  # what has no value
OTHERS = "others"
_MOST_IMAGES = (5, 99.5)  # percentiles of cosines: a single image that fits far better would pale all others
_BLOCK = 16384
_KEPT_AREAS = 32  # of a bit for each image


@dataclass(frozen=True)
class Legend:
    """What the numbers of a colouring mean.

    Attributes:
        kind: `values`, or `scale` from `low` to `high`, in steps.
        entries: names and numbers of images; for a scale those without a value alone, if there are any.
        low: lowest value of a scale.
        high: highest value of a scale.
    """

    kind: str
    entries: list[tuple[str, int]]
    low: float | None = None
    high: float | None = None


Coloured = tuple[Legend, NDArray[np.uint8]]  # and the entry or the step of each image, (N,)
Corners = tuple[tuple[float, float], ...]


class CollectionMap:
    """All images of a store in two dimensions.

    Args:
        store: an open store.
        searcher: of the same store, which reads words.
        captions: returns the texts of some rows.
    """

    def __init__(
        self, store: Store, searcher: Searcher, captions: Callable[[NDArray[np.int64]], Sequence[Sequence[str]]]
    ) -> None:
        self._store, self._searcher, self._captions = store, searcher, captions
        self._lock = Lock()
        self._projection: Projection | None = None
        self._inside = lru_cache(_KEPT_AREAS)(self._find_inside)

    @property
    def projection(self) -> Projection:
        """The map of neighbours as soon as it was made, the principal axes until then."""
        with self._lock:  # it draws random numbers, whose generator all threads share
            if self._projection is None or self._projection.explained is not None:
                found = find_map(self._store)
                if found is not None:
                    self._projection = found
                elif self._projection is None:
                    self._projection = principal_axes(read_vectors(self._store, self._store.center))
            return self._projection

    def tag(self, projection: Projection) -> str:
        """Name a projection: another one of the same store, or one of another store, has another name."""
        kind = "neighbours" if projection.explained is None else "axes"
        return blake2b(f"{self._store.version_digest} {kind}".encode(), digest_size=8).hexdigest()

    def advice(self, projection: Projection) -> str | None:
        """Say how to get a map of neighbours; None if this is one, or if the images are too few to have one."""
        if projection.explained is None or len(self._store) < FEWEST:
            return None
        install = "" if find_spec("umap") else "pip install 'lamplit[map]', then "
        return (
            f"For a map on which likely neighbours lie together, type: {install}lamplit map {shlex.quote(self._name)}"
        )

    @property
    def _name(self) -> str:
        return self._store.path.rstrip("/").rpartition("/")[2]  # no answer says in which folder it is

    def coloured(self, column: str | None, query: str | None) -> Coloured:
        """Colour all images by a column, by their cosine to words, or alike."""
        if query is not None:
            return _scale(self._cosines(self._searcher.encode(query)), _MOST_IMAGES)
        if column is None:
            return Legend("values", []), np.zeros(len(self._store), np.uint8)
        return colour_cells(self._store.arrow_column(column))

    def _cosines(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        vectors = self._searcher.collection.vectors
        found = np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), _BLOCK):
            found[start : start + _BLOCK] = normalize(np.asarray(vectors[start : start + _BLOCK])) @ vector
        return found

    @cached_property
    def _regions(self) -> tuple[str, list[tuple[Region, str, list[int]]]]:
        projection = self.projection
        regions = find_regions(np.asarray(projection.points))
        names = name_regions(regions, self._vectors, self._captions, self._searcher.reader.encode_texts)
        typical = [self._typical(region.rows) for region in regions]
        return self.tag(projection), list(zip(regions, names, typical, strict=True))

    def regions(self, tag: str) -> list[tuple[Region, str, list[int]]]:
        """Return the regions of a map, each with its name, which may be empty, and its most typical rows."""
        if self._regions[0] != tag:
            vars(self).pop("_regions", None)
        return self._regions[1]

    def _typical(self, rows: NDArray[np.int64]) -> list[int]:
        vectors = self._vectors(rows)
        return [int(row) for row in rows[np.argsort(-(vectors @ vectors.mean(0)), kind="stable")[:8]]]

    def _vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return normalize(np.asarray(self._searcher.collection.vectors[rows]))

    def require(self, tag: str) -> None:
        """Raise unless the map has this tag.

        Raises:
            UsageError: it is another one now.
        """
        if tag != self.tag(self.projection):
            raise UsageError("the map has changed; load the page again")

    def inside(self, tag: str, corners: Corners) -> NDArray[np.bool_]:
        """Mark the images inside a polygon on a map, (N,).

        Raises:
            UsageError: the map is another one now.
        """
        self.require(tag)
        return self._inside(tag, corners)

    def _find_inside(self, _: str, corners: Corners) -> NDArray[np.bool_]:
        return inside(np.asarray(self.projection.points), corners)


def inside(points: NDArray[np.float32], corners: Corners) -> NDArray[np.bool_]:
    """Tell which of (N, 2) points lie inside a polygon: a ray from these crosses an odd number of its sides."""
    polygon = np.array(corners, np.float32)
    low, high = polygon.min(0), polygon.max(0)
    near = np.flatnonzero(((points >= low) & (points <= high)).all(1))
    x, y = points[near].T
    crossings = np.zeros(len(near), bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        spans = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossings ^= spans & (x < ax + (y - ay) / (by - ay) * (bx - ax))
    found = np.zeros(len(points), bool)
    found[near[crossings]] = True
    return found


def can_colour(kind: pa.DataType) -> bool:
    """Tell whether cells of this type are single values."""
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def colour_cells(cells: pa.Array) -> Coloured:
    """Colour by the cells of a column: numbers on a scale, other values by those that most images have.

    Raises:
        UsageError: its cells are no single values.
    """
    kind = cells.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _scale(pc.cast(cells, pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    if not can_colour(kind):
        raise UsageError(f"the map cannot be coloured by cells of type {kind}; take a column of texts or numbers")
    coded = pc.dictionary_encode(pc.cast(cells, pa.string()))
    codes = pc.fill_null(coded.indices, len(coded.dictionary)).to_numpy(zero_copy_only=False)
    counts = np.bincount(codes, minlength=len(coded.dictionary) + 1)
    missing = int(counts[-1])
    order = np.argsort(-counts[:-1], kind="stable")[:MOST_VALUES]
    entries = [(coded.dictionary[int(code)].as_py()[:80], int(counts[code])) for code in order]
    rest = int(counts[:-1].sum()) - sum(count for _, count in entries)
    place = np.full(len(counts), len(entries), np.uint8)
    place[order] = np.arange(len(order))
    if rest:
        entries.append((OTHERS, rest))
    if missing:
        place[-1] = len(entries)
        entries.append((NONE, missing))
    return Legend("values", entries), place[codes]


def _scale(values: NDArray[np.floating[Any]], ends: tuple[float, float] = (0, 100)) -> Coloured:
    """Put values on a scale between two percentiles; those that are no number are one step above it."""
    known = np.isfinite(values)
    low, high = np.percentile(values[known], ends).tolist() if known.any() else (0.0, 0.0)
    steps = np.full(len(values), STEPS, np.uint8)
    steps[known] = np.clip((values[known] - low) / ((high - low) or 1) * STEPS, 0, STEPS - 1).astype(np.uint8)
    missing = len(values) - int(known.sum())
    return Legend("scale", [(NONE, missing)] if missing else [], low, high), steps
