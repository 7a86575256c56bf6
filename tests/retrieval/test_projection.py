"""All images of a store in two dimensions: principal axes, and the map of neighbours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_store
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import lamplit
from lamplit.cli import main as cli
from lamplit.errors import MissingExtraError, StoreError
from lamplit.retrieval import projection
from lamplit.retrieval.projection import find_map, make_map, principal_axes, sample_rows
from lamplit.store.arrays.row_vectors import RowVectors, read_vectors
from lamplit.store.lance_store import Store


def rows_of(vectors: Tensor) -> RowVectors:
    return RowVectors(F.normalize(vectors, dim=-1).half().numpy(), "0")


def clusters(count: int, size: int, width: int = 32) -> Tensor:
    """Vectors around `count` directions, one cluster after the other."""
    generator = torch.Generator().manual_seed(2)
    middles = torch.randn(count, width, generator=generator).repeat_interleave(size, 0)
    return middles + 0.3 * torch.randn(count * size, width, generator=generator)


def store_of(path: Path, vectors: Tensor) -> Store:
    return write_store(path, vectors, [["a picture"]] * len(vectors))


def together(points: NDArray[np.float32], size: int) -> float:
    """Part of the points whose nearest other point is of their own cluster."""
    far = np.square(points[:, None] - points[None]).sum(-1)
    np.fill_diagonal(far, np.inf)
    return float((far.argmin(1) // size == np.arange(len(points)) // size).mean())


def test_principal_axes_are_those_of_the_singular_values() -> None:
    vectors = rows_of(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)) * torch.arange(16, 0, -1) + 2)
    found = principal_axes(vectors)
    units = vectors[torch.arange(50)]
    centered = units - units.mean(0)
    _, lengths, axes = torch.linalg.svd(centered)
    expected = centered @ axes[:2].T
    expected -= (expected.amin(0) + expected.amax(0)) / 2
    expected /= expected.abs().max()
    assert found.points.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found.points).abs(), expected.abs(), atol=2e-3, rtol=0)
    assert found.explained == pytest.approx(float(lengths[:2].square().sum() / lengths.square().sum()), abs=1e-3)
    assert np.array_equal(principal_axes(vectors).points, found.points)


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (5, 1), (3, 2), (2, 1)])
def test_few_vectors_have_axes(shape: tuple[int, int]) -> None:
    found = principal_axes(rows_of(torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)))
    assert found.points.shape == (shape[0], 2)
    assert np.isfinite(found.points).all()
    assert found.explained is not None
    assert 0 <= found.explained <= 1 + 1e-5


def test_sample_is_always_the_same() -> None:
    assert sample_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
    chosen = sample_rows(1000, 10).tolist()
    assert chosen == sample_rows(1000, 10).tolist() == sorted(set(chosen))


@pytest.mark.slow
def test_neighbours_lie_together_and_the_map_is_kept(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a.lance", clusters(12, 25))
    assert find_map(store) is None
    report = lamplit.make_map(store)
    assert report == lamplit.MapReport(store.path, 300, 300, was_there=False)
    found = find_map(Store(store.path))
    assert found is not None
    assert found.explained is None
    assert isinstance(found.points, np.memmap)
    assert np.abs(found.points).max() == pytest.approx(1)
    assert together(found.points, 25) > 0.95 > together(principal_axes(read_vectors(store)).points, 25)
    assert make_map(store.path).was_there
    again = store_of(tmp_path / "b.lance", clusters(12, 25))
    make_map(again)
    second = find_map(again)
    assert second is not None
    assert np.array_equal(second.points, found.points)
    store.delete(["00000"])
    assert find_map(store) is None, "the map of what the store was"


@pytest.mark.slow
def test_images_beside_the_sample_are_placed_among_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "WHOLE", 200)
    monkeypatch.setattr(projection, "SAMPLE", 150)
    monkeypatch.setattr(projection, "_BLOCK", 64)
    store = store_of(tmp_path / "a.lance", clusters(12, 25))
    assert make_map(store).laid_out == 150
    found = find_map(store)
    assert found is not None
    assert np.isfinite(found.points).all()
    assert together(found.points, 25) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 19, 20])
def test_few_images_have_a_map(tmp_path: Path, count: int) -> None:
    store = store_of(tmp_path / "a.lance", clusters(count, 1))
    assert make_map(store).images == count
    found = find_map(store)
    assert found is not None
    assert found.points.shape == (count, 2)
    assert np.isfinite(found.points).all()


@pytest.mark.slow
def test_map_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "a.lance", clusters(2, 3))
    (Path(store.path) / "_search").write_text("a file, where a folder would be")
    monkeypatch.setenv("LAMPLIT_CACHE", str(Path(store.path) / "_search" / "cache"))
    with pytest.raises(StoreError, match=r"cannot be kept: .* set LAMPLIT_CACHE"):
        make_map(store)


@pytest.mark.slow
def test_command_says_what_it_did(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a.lance", clusters(2, 3))
    for was_there in (False, True):
        done = CliRunner().invoke(cli.app, ["map", store.path, "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == {"store": store.path, "images": 6, "laid_out": 6, "was_there": was_there}


def test_missing_extra_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "a.lance", clusters(2, 3))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"umap .* pip install 'lamplit\[map\]'"):
        make_map(store)
