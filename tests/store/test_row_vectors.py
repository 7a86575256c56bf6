from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_store

from lamplit.store.arrays import derived
from lamplit.store.arrays.row_vectors import read_vectors
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store whose table is not in the order of its ids."""
    vectors = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    made = write_store(tmp_path / "some.lance", vectors, [[str(i)] for i in range(30)])
    made.append([Row("00007b", "p", "h", ["new"], torch.ones(5) / 5**0.5)])
    return made


@pytest.mark.parametrize("small", [0, 1000])
def test_vectors_are_those_of_the_store_to_the_bit(store: Store, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "SMALL", small)
    found, rows = read_vectors(store), torch.tensor([3, 30, 8, 0, 3, 29])
    assert isinstance(found.halves, np.memmap) == (small == 0)
    assert len(found) == 31
    assert (found[rows] == store.vectors()[rows]).all()
    assert found[rows[:0]].shape == (0, 5)
    assert (read_vectors(Store(store.path))[rows.int()] == found[rows]).all()
    center = store.vectors().mean(0)
    assert (read_vectors(store, center)[rows] == store.vectors(center)[rows]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in memory")
def test_rows_that_are_expected_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "SMALL", 0)
    made = write_store(tmp_path / "a.lance", torch.randn(30_000, 64), [["a"]] * 30_000)
    found = read_vectors(made)
    assert isinstance(found.halves, np.memmap)
    with open(found.halves.filename, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(found.halves, 0):
        pytest.skip("this system does not forget files")
    found.expect(20_000, 20_255)
    time.sleep(0.5)
    assert resident(found.halves, 20_000)
    assert resident(found.halves, 20_255)
    assert not resident(found.halves, 0)
    read_vectors(Store(made.path)).expect(29_744, 29_999)


def resident(halves: np.memmap[Any, Any], row: int) -> bool:
    """Ask the system whether a row's page is in memory."""
    libc, mark = ctypes.CDLL(None, use_errno=True), (ctypes.c_ubyte * 1)()
    address = halves[row].ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mark) == 0
    return bool(mark[0] & 1)


def test_digest_knows_rows_and_not_their_order(store: Store, tmp_path: Path) -> None:
    digest = read_vectors(store).digest
    other = write_store(tmp_path / "other.lance", store.vectors(), [[""]] * 31)
    # The vectors are made unit again, and stored in half precision, so few of them change.
    same = np.array_equal(read_vectors(other).halves, read_vectors(store).halves)
    assert (read_vectors(other).digest == digest) == same
    store.replace([Row("00003", "p", "h", ["x"], torch.ones(5) / 5**0.5)])
    assert read_vectors(store).digest != digest
