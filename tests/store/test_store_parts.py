from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_store
from hypothesis import given
from hypothesis import strategies as st

from lamplit.store import store_parts
from lamplit.store.arrays import derived
from lamplit.store.arrays.row_vectors import places, read_rows, read_vectors
from lamplit.store.lance_store import Store
from lamplit.store.store_parts import FULL, Part, split
from lamplit.store.table.rows import Row


def fragment(number: int, size: int, deleted: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        fragment_id=number,
        physical_rows=size,
        num_deletions=deleted,
        data_files=lambda: [SimpleNamespace(path=f"{number}.lance")],
        deletion_file=lambda: f"{deleted} of {number}" if deleted else None,
    )


@given(st.lists(st.integers(0, 2 * FULL), max_size=40))
def test_parts_hold_every_fragment_once(sizes: list[int]) -> None:
    fragments = [fragment(number, size) for number, size in enumerate(sizes)]
    found = split(fragments)
    numbers = [each.fragment_id for part in found for each in part.fragments]
    assert sorted(numbers) == [number for number, size in enumerate(sizes) if size]
    assert sum(map(len, found)) == sum(sizes)
    full = [size >= FULL for size in sizes if size]
    assert len(found) == max(1, bin(sum(full)).count("1") + (not all(full)))
    assert len({part.digest for part in found}) == len(found)


@given(st.integers(0, 60))
def test_few_rows_are_derived_again_when_a_store_grows(count: int) -> None:
    """On the way to so many full fragments, each is in as many parts as the number has binary digits, at most."""
    seen: dict[str, Part] = {}
    for number in range(1, count + 1):
        seen |= {part.digest: part for part in split([fragment(each, FULL) for each in range(number)])}
    assert sum(len(part.fragments) for part in seen.values()) <= count * count.bit_length()


def test_a_deleted_row_changes_the_part_that_it_was_in() -> None:
    before = split([fragment(number, FULL) for number in range(3)])
    after = split([fragment(number, FULL, deleted=int(number == 2)) for number in range(3)])
    assert [len(part.fragments) for part in before] == [2, 1]
    assert before[0].digest == after[0].digest
    assert before[1].digest != after[1].digest
    assert len(after[1]) == FULL - 1


def test_what_a_newer_store_needs_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that opened a store before it grew derives for itself, and deletes nothing of others."""
    monkeypatch.setattr(derived, "SMALL", 2)
    older = write_store(tmp_path / "some.lance", torch.eye(5), [["a"]] * 5)
    newer = Store(older.path)
    newer.append([Row("later", "p", "later", ["b"], torch.ones(5) / 5**0.5)])

    def kept() -> set[str]:
        return {each.name.split("-")[0] for each in (tmp_path / "some.lance" / "_search").iterdir()}

    for store in (newer, older):
        read_vectors(store)
    of_newer = {part.digest for part in newer.parts}
    assert kept() == of_newer | {part.digest for part in older.parts}
    derived.remove_stale_files(tmp_path / "some.lance" / "_search", newer)
    assert kept() == of_newer


@pytest.fixture
def in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of which two fragments are full, and ids that do not ascend."""
    monkeypatch.setattr(store_parts, "FULL", 10)
    random = torch.Generator().manual_seed(0)
    store = write_store(tmp_path / "some.lance", torch.randn(30, 5, generator=random), [["a"]] * 30)
    for first, count in ((100, 4), (50, 12)):
        vectors = torch.nn.functional.normalize(torch.randn(count, 5, generator=random), dim=1)
        store.append([Row(f"{first - 2 * i:05}+", "p", f"{first} {i}", ["b"], vectors[i]) for i in range(count)])
    return store


@pytest.mark.parametrize("small", [0, 13, 1000])
def test_vectors_in_parts_are_those_of_the_store(
    in_parts: Store, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "SMALL", small)
    found, rows = read_vectors(in_parts), torch.tensor([3, 45, 8, 0, 3, 29, 30])
    assert len(found.files) == {0: 2, 13: 1, 1000: 0}[small], "of parts that are small there are none"
    assert [len(part) for part in in_parts.parts] == [42, 4]
    assert (found[torch.arange(46)] == in_parts.vectors()).all()
    assert (found[rows] == in_parts.vectors()[rows]).all()
    assert found[rows[:0]].shape == (0, 5)
    assert (found.halves[5:20] == found.halves[np.arange(5, 20)]).all()
    monkeypatch.setattr(store_parts, "FULL", 1000)
    whole = read_vectors(Store(in_parts.path))
    assert whole.digest == found.digest, "the vectors are the same, wherever they lie"
    assert (whole[rows] == found[rows]).all()


def test_places_of_a_part_are_those_of_its_rows(in_parts: Store) -> None:
    ids = in_parts.column("id")
    for part, rows in zip(in_parts.parts, read_rows(in_parts), strict=True):
        assert rows is not None
        there = [name for batch in in_parts.batches("id", fragments=part.fragments) for name in batch["id"].to_pylist()]
        assert [ids[row] for row in rows.tolist()] == sorted(there)
        assert [ids[row] for row in rows[places(in_parts, part, rows)].tolist()] == there


def test_rows_of_several_files_can_be_expected(in_parts: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "SMALL", 0)
    found = read_vectors(in_parts)
    assert found.nbytes == sum(file.nbytes for _, file in found.files) == 46 * 5 * 2
    for first, last in ((0, 45), (45, 45), (0, 0), (10, 12)):
        found.expect(first, last)
