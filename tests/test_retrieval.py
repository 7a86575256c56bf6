from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_store

import lamplit
from lamplit.errors import ImageError, StoreError, UsageError
from lamplit.model import LiT
from lamplit.retrieval import Hit, Searcher, search
from lamplit.store import Store
from lamplit.towers.text import open_text_tower


def drawing(pictures: Path, name: str) -> Path:
    [file] = pictures.glob(f"{name}.*")
    return file


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


def brute_force(store: Store, vector: torch.Tensor, k: int) -> list[tuple[str, float]]:
    scores = [(float(row @ vector), name) for row, name in zip(store.vectors(), store.column("id"), strict=True)]
    return [(name, score) for score, name in sorted(scores, key=lambda item: -item[0])[:k]]


def check(hits: list[Hit], expected: list[tuple[str, float]]) -> None:
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-5)
    scores = [score for _, score in expected]
    for hit, (name, score) in zip(hits, expected, strict=True):
        if sum(abs(score - other) < 1e-5 for other in scores) == 1:  # the order of equals is nobody's
            assert hit.id == name


@pytest.mark.parametrize("query", ["A small red circle.", "ring", "etwas anderes", ""])
@pytest.mark.parametrize("k", [1, 7])
def test_words_find_what_brute_force_finds(model: LiT, store: Store, query: str, k: int) -> None:
    check(search(model, store, query, k=k), brute_force(store, model.encode_texts([query])[0], k))


def test_picture_finds_itself_and_what_brute_force_finds(model: LiT, store: Store, pictures: Path) -> None:
    file = drawing(pictures, "large_blue_triangle")
    hits = search(model, store, image=file, k=5)
    check(hits, brute_force(store, model.encode_images([file])[0], 5))
    assert Path(hits[0].path).name == file.name
    assert hits[0].score == pytest.approx(1, abs=1e-3)


def test_hit_tells_all_that_the_store_knows(model: LiT, store: Store, pictures: Path) -> None:
    [hit] = search(model, store, image=drawing(pictures, "small_yellow_cross"), k=1)
    assert hit.texts == ["A small yellow cross."]
    assert hit.metadata == {"german": "gelb, klein: Kreuz", "shape": "cross"}
    assert Path(hit.path).is_file()


def test_more_than_there_is_gives_all(model: LiT, store: Store) -> None:
    hits = search(model, store, "ring", k=1000)
    assert len(hits) == len(store) == 60
    assert len({hit.id for hit in hits}) == 60
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_searcher_answers_again_and_again(model: LiT, store: Store, pictures: Path) -> None:
    searcher = Searcher(model, store)
    assert searcher.search("ring", k=3) == search(model, store, "ring", k=3) == searcher.search("ring", k=3)
    picture = drawing(pictures, "small_yellow_cross")
    assert searcher.search(image=picture, k=3) == search(model, store, image=picture, k=3)


def test_text_tower_alone_is_enough_for_words(model_path: Path, model: LiT, store: Store) -> None:
    alone = lamplit.load(model_path, towers="text")
    assert search(alone, store, "ring", k=3) == search(model, store, "ring", k=3)


def test_other_tower_is_refused(model: LiT, words_path: Path) -> None:
    with pytest.raises(StoreError, match=r"was embedded by module:made\.up .* not by timm:test_vit .*lamplit embed"):
        search(model, Store(words_path), "ring")


def test_words_or_a_picture(model: LiT, store: Store, pictures: Path) -> None:
    with pytest.raises(UsageError, match="words, a picture, or both"):
        search(model, store)
    with pytest.raises(ImageError, match="not found"):
        search(model, store, image=pictures / "none.png")


def test_centred_store_is_searched_in_its_own_space(text_folder: Path, tmp_path: Path) -> None:
    vectors = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)) + 3
    store = write_store(tmp_path / "centred.lance", vectors, [[f"text {i}"] for i in range(9)], centered=True)
    model = LiT(open_text_tower(f"hf:{text_folder}", width=8), store.tower, center=store.center)
    assert store.center is not None
    [query] = model.encode_texts(["ring"])
    centred = store.vectors() - store.center
    expected = (centred / centred.norm(dim=1, keepdim=True)) @ query
    hits = search(model, store, "ring", k=9)
    assert [int(hit.id) for hit in hits] == expected.argsort(descending=True).tolist()
    assert [hit.score for hit in hits] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
