"""Texts of one column of a store, and of several together."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import write_store

from lamplit.errors import StoreError
from lamplit.store.arrays.caption_arrays import read_captions
from lamplit.store.lance_store import Store
from lamplit.store.table.text_cells import column_names, read_columns

GERMAN, SPANISH = ["ein Hut", None, " ", "Taxi"], ["un sombrero", "un sol", None, "Taxi"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    rows = [{"german": german, "spanish": spanish} for german, spanish in zip(GERMAN, SPANISH, strict=True)]
    return write_store(tmp_path / "four.lance", torch.eye(4), [["a hat"], ["a sun"], [], ["taxi"]], rows)


def test_column_whose_name_has_a_comma_is_one() -> None:
    assert column_names("a, b", ["a", "b"]) == ["a", "b"]
    assert column_names("a,b", ["a", "b", "a,b"]) == ["a,b"]


def test_row_has_the_texts_of_one_column_after_the_other_and_each_once() -> None:
    texts, counts = read_columns({"german": pa.array(GERMAN), "spanish": pa.array(SPANISH)}, "four.lance")
    assert texts == ["ein Hut", "un sombrero", "un sol", "Taxi"]
    assert counts.tolist() == [2, 1, 0, 1]


def test_store_reads_several_columns(store: Store) -> None:
    assert store.texts("texts,german") == [["a hat", "ein Hut"], ["a sun"], [], ["taxi", "Taxi"]]
    with pytest.raises(StoreError, match="has no column 'geman'; it has: german"):
        store.texts("texts,geman")


def test_captions_of_several_columns(store: Store) -> None:
    captions = read_captions(store, "texts,german")
    assert captions.rows.tolist() == [0, 0, 1, 3, 3]
    assert captions.take(captions.index) == ["a hat", "ein Hut", "a sun", "taxi", "taxi"]  # case makes no difference
    assert [texts for texts, _ in captions.batches()] == [["a hat", "ein Hut", "a sun", "taxi"]]
    with pytest.raises(StoreError, match="has no column 'geman'"):
        read_captions(store, "texts,geman")
