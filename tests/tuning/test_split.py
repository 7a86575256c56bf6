from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lamplit.errors import StoreError, UsageError
from lamplit.store.lance_store import Store
from lamplit.tuning import split
from lamplit.tuning.split import Links, held_out_recall, link, split_store

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


def pairs_of(links: Links) -> list[tuple[int, str]]:
    return [(row, links.texts[i]) for row, i in zip(links.image_index.tolist(), links.text_index.tolist(), strict=True)]


def test_link_joins_texts_that_differ_in_case_only() -> None:
    links = link([7, 8, 9], [["A frog.", "frog"], [], ["a FROG."]])
    assert links.texts == ["A frog.", "frog"]
    assert pairs_of(links) == [(7, "A frog."), (7, "frog"), (9, "A frog.")]
    assert len(links) == 3


@pytest.mark.parametrize("seed", range(8))
def test_held_out_captions_are_under_no_training_pair(made_up: Store, seed: int) -> None:
    train, held_out = split_store(made_up, "texts", 0.4, seed)
    tuned_on = {text.casefold() for text in train.texts}
    never_seen = {text.casefold() for text in held_out.texts}
    assert never_seen
    assert not tuned_on & never_seen
    assert not set(train.image_index.tolist()) & set(held_out.image_index.tolist())
    first = {row: texts[0].casefold() for row, texts in enumerate(TEXTS) if texts}
    held_out_rows = set(held_out.image_index.tolist())
    assert held_out_rows == {row for row, text in first.items() if text in {first[row] for row in held_out_rows}}
    # Nothing is lost: what is in neither part is a held-out caption under a training image.
    both = set(pairs_of(train)) | set(pairs_of(held_out))
    shown = {(row, text.casefold()) for row, text in both}
    lost = {(row, text.casefold()) for row, texts in enumerate(TEXTS) for text in texts} - shown
    assert all(row not in held_out_rows and text in never_seen for row, text in lost)


def test_split_depends_on_the_seed(made_up: Store) -> None:
    splits = [split_store(Store(made_up.path), "texts", 0.4, seed)[1].texts for seed in (0, 0, 1, 2, 3)]
    assert splits[0] == splits[1]
    assert any(other != splits[0] for other in splits[2:])


def test_fraction_is_of_the_distinct_first_captions(made_up: Store) -> None:
    distinct = {texts[0].casefold() for texts in TEXTS if texts}
    held_out = split_store(made_up, "texts", 0.3, 0)[1]
    first = {TEXTS[row][0].casefold() for row in held_out.image_index.tolist()}
    assert len(first) == round(0.3 * len(distinct))


def test_fraction_of_zero_holds_nothing_out(made_up: Store) -> None:
    train, held_out = split_store(made_up, "texts", 0.0, 0)
    assert held_out.texts == []
    assert len(held_out) == 0
    assert len(train) == sum(map(len, TEXTS))


def test_held_out_captions_have_a_limit(made_up: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split.MAX_HELD_OUT == 5000
    monkeypatch.setattr(split, "MAX_HELD_OUT", 2)
    held_out = split_store(made_up, "texts", 0.9, 0)[1]
    assert len({TEXTS[row][0].casefold() for row in held_out.image_index.tolist()}) == 2


def test_images_of_one_caption_are_too_few(tmp_path: Path) -> None:
    store = write_store(tmp_path / "one.lance", torch.eye(3), [["A frog."], [], []])
    with pytest.raises(UsageError, match=r"has 1 pairs to tune on in column 'texts' \(1 of 3 images have a text"):
        split_store(store, "texts", 0.2, 0)


def test_store_without_texts_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "none.lance", torch.eye(3), [[], [], []])
    with pytest.raises(UsageError, match="has 0 pairs to tune on"):
        split_store(store, "texts", 0.2, 0)


def test_columns(made_up: Store) -> None:
    train, held_out = split_store(made_up, "german", 0.0, 0)
    assert (train.texts, len(train), len(held_out)) == (["Ding"], 6, 0)
    with pytest.raises(StoreError, match=r"no column 'french'; it has: .*german"):
        split_store(made_up, "french", 0.2, 0)
    with pytest.raises(StoreError, match=r"'number' .* holds no text"):
        split_store(made_up, "number", 0.2, 0)


@given(
    links=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
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
