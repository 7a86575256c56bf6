from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lamplit.errors import UsageError
from lamplit.store import duplicates
from lamplit.store.duplicates import Duplicate, DuplicateGroup, find_duplicates, join
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.identity import TowerIdentity


def make_store(path: Path, vectors: torch.Tensor, hashes: list[str] | None = None) -> Store:
    names = [f"{row:04}" for row in range(len(vectors))]
    rows = [
        Row(name, f"/images/{name}.png", content, [], vector)
        for name, content, vector in zip(names, hashes or names, F.normalize(vectors, dim=-1), strict=True)
    ]
    return Store.create(path, TowerIdentity.of_imported("a tower", vectors.shape[1]), rows, backend="imported")


def ids(groups: list[DuplicateGroup]) -> list[list[str]]:
    return [[image_file.id for image_file in group.images] for group in groups]


def test_groups_by_hand(tmp_path: Path) -> None:
    """A pair, a chain whose ends are far apart, two copies, and one image alone."""
    at = torch.tensor([0.0, 90, 10, 100, 190, 200, 110, 250])  # degrees; neighbours of 10 have a cosine of 0.985
    vectors = torch.stack([at.deg2rad().cos(), at.deg2rad().sin()], -1)
    store = make_store(tmp_path / "x.lance", vectors, ["a", "b", "c", "d", "e", "f", "g", "h"])
    groups = find_duplicates(store, threshold=0.98)
    assert ids(groups) == [["0001", "0003", "0006"], ["0000", "0002"], ["0004", "0005"]]
    for group in groups:
        for image_file in group.images:
            assert image_file.path == f"/images/{image_file.id}.png"
            assert image_file.cosine == pytest.approx(0.985, abs=1e-3)
            assert image_file.copy_of is None
    assert find_duplicates(store, threshold=0.99) == []
    assert len(find_duplicates(store, threshold=0.01)[0].images) == 8


def test_copies_are_marked_and_found_at_every_threshold(tmp_path: Path) -> None:
    """Also where two backends gave the same image vectors that differ."""
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [-1.0, 0.0], [0.0, -1.0]])
    store = make_store(tmp_path / "x.lance", vectors, ["same", "other", "same", "more", "same"])
    [group] = find_duplicates(store, threshold=1.0)
    assert group == DuplicateGroup(
        [
            Duplicate("0000", "/images/0000.png", 1.0, None),
            Duplicate("0002", "/images/0002.png", 1.0, "0000"),
            Duplicate("0004", "/images/0004.png", 1.0, "0000"),
        ]
    )


def test_cosine_is_that_of_the_nearest(tmp_path: Path) -> None:
    vectors = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    store = make_store(tmp_path / "x.lance", vectors)
    cosines = (store.vectors() @ store.vectors().T).fill_diagonal_(-1)
    found = {p.id: p.cosine for group in find_duplicates(store, threshold=0.9, chunk_size=7) for p in group.images}
    assert 10 < len(found) <= 40
    for name, cosine in found.items():
        assert cosine == pytest.approx(float(cosines[int(name)].max()), abs=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 59, 60, 100])
def test_chunk_size_changes_nothing(tmp_path: Path, chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(20, 4, generator=generator).repeat(3, 1) + 0.1 * torch.randn(60, 4, generator=generator)
    store = make_store(tmp_path / "x.lance", vectors, [str(place % 50) for place in range(60)])
    expected, found = find_duplicates(store), find_duplicates(store, chunk_size=chunk_size)
    assert ids(found) == ids(expected)
    assert [len(group) for group in ids(expected)] == sorted(map(len, ids(expected)), reverse=True)
    assert len(expected) > 3
    for group, same in zip(found, expected, strict=True):
        assert [p.copy_of for p in group.images] == [p.copy_of for p in same.images]
        assert [p.cosine for p in group.images] == pytest.approx([p.cosine for p in same.images], abs=1e-6)


def test_centre_does_not_count(tmp_path: Path) -> None:
    """What is near is a matter of the tower, not of the other images in the store."""
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    rows = [Row(str(i), str(i), str(i), [], F.normalize(v, dim=0)) for i, v in enumerate(vectors)]
    store = Store.create(
        tmp_path / "x.lance", TowerIdentity.of_imported("a tower", 2), rows, backend="imported", centered=True
    )
    store.finish()
    assert ids(find_duplicates(store)) == [["0", "1"]]


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_threshold_that_is_none(tmp_path: Path, threshold: float) -> None:
    store = make_store(tmp_path / "x.lance", torch.eye(2))
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        find_duplicates(store, threshold=threshold)


def slow_components(num: int, edges: list[tuple[int, int]]) -> list[int]:
    """The lowest row that each row reaches, by walking from every one of them."""
    lowest = []
    for start in range(num):
        reached, new = {start}, {start}
        while new:
            new = {b for edge in edges for a, b in (edge, edge[::-1]) if a in new} - reached
            reached |= new
        lowest.append(min(reached))
    return lowest


@settings(max_examples=60)
@given(st.integers(1, 12), st.data())
def test_join_is_connected_components(num: int, data: st.DataObject) -> None:
    row = st.integers(0, num - 1)
    edges = data.draw(st.lists(st.tuples(row, row), max_size=16))
    cut = data.draw(st.integers(0, len(edges)))
    labels = np.arange(num)
    for block in (edges[:cut], edges[cut:]):  # as chunk after chunk does
        left, right = np.array(block, dtype=np.int64).reshape(-1, 2).T
        labels = join(labels, left, right)
    assert labels.tolist() == slow_components(num, edges)


def slow_duplicates(at: list[int], hashes: list[int]) -> list[list[tuple[str, float, str | None]]]:
    """Groups of unit vectors at multiples of 5 degrees, of which two within 10 are near; from every pair by itself."""
    num = range(len(at))
    cosine = [[float(np.cos(np.deg2rad(5 * (at[i] - at[j])))) for j in num] for i in num]
    edges = [(i, j) for i in num for j in range(i) if hashes[i] == hashes[j] or cosine[i][j] > NEAR]
    labels = slow_components(len(at), edges)
    groups = [[i for i in num if labels[i] == label] for label in sorted(set(labels)) if labels.count(label) > 1]
    found = []
    for group in sorted(groups, key=lambda group: -len(group)):
        image_folder = []
        for i in group:
            nearest = max(1.0 if hashes[i] == hashes[j] else cosine[i][j] for j in num if j != i)
            first = hashes.index(hashes[i])
            image_folder.append((f"{i:04}", pytest.approx(nearest, abs=1e-3), None if first == i else f"{first:04}"))
        found.append(image_folder)
    return found


NEAR = float(np.cos(np.deg2rad(12.5)))  # no pair of such vectors lies on it


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 71), st.integers(0, 30)), min_size=1, max_size=24), st.integers(1, 30))
def test_groups_are_those_of_every_pair_by_itself(image_folder: list[tuple[int, int]], chunk_size: int) -> None:
    at, hashes = [place for place, _ in image_folder], [content for _, content in image_folder]
    angles = torch.tensor(at, dtype=torch.float64) * 5
    vectors = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], -1).float()
    with TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "x.lance", vectors, [str(content) for content in hashes])
        groups = find_duplicates(store, threshold=NEAR, chunk_size=chunk_size)
    assert [[(p.id, p.cosine, p.copy_of) for p in group.images] for group in groups] == slow_duplicates(at, hashes)


def test_vector_that_is_no_number_hides_no_other(tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.lance", torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [1.0, 0.01], [0.0, 1.0]]))
    assert ids(find_duplicates(store)) == [["0000", "0002"]]


def test_long_chain_and_many_alike(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(3000)
    assert not join(np.arange(3000), order[:-1], order[1:]).any()
    store = make_store(tmp_path / "x.lance", torch.ones(3000, 2))  # 4.5 million pairs
    [group] = find_duplicates(store, chunk_size=512)
    assert len(group.images) == 3000


def test_found_on_real_images(store: Store) -> None:
    """The drawings of the tests, with a tower that has random weights: all pairs that a plain product finds."""
    cosines = store.vectors() @ store.vectors().T
    edges = [(i, j) for i, j in (cosines >= duplicates.THRESHOLD).nonzero().tolist() if i < j]
    labels = slow_components(len(store), edges)
    expected = {
        tuple(name for name, other in zip(store.column("id"), labels, strict=True) if other == label)
        for label in set(labels)
        if labels.count(label) > 1
    }
    assert {tuple(group) for group in ids(find_duplicates(store))} == expected


def test_a_path_will_do(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.lance", torch.eye(4)[[0, 0, 1]])
    assert find_duplicates(tmp_path / "a.lance") == find_duplicates(str(tmp_path / "a.lance")) == find_duplicates(store)
