from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from lamplit.data.caption_hash import hash_captions, hash_names
from lamplit.data.split_record import PARTS, SplitRecord
from lamplit.errors import StoreError, UsageError
from lamplit.store.arrays.caption_arrays import read_captions, seeded_hashes
from lamplit.store.lance_store import Store
from lamplit.tuning import split
from lamplit.tuning.split import Links, Split, _fill, content_hashes, held_out_recall, link, split_captions, split_store

TEXTS = [
    ["A frog.", "Green animal"],
    ["a FROG."],
    [],
    ["A dog.", "a pet", "A frog."],
    ["A cat.", "A PET"],
    ["Bird"],
    ["Boat", "green ANIMAL"],
    ["Tree", "Boat"],
    ["tree", "bird"],
    ["Cup"],
    ["Plate"],
    ["Spoon", "cup"],
]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Store:
    vectors = torch.randn(len(TEXTS), 4, generator=torch.Generator().manual_seed(0))
    metadata = [{"german": "Ding" if i % 2 else None, "number": i} for i in range(len(TEXTS))]
    return write_store(tmp_path_factory.mktemp("store") / "made_up.lance", vectors, TEXTS, metadata)


def split_of(
    texts: list[list[str]],
    fraction: float,
    seed: int,
    test_fraction: float = 0.0,
    hashes: list[str] | None = None,
    base: SplitRecord | None = None,
) -> Split:
    """Split a store of these texts; the ids sort as the rows do."""
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "some.lance", torch.ones(len(texts), 1), texts, hashes=hashes or [])
        captions = read_captions(store)
        found = split_captions(captions, seeded_hashes(captions, seed), fraction, test_fraction, base)
        # The store is gone when they are read.
        return replace(found, train=replace(found.train, texts=list(found.train.texts)))


def pairs_of(links: Links) -> list[tuple[int, str]]:
    return [(row, links.texts[i]) for row, i in zip(links.image_index.tolist(), links.text_index.tolist(), strict=True)]


def test_link_joins_texts_that_differ_in_case_only() -> None:
    links = link([7, 8, 9], [["A frog.", "frog"], [], ["a FROG."]])
    assert links.texts == ["A frog.", "frog"]
    assert pairs_of(links) == [(7, "A frog."), (7, "frog"), (9, "A frog.")]
    assert len(links) == 3


def contents_of(store: Store, links: Links) -> set[int]:
    return set(content_hashes(store)[links.image_index.numpy()].tolist())


def captions_of(links: Links) -> set[str]:
    return {text.casefold() for text in links.texts}


def test_link_joins_rows_of_one_content() -> None:
    links = link([7, 8, 9], [["a"], ["b", "A"], ["c"]], np.array([5, 5, 6], np.uint64))
    assert pairs_of(links) == [(7, "a"), (7, "b"), (9, "c")]


@pytest.mark.parametrize("seed", range(8))
def test_parts_share_no_caption_and_no_image(made_up: Store, seed: int) -> None:
    found = split_store(made_up, "texts", 0.3, seed, 0.2)
    parts = [found.train, found.held_out, found.test]
    for first, second in itertools.combinations(parts, 2):
        assert not captions_of(first) & captions_of(second)
        assert not contents_of(made_up, first) & contents_of(made_up, second)
    # Most of these captions are linked, so they are held out one by one, and pairs between the parts are dropped.
    distinct = len({text.casefold() for texts in TEXTS for text in texts})
    assert len(found.held_out.texts) == round(0.3 * distinct)
    assert sum(map(len, parts)) + found.dropped == sum(map(len, TEXTS))
    if found.dropped:
        assert f"{found.dropped} pairs are left out" in found.warnings[-1]


@st.composite
def collections(draw: st.DrawFn) -> tuple[list[list[str]], list[str]]:
    """Texts and contents of the rows of a store, some of them equal."""
    size = draw(st.integers(4, 60))
    captions = st.integers(0, draw(st.sampled_from([size // 3, 4 * size]))).map("caption {}".format)
    texts = draw(st.lists(st.lists(captions, max_size=3), min_size=size, max_size=size))
    contents = st.integers(0, draw(st.sampled_from([size // 2, 9 * size]))).map("content {}".format)
    return texts, draw(st.lists(contents, min_size=size, max_size=size))


def contents_among(contents: NDArray[np.uint64], links: Links) -> set[int]:
    return set(contents[links.image_index.numpy()].tolist())


@given(collections(), st.sampled_from([0.0, 0.1, 0.2, 0.5]), st.sampled_from([0.0, 0.1, 0.2]), st.integers(0, 9))
@settings(max_examples=60)
def test_any_split_leaks_nothing(
    made: tuple[list[list[str]], list[str]], fraction: float, test_fraction: float, seed: int
) -> None:
    texts, names = made
    contents = hash_names(names)
    found = split_of(texts, fraction, seed, test_fraction, names)
    parts = [found.train, found.held_out, found.test]
    for first, second in itertools.combinations(parts, 2):
        assert not captions_of(first) & captions_of(second)
        assert not contents_among(contents, first) & contents_among(contents, second)
    distinct = len({text for row in texts for text in row})
    assert len(found.held_out.texts) <= round(fraction * distinct)
    assert len(found.test.texts) <= round(test_fraction * distinct)
    for part, links in zip(PARTS, parts, strict=True):
        assert found.record.captions(part).tolist() == sorted(hash_captions(links.texts).tolist())
        assert found.record.contents(part).tolist() == sorted(contents_among(contents, links))
    # The same images in another order are split in the same way.
    order = np.random.default_rng(seed).permutation(len(texts))
    again = split_of([texts[i] for i in order], fraction, seed, test_fraction, [names[i] for i in order])
    for part in PARTS:
        assert np.array_equal(again.record.captions(part), found.record.captions(part))
        assert np.array_equal(again.record.contents(part), found.record.contents(part))


@given(collections(), collections(), st.sampled_from([0.2, 0.5]), st.integers(0, 9))
@settings(max_examples=60)
def test_what_was_tuned_on_before_is_never_held_out(
    first: tuple[list[list[str]], list[str]], second: tuple[list[list[str]], list[str]], fraction: float, seed: int
) -> None:
    base = split_of(first[0], fraction, seed, hashes=first[1]).record
    contents = hash_names(second[1])
    found = split_of(second[0], fraction, seed, 0.2, second[1], base)
    for part, links in (("held_out", found.held_out), ("test", found.test)):
        assert not {*hash_captions(links.texts).tolist()} & {*base.captions("train").tolist()}, part
        assert not contents_among(contents, links) & {*base.contents("train").tolist()}, part
    assert not captions_of(found.held_out) & captions_of(found.train)
    both = found.record.after(base)
    assert {*both.captions("train").tolist()} == {*found.record.captions("train"), *base.captions("train")}
    assert {*both.contents("train").tolist()} == {*found.record.contents("train"), *base.contents("train")}
    assert np.array_equal(both.captions("held_out"), found.record.captions("held_out"))


def test_number_of_held_out_captions_is_exact_without_links() -> None:
    texts = [[f"caption {i}"] for i in range(137)]
    found = split_of(texts, 0.2, 5, 0.1)
    assert (len(found.held_out.texts), len(found.test.texts), found.dropped) == (27, 14, 0)
    assert split_of(texts, 0.2, 5).held_out.texts == found.held_out.texts, "a test leaves the held-out part as it is"


def test_held_out_captions_of_a_seed_never_change() -> None:
    """Every figure on held-out captions depends on it: these must stay."""
    found = split_of([[f"caption {i}"] for i in range(40)], 0.1, 0)
    assert found.held_out.texts == ["caption 8", "caption 28", "caption 36", "caption 38"]


def test_split_depends_on_the_seed(made_up: Store) -> None:
    splits = [split_store(Store(made_up.path), "texts", 0.4, seed).held_out.texts for seed in (0, 0, 1, 2, 3)]
    assert splits[0] == splits[1]
    assert any(other != splits[0] for other in splits[2:])


def test_linked_captions_and_images_stay_together() -> None:
    """Twenty groups of three images that share a caption, each with one of its own."""
    texts = [[f"group {i // 3}", f"own {i}"] for i in range(60)]
    found = split_of(texts, 0.25, 1)
    assert (found.dropped, len(found.held_out.texts)) == (0, 20)
    groups = {row // 3 for row in found.held_out.image_index.tolist()}
    assert len(groups) == 5
    assert {row // 3 for row in found.train.image_index.tolist()} == set(range(20)) - groups


def test_what_would_be_too_many_is_passed_over() -> None:
    sizes = np.array([5, 3, 1, 4, 1, 1, 1])
    assert _fill(sizes, 7).nonzero()[0].tolist() == [0, 2, 4]
    assert _fill(sizes, 100).all()
    assert not _fill(sizes, 0).any()
    assert not _fill(np.array([5, 5]), 4).any()


def test_copies_of_an_image_are_one_image(tmp_path: Path) -> None:
    """500 images twice, each copy with another caption: a perfect text tower is perfect."""
    vectors = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    texts = [[f"caption {i % 500} {'ab'[i // 500]}"] for i in range(1000)]
    store = write_store(tmp_path / "twice.lance", vectors, texts, hashes=[f"{i % 500}" for i in range(1000)])
    found = split_store(store, "texts", 0.2, 0)
    assert not contents_of(store, found.train) & contents_of(store, found.held_out)
    assert (len(found.held_out.texts), len(found.held_out.image_index.unique())) == (200, 100)
    for links in (found.held_out, link(range(1000), texts, content_hashes(store))):
        perfect = F.normalize(torch.stack([vectors[int(text.split()[1])] for text in links.texts]), dim=-1)
        recalls = held_out_recall(store.vectors(), perfect, links)
        assert {value for name, value in recalls.items() if "recall" in name} == {1.0}


def test_class_that_vanishes_is_warned_of() -> None:
    texts = [[f"a {color} thing"] for color in ("red", "blue", "green", "black", "white") for _ in range(4)]
    found = split_of(texts, 0.2, 0)
    [warning] = found.warnings
    assert f"the model never reads them: {found.held_out.texts[0]!r} (4 images). If captions" in warning
    [warning] = split_of(texts[:8], 0.2, 0).warnings
    assert warning.startswith("nothing is held out: no linked captions fit 0.2 of 2 distinct captions")


def test_fraction_of_zero_holds_nothing_out(made_up: Store) -> None:
    found = split_store(made_up, "texts", 0.0, 0)
    assert (found.held_out.texts, found.test.texts, len(found.held_out), found.warnings) == ([], [], 0, [])
    assert len(found.train) == sum(map(len, TEXTS))


def test_held_out_captions_have_a_limit(made_up: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split.MAX_HELD_OUT == 5000
    monkeypatch.setattr(split, "MAX_HELD_OUT", 2)
    found = split_store(made_up, "texts", 0.5, 0, 0.3)
    assert (len(found.held_out.texts), len(found.test.texts) <= 2) == (2, True)


def test_images_of_one_caption_are_too_few(tmp_path: Path) -> None:
    store = write_store(tmp_path / "one.lance", torch.eye(3), [["A frog."], [], []])
    with pytest.raises(UsageError, match=r"has 1 pairs to tune on in column 'texts' \(1 of 3 images have a text"):
        split_store(store, "texts", 0.2, 0)


def test_store_without_texts_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "none.lance", torch.eye(3), [[], [], []])
    with pytest.raises(UsageError, match="has 0 pairs to tune on"):
        split_store(store, "texts", 0.2, 0)


def test_columns(made_up: Store) -> None:
    found = split_store(made_up, "german", 0.0, 0)
    assert (list(found.train.texts), len(found.train), len(found.held_out)) == (["Ding"], 6, 0)
    with pytest.raises(StoreError, match=r"no column 'french'; it has: .*german"):
        split_store(made_up, "french", 0.2, 0)
    with pytest.raises(StoreError, match=r"'number' .* holds no text"):
        split_store(made_up, "number", 0.2, 0)


@given(
    links=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50)
def test_recall_is_the_slow_ones(links: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zimg = F.normalize(torch.randn(10, 6, generator=generator), dim=-1)
    named = {text: place for place, text in enumerate(sorted({text for _, text in links}))}
    ztxt = F.normalize(torch.randn(len(named), 6, generator=generator), dim=-1)
    pairs = [(row, named[text]) for row, text in links]
    found = held_out_recall(
        zimg,
        ztxt,
        Links(["text"] * len(named), torch.tensor([row for row, _ in pairs]), torch.tensor([i for _, i in pairs])),
    )
    rows = sorted({row for row, _ in pairs})
    recalls = []
    for k in (1, 5, 10):
        hits = []
        for row in rows:
            best = sorted(range(len(ztxt)), key=lambda i: -float(zimg[row] @ ztxt[i]))[:k]
            hits.append(any((row, i) in pairs for i in best))
        assert found[f"image_to_text/recall@{k}"] == pytest.approx(sum(hits) / len(hits))
        recalls.append(sum(hits) / len(hits))
        hits = []
        for i in range(len(ztxt)):  # only images that are held out are in the gallery
            best = sorted(rows, key=lambda row: -float(zimg[row] @ ztxt[i]))[:k]
            hits.append(any((row, i) in pairs for row in best))
        assert found[f"text_to_image/recall@{k}"] == pytest.approx(sum(hits) / len(hits))
        recalls.append(sum(hits) / len(hits))
    assert found["mean_recall"] == pytest.approx(sum(recalls) / 6)
