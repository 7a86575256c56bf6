"""All images of a store in two dimensions: a map on which neighbours lie together, or principal axes.

The map is made once, by UMAP, and kept beside the files of search. Of more than `WHOLE` images a sample is laid out,
and each other image is placed among its nearest ones of the sample, so memory does not grow with the store.

Shapes: N images, D width of the tower, S of the sample, P dimensions in which neighbours are looked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamplit.errors import StoreError, require
from lamplit.files import cache_folder
from lamplit.progress import progress_bar
from lamplit.store.arrays.derived import Draft, derive, find_derived
from lamplit.store.arrays.row_vectors import RowVectors, read_vectors
from lamplit.store.lance_store import Store, as_store

KIND, ARRAY = "map", "points"
WHOLE = 100_000  # images that are laid out all together
SAMPLE = 50_000  # images that are laid out if there are more
FEWEST = 20  # images; fewer have no neighbourhoods
_NEIGHBOURS = 15  # of each image; they hold the map together
_PLACED_BY = 5  # images of the sample
_DIMENSIONS = 64  # principal axes in which neighbours are looked for
_FOR_AXES = 10_000  # images that tell the principal axes
_BLOCK = 2048
_SEED = 0


@dataclass(frozen=True)
class Projection:
    """Images in two dimensions.

    Attributes:
        points: (N, 2) float32, in the order of the rows; the longer axis runs from -1 to 1.
        explained: part of the variance that the two principal axes hold; None for a map of neighbours.
    """

    points: NDArray[np.float32]
    explained: float | None


@dataclass(frozen=True)
class MapReport:
    """What `make_map` did.

    Attributes:
        store: path of the store.
        images: number of images on the map.
        laid_out: number of images that were laid out together; the others were placed among them.
        was_there: whether the map had been made before.
    """

    store: str
    images: int
    laid_out: int
    was_there: bool


def make_map(store: Store | str | Path, *, progress: bool = False) -> MapReport:
    """Lay out all images of a store so that likely neighbours lie together, for the page; made once for a store.

    On the command line: `lamplit map`. It takes about a minute for 36,000 images on two cores, and is the same in each
    run on the same machine. When the store has changed, it can be made again.

    Args:
        store: an open store or its path.
        progress: show bars on stderr.

    Raises:
        MissingExtraError: umap-learn is not installed.
        StoreError: there is no store, rows have no vectors, or no folder can be written to.

    Example:
        >>> lamplit.make_map("stamps.lance").images
        701
    """
    store = as_store(store)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # a part of it that nobody needs here wants another library
        umap = require("umap", "map")
    was_there = find_map(store) is not None

    def make(draft: Draft) -> None:
        vectors = read_vectors(store, store.center, progress=progress)
        draft.create(ARRAY, (len(store), 2), np.float32)[:] = _lay_out(vectors, umap, progress=progress)

    derive(store, KIND, (ARRAY,), make, keeps=True)
    if find_map(store) is None:
        raise StoreError(
            f"the map was made, but cannot be kept: neither {store.called} nor {cache_folder()} can be written to; set "
            "LAMPLIT_CACHE to a folder that can"
        )
    return MapReport(store.path, len(store), min(len(store), _fitted(len(store))), was_there)


def find_map(store: Store) -> Projection | None:
    """Open the map of a store as it is now; None if it was not made."""
    found = find_derived(store, KIND, (ARRAY,))
    if found is None or found[ARRAY].shape != (len(store), 2):
        return None
    return Projection(found[ARRAY], None)


def principal_axes(vectors: RowVectors) -> Projection:
    """Project all images onto the two axes on which they differ most; the same vectors always give the same points."""
    axes, center, explained = _axes(vectors, 2)
    points = np.zeros((len(vectors), 2), np.float32)
    for rows, block in _reduced(vectors, axes, center):
        points[rows, : block.shape[1]] = block.numpy()
    return Projection(_scaled(points), explained)


def sample_rows(num_rows: int, size: int) -> NDArray[np.int64]:
    """Choose `size` of `num_rows` rows, ascending and always the same ones; all rows if there are no more."""
    if num_rows <= size:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(_SEED).choice(num_rows, size, replace=False))


def _fitted(num_rows: int) -> int:
    return num_rows if num_rows <= WHOLE else SAMPLE


def _lay_out(vectors: RowVectors, umap: Any, *, progress: bool) -> NDArray[np.float32]:
    if len(vectors) < FEWEST:
        return principal_axes(vectors).points
    chosen = sample_rows(len(vectors), _fitted(len(vectors)))
    axes, center, _ = _axes(vectors, _DIMENSIONS)
    sample = torch.cat([block for _, block in _reduced(vectors, axes, center, chosen)])
    laid_out = _umap(umap, sample, progress=progress)
    if len(chosen) == len(vectors):
        return _scaled(_spread(laid_out))
    points = np.empty((len(vectors), 2), np.float32)
    squares, places = sample.square().sum(1), torch.from_numpy(laid_out)
    with progress_bar("placing", len(vectors), shown=progress) as advance:
        for rows, block in _reduced(vectors, axes, center):
            nearest, _ = _nearest(block, sample, squares, _PLACED_BY)
            # The middle one, not the mean: neighbours on two islands would put an image into the sea between them.
            points[rows] = places[nearest].median(1).values.numpy()
            advance(len(block), "")
    points[chosen] = laid_out
    return _scaled(_spread(points))


def _umap(umap: Any, sample: Tensor, *, progress: bool) -> NDArray[np.float32]:
    """Lay out (S, P) vectors in two dimensions; it begins with their principal axes, which keeps the large picture."""
    count = min(_NEIGHBOURS, len(sample) - 1)
    near, squares = np.empty((len(sample), count), np.int32), sample.square().sum(1)
    far = np.empty((len(sample), count), np.float32)
    with progress_bar("neighbours", len(sample), shown=progress) as advance:
        for start in range(0, len(sample), _BLOCK):
            rows = slice(start, start + _BLOCK)
            found, distances = _nearest(sample[rows], sample, squares, count)
            near[rows], far[rows] = found.numpy(), distances.numpy()
            advance(len(found), "")
    begin = sample[:, :2].numpy()
    if begin.shape[1] < 2:
        begin = np.pad(begin, ((0, 0), (0, 1)))
    bar = {"disable": not (progress and sys.stderr.isatty()), "desc": "    layout", "bar_format": None}
    made = umap.UMAP(
        n_neighbors=count, init=begin, random_state=_SEED, n_jobs=1, precomputed_knn=(near, far), tqdm_kwds=bar,
        force_approximation_algorithm=True,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*precomputed_knn.*")  # that it cannot place others: we do that
            points: NDArray[np.float32] = made.fit_transform(sample.numpy())
    finally:
        torch.set_num_threads(threads)  # where numba starts threads, it gives torch as many as there are cores
    return points.astype(np.float32)


def _nearest(block: Tensor, sample: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the nearest of (S, P) vectors to each of (n, P), nearest first: (n, count) rows, and distances."""
    far = torch.addmm(squares[None], block, sample.T, alpha=-2)
    found = far.topk(count, largest=False)
    distances = (found.values + block.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    return found.indices, distances


def _axes(vectors: RowVectors, count: int) -> tuple[Tensor, Tensor, float]:
    """Return (D, count) principal axes of a sample, its (D,) mean, and the part of the variance that the axes hold."""
    # In float64, because what rounds otherwise from run to run would be another map in the end.
    sample = vectors[torch.from_numpy(sample_rows(len(vectors), _FOR_AXES))].double()
    mean = sample.mean(0)
    sample -= mean
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)  # pca_lowrank begins from random directions
        _, lengths, axes = torch.pca_lowrank(sample, q=min(count + 6, *sample.shape), center=False, niter=4)
    axes = axes[:, :count] * axes[:, :count].gather(0, axes[:, :count].abs().argmax(0, keepdim=True)).sign()
    total = float(sample.square().sum())
    return axes.float(), mean.float(), float(lengths[:count].square().sum()) / total if total else 1.0


def _reduced(
    vectors: RowVectors, axes: Tensor, center: Tensor, chosen: NDArray[np.int64] | None = None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield rows, all or those chosen, and their (n, count) coordinates on some axes."""
    count = len(vectors) if chosen is None else len(chosen)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        rows = np.arange(start, end) if chosen is None else chosen[start:end]
        yield rows, (vectors[torch.from_numpy(rows)] - center) @ axes


def _spread(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take room from the sea between islands: half of a coordinate is its place, half its rank among all.

    How far islands lie from each other says nothing, but a few far ones would leave little room for all others. The
    order along each axis stays.
    """
    spread = np.empty_like(points)
    for axis, values in enumerate(points.T):
        ranks = np.empty(len(values), np.float32)
        ranks[np.argsort(values, kind="stable")] = np.linspace(0, 1, len(values), dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        spread[:, axis] = (values - low) / max(high - low, 1e-9) + ranks
    return spread


def _scaled(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Move points into the square from -1 to 1, both axes by one measure."""
    if not len(points):
        return points
    low, high = points.min(0), points.max(0)
    scaled: NDArray[np.float32] = (points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-9)
    return scaled.astype(np.float32)
