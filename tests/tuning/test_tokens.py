from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_store

from lamplit.store import derived
from lamplit.store.caption_arrays import read_captions
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
