from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.data.caption_hash import hash_captions, hash_names
from lamplit.store import store_parts
from lamplit.store.arrays import derived
from lamplit.store.arrays.caption_arrays import Captions, CaptionTexts, read_captions, seeded_hashes
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.identity import TowerIdentity

WORDS = st.sampled_from(["a frog", "A Frog ", "dog", "cat", " ", "", "straße", "STRASSE", "owl"])


def slow_pairs(store: Store) -> list[tuple[int, str]]:
    """The pairs of a store, one after the other."""
    return [(row, text) for row, texts in enumerate(store.texts()) for text in texts]


def require_slow_ones(captions: Captions, store: Store) -> None:
    """Compare with what dictionaries and lists give."""
    pairs = slow_pairs(store)
    firsts: dict[str, str] = {}
    for _, text in pairs:
        firsts.setdefault(text.casefold(), text)
    places = {folded: place for place, folded in enumerate(firsts)}
    assert captions.rows.tolist() == [row for row, _ in pairs]
    assert captions.index.tolist() == [places[text.casefold()] for _, text in pairs]
    assert captions.take(np.arange(len(firsts))) == list(firsts.values())
    assert captions.hashes.tolist() == hash_captions(firsts.values()).tolist()
    assert seeded_hashes(captions, 7).tolist() == hash_captions(firsts.values(), 7).tolist()
    assert captions.contents.tolist() == hash_names(store.column("hash")).tolist()
    equal = captions.contents[:, None] == captions.contents
    assert ((captions.images[:, None] == captions.images) == equal).all()
    streamed = {int(number): text for texts, numbers in captions.batches() for text, number in zip(texts, numbers)}  # noqa: B905
    assert [streamed[number] for number in range(len(firsts))] == list(firsts.values())
    chosen = np.arange(len(firsts), dtype=np.int32)[::2]
    assert list(CaptionTexts(captions, chosen)) == list(firsts.values())[::2]
    assert list(CaptionTexts(captions, chosen[::-1])) == list(firsts.values())[::2][::-1]


@given(st.lists(st.lists(WORDS, max_size=3), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_captions_are_the_slow_ones(texts: list[list[str]], random: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = [f"hash{i % 5}" for i in range(len(texts))]
        store = write_store(Path(folder) / "some.lance", torch.ones(len(texts), 1), texts, hashes=names)
        first = read_captions(store)
        require_slow_ones(first, store)
        one = torch.ones(1)
        # Ids that sort before the others, between and after them, are appended: the table is no longer in order.
        store.append([Row(name, "p", "h", ["new", "dog"], one) for name in ("00000b", "0", "a")])
        again = read_captions(store)
        require_slow_ones(again, store)
        assert again.digest != first.digest


@pytest.mark.parametrize("small", [0, 4, 1000])
def test_captions_in_parts_are_the_slow_ones(small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption is in several parts, written in capitals in some, and its first pair is now here and now there."""
    monkeypatch.setattr(derived, "SMALL", small)
    monkeypatch.setattr(store_parts, "FULL", 6)
    words, vector, random = ["a frog", "A FROG", "dog", "Dog", "owl", "straße", "STRASSE", ""], torch.ones(1), Random(0)
    ids = random.sample(range(100), 35)
    texts = [[random.choice(words) for _ in range(random.randrange(3))] for _ in ids]
    rows = [Row(f"{i:03}", "p", f"hash{i % 9}", said, vector) for i, said in zip(ids, texts, strict=True)]
    path = tmp_path / "some.lance"
    tower = TowerIdentity.of_imported("acme", 1)
    store = Store.create(path, tower, rows[:6], backend="imported", metadata_columns=[])
    for start, stop in ((6, 8), (8, 16), (16, 26), (26, 30)):
        store.append(rows[start:stop])
    assert [len(part) for part in store.parts] == [14, 10, 6]
    before = read_captions(store)
    require_slow_ones(before, store)
    kept = {file: file.stat().st_mtime_ns for file in path.glob(f"{derived.FOLDER}/*-said-*/*.npy")}
    assert len(kept) == {0: 12, 4: 12, 1000: 0}[small]
    store.append(rows[30:35])
    assert [len(part) for part in store.parts] == [14, 10, 11]
    require_slow_ones(read_captions(Store(path)), Store(path))
    still = [file for file, made in kept.items() if file.exists() and file.stat().st_mtime_ns == made]
    assert len(still) == len(kept) * 2 // 3, "those of two parts, of three"
    monkeypatch.setattr(store_parts, "FULL", 1000)
    whole = read_captions(Store(path))
    require_slow_ones(whole, store)
    monkeypatch.setattr(store_parts, "FULL", 6)
    assert read_captions(Store(path)).digest == whole.digest


def test_files_of_a_large_store_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [[f"caption {i // 2}", f"own {i}"] for i in range(40)]
    store = write_store(tmp_path / "some.lance", torch.ones(40, 2), texts)
    in_memory = read_captions(store)
    assert not (Path(store.path) / derived.FOLDER).exists()
    monkeypatch.setattr(derived, "SMALL", 0)
    made = read_captions(store)
    require_slow_ones(made, store)
    assert isinstance(made.index, np.memmap)
    assert made.digest == in_memory.digest
    files = {file: file.stat().st_mtime_ns for file in (Path(store.path) / derived.FOLDER).rglob("*.npy")}
    assert read_captions(Store(store.path)).digest == made.digest
    seeded_hashes(made, 7)
    assert {file: file.stat().st_mtime_ns for file in files} == files, "nothing is made twice"
    # Another seed takes the place of the first, a damaged file is made anew, and a store that has grown has others.
    seeded_hashes(made, 8)
    names = sorted(folder.name for folder in (Path(store.path) / derived.FOLDER).iterdir())
    assert [name.split("-", 1)[1] for name in names] == [f"captions-{made.key}", "ids", f"order-{made.key}-8"]
    file = Path(store.path) / derived.FOLDER / names[0] / "index.npy"
    file.write_bytes(file.read_bytes()[:200])
    require_slow_ones(read_captions(store), store)
    store.append([Row("00003b", "p", "h", ["new"], torch.ones(2))])
    require_slow_ones(read_captions(store), store)
    left = {folder.name.split("-")[0] for folder in (Path(store.path) / derived.FOLDER).iterdir()}
    assert left == {store.version_digest}


def test_captions_are_read_where_no_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "some.lance", torch.ones(3, 2), [["a"], [], ["b", "A"]])
    monkeypatch.setattr(derived, "SMALL", 0)
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path / "cache"))
    (Path(store.path) / derived.FOLDER).write_text("in the way")
    require_slow_ones(read_captions(store), store)
