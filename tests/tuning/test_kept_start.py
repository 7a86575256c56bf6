"""The start of a run that begins like one before is read, and is the same to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lamplit.store.arrays import derived
from lamplit.store.lance_store import Store
from lamplit.tuning.head import head_fit, left_out
from lamplit.tuning.head.kept_start import fit_or_read, start_key
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings


@pytest.fixture
def large_path(words_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the store of words, and take it for a large one, with pairs enough to leave texts out."""
    monkeypatch.setattr(derived, "SMALL", 10)
    monkeypatch.setattr(left_out, "MANY_PAIRS", 100)
    shutil.copytree(words_path, tmp_path / "words.lance")
    return tmp_path / "words.lance"


def made(text_folder: Path, **changes: Any) -> TuneSettings:
    values = {"text_tower": f"hf:{text_folder}", "lr": 1e-3, "batch_size": 48, "steps": 4, "num_evals": 2}
    return TuneSettings(**values | changes)


def ended(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "pairs_per_second")
    told = [{key: value for key, value in line.items() if key not in times} for line in lines]
    return (out / "checkpoints" / "last.safetensors").read_bytes(), told


def starts_of(store: Path) -> list[str]:
    return sorted(each.name for each in (store / "_search").glob("*-start-*"))


def test_second_run_reads_the_start_and_ends_in_the_same_bytes(
    large_path: Path, words_path: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(large_path, tmp_path / "first", made(text_folder))
    [kept] = starts_of(large_path)
    fitted = []
    fit = head_fit.fit_scale_apart
    monkeypatch.setattr(head_fit, "fit_scale_apart", lambda *given: fitted.append(1) or fit(*given))
    tune(large_path, tmp_path / "second", made(text_folder))
    tune(large_path, tmp_path / "other", made(text_folder, lr=3e-4, batch_size=32))
    assert not fitted
    assert starts_of(large_path) == [kept]
    assert ended(tmp_path / "second") == ended(tmp_path / "first")
    start, other = (ended(tmp_path / name)[1][0] for name in ("first", "other"))
    assert start == other
    assert start["held_out"]["mean_recall"] > 0
    shutil.rmtree(large_path / "_search")
    tune(large_path, tmp_path / "again", made(text_folder))
    assert fitted == [1]
    assert ended(tmp_path / "again") == ended(tmp_path / "first")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"head": "linear"}, {"loss": "sigmoid"}, {"val_fraction": 0.3}, {"text_column": "german"},
        {"context_length": 3},
    ],
    ids=str,
)  # fmt: skip
def test_another_start_is_fitted_anew(
    changes: dict[str, Any], large_path: Path, text_folder: Path, tmp_path: Path
) -> None:
    tune(large_path, tmp_path / "first", made(text_folder, steps=1))
    [kept] = starts_of(large_path)
    tune(large_path, tmp_path / "second", made(text_folder, steps=1, **changes))
    [other] = starts_of(large_path)
    assert other != kept, "and takes the place of the one before"


def test_small_store_keeps_the_start_of_many_pairs(
    words_path: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "words.lance"
    shutil.copytree(words_path, store)
    tune(store, tmp_path / "few", made(text_folder, steps=0))
    assert not starts_of(store)
    monkeypatch.setattr(head_fit, "KEPT_PAIRS", 100)
    first = tune(store, tmp_path / "many", made(text_folder, steps=0))
    assert len(starts_of(store)) == 1
    monkeypatch.setattr(head_fit, "fit_scale_apart", None)
    assert tune(store, tmp_path / "again", made(text_folder, steps=1)).start == first.start


def test_random_numbers_go_on_as_after_the_fit(words_path: Path) -> None:
    tensor, store = torch.zeros(3, 2), Store(words_path)

    def fit() -> dict[str, float]:
        tensor.copy_(torch.rand(3, 2))
        return {"recall": 0.25}

    torch.manual_seed(0)
    key = start_key("a", torch.ones(2))
    assert fit_or_read(store, key, [tensor], fit) == {"recall": 0.25}
    after = torch.rand(4)
    torch.manual_seed(0)
    assert start_key("a", torch.ones(2)) == key
    expected = torch.rand(3, 2)
    assert torch.equal(tensor, expected)
    assert torch.equal(after, torch.rand(4))


def test_fit_is_made_once_and_its_errors_are_its_own(
    words_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(words_path, tmp_path / "words.lance")
    (tmp_path / "words.lance" / "_search").touch()  # a file where the folder would be: the next one is taken
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path / "cache"))
    store, tensor, calls = Store(tmp_path / "words.lance"), torch.zeros(3), []

    def fit() -> dict[str, float]:
        calls.append(1)
        tensor.add_(1)
        return {}

    def fail() -> dict[str, float]:
        calls.append(1)
        raise ConnectionResetError("the store is far away")

    fit_or_read(store, start_key("a"), [tensor], fit, keeps=True)
    assert tensor.tolist() == [1, 1, 1]
    assert len(list((tmp_path / "cache" / "search").rglob("tensor0.npy"))) == len(calls) == 1
    with pytest.raises(ConnectionResetError):
        fit_or_read(store, start_key("b"), [tensor], fail, keeps=True)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["tensor0", "random_state", "metrics", "digest"])
def test_damaged_start_is_fitted_anew(name: str, words_path: Path, tmp_path: Path) -> None:
    shutil.copytree(words_path, tmp_path / "words.lance")
    store, key = Store(tmp_path / "words.lance"), start_key("a")
    tensor = torch.zeros(100)
    for turn, expected in enumerate((0.0, 1.0, 1.0)):  # fitted, fitted anew since it is damaged, and read

        def fit(turn: float = turn) -> dict[str, float]:
            tensor.fill_(turn)
            return {"recall": turn}

        assert fit_or_read(store, key, [tensor], fit, keeps=True) == {"recall": expected}
        assert tensor.tolist() == [expected] * 100
        if turn == 0:
            [file] = (tmp_path / "words.lance" / "_search").rglob(f"{name}.npy")
            content = file.read_bytes()
            file.write_bytes(content[:-4] + bytes(byte ^ 1 for byte in content[-4:]))


def test_key_depends_on_all() -> None:
    torch.manual_seed(0)
    values = torch.arange(6)
    keys = [
        start_key("a", values), start_key("b", values), start_key("a", values + 1),
        start_key("a", values.reshape(2, 3)), start_key("a", values.float()), start_key("a", "", values),
        start_key("a"), start_key("a", values[:0]), start_key("a", values[:1].expand(6)),
    ]  # fmt: skip
    torch.manual_seed(1)
    keys.append(start_key("a", values))
    assert len(set(keys)) == len(keys)
