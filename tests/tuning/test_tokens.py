from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_store

from lamplit.store import store_parts
from lamplit.store.arrays import derived
from lamplit.store.arrays.caption_arrays import read_captions
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.tokens import tokenize_captions

TEXTS = [["A small red circle.", "x"], [], ["a SMALL red circle."], ["Ein großer Kreis", "red " * 40], [" blue"]]


@pytest.mark.parametrize("small", [0, 1000])
def test_tokens_are_those_of_the_tower(
    text_folder: Path, tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "SMALL", small)
    captions = read_captions(write_store(tmp_path / "some.lance", torch.ones(5, 1), TEXTS))
    numbers = np.array([3, 0, 2], np.int32)
    folder = tmp_path / "some.lance" / derived.FOLDER
    for spec, length in ((f"hf:{text_folder}", 9), ("scratch:tiny", 6)):
        tower = open_text_tower(spec, width=4, texts=[text for row in TEXTS for text in row], context_length=length)
        tokens = tokenize_captions(captions, numbers, tower)
        texts = captions.take(numbers)
        assert (len(tokens), list(tokens)) == (3, tower.tokenize(texts))
        assert tokens[1:] == tower.tokenize(texts[1:])
        assert tokens.take(torch.tensor([2, 2, 0])) == tower.tokenize([texts[2], texts[2], texts[0]])
        assert tokens.count_cut() == tower.count_truncated(texts) == 1
        again = tokenize_captions(captions, numbers[:1], tower)
        assert list(again) == tower.tokenize(texts[:1])
        if small == 0:  # those of one tokenizer are kept
            assert len([file for file in folder.iterdir() if "-tokens-" in file.name]) == 1


@pytest.mark.parametrize("small", [0, 1000])
def test_tokens_of_a_store_in_parts(
    text_folder: Path, tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "SMALL", small)
    monkeypatch.setattr(store_parts, "FULL", 3)
    store = write_store(tmp_path / "some.lance", torch.ones(5, 1), TEXTS)
    store.append([Row(name, "p", name, [text], torch.ones(1)) for name, text in (("0", "X"), ("a", "new"))])
    store.append([Row(name, "p", name, ["one red " * 9, " Blue"], torch.ones(1)) for name in ("00002b", "1", "b")])
    assert [len(part) for part in store.parts] == [8, 2]
    tower = open_text_tower(f"hf:{text_folder}", width=4, texts=["red"], context_length=9)
    for opened in (store, Store(store.path)):
        captions = read_captions(opened)
        numbers = np.arange(len(captions.hashes), dtype=np.int32)[::-1].copy()
        tokens = tokenize_captions(captions, numbers, tower)
        texts = captions.take(numbers)
        assert list(tokens) == tower.tokenize(texts)
        assert tokens.take(torch.tensor([2, 6, 2, 0])) == tower.tokenize([texts[i] for i in (2, 6, 2, 0)])
        assert tokens.count_cut() == tower.count_truncated(texts) == 2
    made = {file: file.stat().st_mtime_ns for file in Path(store.path).glob(f"{derived.FOLDER}/*/flat.npy")}
    assert len(made) == (2 if small == 0 else 0)
    store.append([Row("c", "p", "c", ["even newer"], torch.ones(1))])
    captions = read_captions(store)
    numbers = np.arange(len(captions.hashes), dtype=np.int32)
    assert list(tokenize_captions(captions, numbers, tower)) == tower.tokenize(captions.take(numbers))
    assert sum(file.exists() and file.stat().st_mtime_ns == time for file, time in made.items()) == len(made) // 2
