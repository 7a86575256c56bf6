from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import lance
import pytest
import torch

import lamplit
from lamplit.errors import StoreError, TowerError
from lamplit.evaluation.model_metadata import model_metadata
from lamplit.evaluation.text_vectors import TextVectors
from lamplit.model import LiT

TEXTS = ["a ring", "a red ring", "a cross", "a ring", ""]


@pytest.fixture
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path, towers="text")


def test_same_vectors_as_the_model_s_and_each_text_once(model: LiT, tmp_path: Path) -> None:
    kept = TextVectors(model, tmp_path)
    expected = model.encode_texts(TEXTS)
    assert torch.allclose(kept.encode(TEXTS), expected, atol=1e-5)  # other texts share their rows
    assert lance.dataset(str(kept.path)).count_rows() == 4
    assert torch.equal(kept.encode(["a cross", "a blue ring"])[0], kept.encode(["a cross"])[0])
    assert lance.dataset(str(kept.path)).count_rows() == 5


def test_known_texts_are_not_encoded_again(model: LiT, tmp_path: Path) -> None:
    first = TextVectors(model, tmp_path).encode(TEXTS)
    kept = TextVectors(model, tmp_path)
    kept.model = LiT(None, model.identity)  # cannot encode
    assert torch.equal(kept.encode(TEXTS), first)
    with pytest.raises(TowerError, match="without its text tower"):
        kept.encode(["a new one"])


def test_another_text_tower_has_vectors_of_its_own(model: LiT, tmp_path: Path) -> None:
    before = TextVectors(model, tmp_path)
    first = before.encode(TEXTS)
    with torch.no_grad():
        model.text_tower.head.bias += 0.1
    after = TextVectors(model, tmp_path)
    assert after.path != before.path
    assert not torch.allclose(after.encode(TEXTS), first, atol=1e-3)
    model.text_tower.context_length = 2
    assert TextVectors(model, tmp_path).path not in (before.path, after.path)


def test_use_of_a_tower_changes_no_fingerprint(model_path: Path, tmp_path: Path) -> None:
    """Its tokenizer remembers how it cut last."""
    fresh = lamplit.load(model_path, towers="text")
    before = TextVectors(fresh, tmp_path).fingerprint
    assert model_metadata(fresh, before) == model_metadata(fresh)
    fresh.encode_texts(["a ring", "a small red ring, and a cross"])
    assert TextVectors(fresh, tmp_path).fingerprint == before
    fresh.text_tower.count_truncated(["a ring " * 99])
    assert TextVectors(fresh, tmp_path).fingerprint == before


def test_several_encode_for_one_model_at_the_same_time(model: LiT, model_path: Path, tmp_path: Path) -> None:
    """Threads, because processes take half a minute; each has a model of its own, and meets the lock as they do."""
    several = [TextVectors(lamplit.load(model_path, towers="text"), tmp_path) for _ in range(4)]
    together = Barrier(len(several))

    def meet(*_: object) -> None:
        together.wait()

    for kept in several:
        kept.model.text_tower.register_forward_hook(meet)  # none writes before all have encoded
    with ThreadPoolExecutor(len(several)) as threads:
        found = list(threads.map(lambda kept: kept.encode(TEXTS), several))
    expected = model.encode_texts(TEXTS)
    assert all(torch.allclose(vectors, expected, atol=1e-5) for vectors in found)


def test_folder_that_a_killed_process_left_is_no_table(model: LiT, tmp_path: Path) -> None:
    kept = TextVectors(model, tmp_path)
    first = kept.encode(TEXTS)
    shutil.rmtree(kept.path / "_versions")
    shutil.rmtree(kept.path / "_transactions")
    assert torch.equal(kept.encode(TEXTS), first)
    assert lance.dataset(str(kept.path)).count_rows() == 4


def test_damaged_table_is_told(model: LiT, tmp_path: Path) -> None:
    kept = TextVectors(model, tmp_path)
    kept.encode(TEXTS)
    for file in (kept.path / "_versions").iterdir():
        file.write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be read; delete it, and its texts are encoded again"):
        kept.encode(TEXTS)
