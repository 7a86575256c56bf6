from __future__ import annotations

import shutil
from pathlib import Path

import lance
import pytest
import torch
from conftest import write_store
from torch.nn import functional as F

import lamplit
from lamplit.errors import ImageError, StoreError, UsageError
from lamplit.model import LiT
from lamplit.retrieval.indexing import build_index
from lamplit.retrieval.searcher import Hit, Searcher, search
from lamplit.store.lance_store import Store
from lamplit.store.rows import Row
from lamplit.towers.texts.text_tower import open_text_tower


def drawing(image_folder: Path, name: str) -> Path:
    [file] = image_folder.glob(f"{name}.*")
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


def test_image_finds_itself_and_what_brute_force_finds(model: LiT, store: Store, image_folder: Path) -> None:
    file = drawing(image_folder, "large_blue_triangle")
    hits = search(model, store, image=file, k=5)
    check(hits, brute_force(store, model.encode_images([file])[0], 5))
    assert Path(hits[0].path).name == file.name
    assert hits[0].score == pytest.approx(1, abs=1e-3)


def test_hit_tells_all_that_the_store_knows(model: LiT, store: Store, image_folder: Path) -> None:
    [hit] = search(model, store, image=drawing(image_folder, "small_yellow_cross"), k=1)
    assert hit.texts == ["A small yellow cross."]
    assert hit.metadata == {"german": "gelb, klein: Kreuz", "shape": "cross"}
    assert Path(hit.path).is_file()


def test_more_than_there_is_gives_all(model: LiT, store: Store) -> None:
    hits = search(model, store, "ring", k=1000)
    assert len(hits) == len(store) == 60
    assert len({hit.id for hit in hits}) == 60
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_searcher_answers_again_and_again(model: LiT, store: Store, image_folder: Path) -> None:
    searcher = Searcher(model, store)
    assert searcher.search("ring", k=3) == search(model, store, "ring", k=3) == searcher.search("ring", k=3)
    image_file = drawing(image_folder, "small_yellow_cross")
    assert searcher.search(image=image_file, k=3) == search(model, store, image=image_file, k=3)


def test_text_tower_alone_is_enough_for_words(model_path: Path, model: LiT, store: Store) -> None:
    alone = lamplit.load(model_path, towers="text")
    assert search(alone, store, "ring", k=3) == search(model, store, "ring", k=3)


def test_other_tower_is_refused(model: LiT, words_path: Path) -> None:
    with pytest.raises(StoreError, match=r"was embedded by module:made\.up .* not by timm:test_vit .*lamplit embed"):
        search(model, Store(words_path), "ring")


def test_words_or_a_image(model: LiT, store: Store, image_folder: Path) -> None:
    with pytest.raises(UsageError, match="words, an image, or both"):
        search(model, store)
    with pytest.raises(ImageError, match="not found"):
        search(model, store, image=image_folder / "none.png")


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


# --- Large stores, filters, pages and sums


@pytest.fixture(scope="module")
def large(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The drawings' vectors many times over, with noise, in the order of no id."""
    store = Store(store_path)
    random = torch.Generator().manual_seed(0)
    vectors = F.normalize(store.vectors().repeat(20, 1), dim=1)
    vectors = F.normalize(vectors + 0.02 * torch.randn(vectors.shape, generator=random), dim=1)
    rows = [
        Row(f"{number * 7919 % 1200:04}", f"/{number}.png", "", [f"text {number}"], vector, {"year": number % 10})
        for number, vector in enumerate(vectors)
    ]
    path = tmp_path_factory.mktemp("large") / "large.lance"
    return Store.create(path, store.tower, rows, backend="torch", metadata_columns=["year"])


@pytest.fixture(scope="module")
def by_bits(model: LiT, large: Store) -> Searcher:
    searcher = Searcher(model, large, small=0)
    assert searcher.collection.planes is not None
    return searcher


def test_bits_find_what_the_product_finds(model: LiT, large: Store, by_bits: Searcher, store: Store) -> None:
    exact = Searcher(model, large, exact=True, small=0)
    vectors = store.vectors()[::6]
    missed = 0
    for vector in vectors:
        mine, true = by_bits.nearest(vector, 10), exact.nearest(vector, 10)
        check(true, brute_force(large, vector, 10))
        missed += len({hit.id for hit in true} - {hit.id for hit in mine})
        assert [hit.score for hit in mine] == sorted((hit.score for hit in mine), reverse=True)
    assert missed <= 0.01 * 10 * len(vectors)


@pytest.mark.parametrize("where", [None, "year < 5"])
def test_pages_have_no_gaps_and_no_repeats(by_bits: Searcher, where: str | None) -> None:
    size = 1200 if where is None else 600
    vector = by_bits.encode("ring")
    whole = by_bits.nearest(vector, size + 100, where=where)
    assert len({hit.id for hit in whole}) == len(whole) == size
    paged = [hit for offset in range(0, size, 70) for hit in by_bits.nearest(vector, 70, offset=offset, where=where)]
    assert paged == whole
    assert by_bits.nearest(vector, 10, offset=size, where=where) == []


def test_condition_is_on_columns(model: LiT, large: Store, by_bits: Searcher) -> None:
    exact = Searcher(model, large, exact=True)
    for condition, holds in (
        ("year = 3", lambda hit: hit.metadata["year"] == 3),
        ("year IN (1, 2) AND id < '0600'", lambda hit: hit.metadata["year"] in (1, 2) and hit.id < "0600"),
        ("path LIKE '/11%'", lambda hit: hit.path.startswith("/11")),
    ):
        everything = exact.search("ring", k=1200)
        expected = [hit for hit in everything if holds(hit)]
        assert exact.search("ring", k=1200, where=condition) == expected
        found = by_bits.search("ring", k=1200, where=condition)
        assert sorted(hit.id for hit in found) == sorted(hit.id for hit in expected)
        assert found[0] == expected[0]
    assert by_bits.search("ring", where="year > 99") == []


@pytest.mark.parametrize("condition", ["colour = 'red'", "year >", "lower(id)", ""])
def test_wrong_condition_names_the_columns(by_bits: Searcher, condition: str) -> None:
    with pytest.raises(UsageError, match=r"there are: id, path, hash, texts, year$"):
        by_bits.search("ring", where=condition)


def test_condition_after_rows_were_replaced_and_added(model: LiT, store: Store, tmp_path: Path) -> None:
    vectors = store.vectors()[:30]
    rows = [Row(f"{i:02}", "", "", [], vector, {"year": i}) for i, vector in enumerate(vectors)]
    changing = Store.create(tmp_path / "a.lance", store.tower, rows[10:], backend="torch", metadata_columns=["year"])
    changing.replace([Row("15", "", "", [], vectors[0], {"year": 99})])
    changing.append(rows[:10])
    found = Searcher(model, changing).search("ring", k=99, where="year >= 29 or id = '03'")
    assert sorted(hit.id for hit in found) == ["03", "15", "29"]
    assert [hit.id for hit in Searcher(model, changing).nearest(vectors[0], 2)] == ["00", "15"]


def test_sums(model: LiT, store: Store, image_folder: Path) -> None:
    red, ring = model.encode_texts(["red", "ring"])
    [image_file] = model.encode_images([drawing(image_folder, "large_blue_triangle")])
    searcher = Searcher(model, store)
    for found, vector in (
        (searcher.search('"red" - 0.5 * "ring"', k=5), red - ring / 2),
        (
            searcher.search('"red" + "ring"', image=drawing(image_folder, "large_blue_triangle"), k=5),
            red + ring + image_file,
        ),
    ):
        check(found, brute_force(store, F.normalize(vector, dim=0), 5))
    with pytest.raises(UsageError, match="cancel each other"):
        searcher.search('"red" - "red"')
    with pytest.raises(UsageError, match=r"expected \+ or -\n"):
        searcher.search('"red" "ring"')


def test_numbers_below_zero_are_refused(model: LiT, store: Store) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        Searcher(model, store).search("ring", offset=-1)


def test_image_head_is_searched_in_its_own_space(text_folder: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.lance", torch.randn(300, 8), [[str(i)] for i in range(300)])
    head = torch.nn.Linear(8, 5)
    model = LiT(open_text_tower(f"hf:{text_folder}", width=5), store.tower, image_head=head)
    [query] = model.encode_texts(["ring"])
    expected = (model.read_store(store) @ query).sort(descending=True)
    for searcher in (Searcher(model, store), Searcher(model, store, small=0, exact=True)):
        hits = searcher.nearest(query, 300)
        assert [hit.score for hit in hits] == pytest.approx(expected.values.tolist(), abs=1e-3)
    with torch.no_grad():
        head.weight += 1
    assert Searcher(model, store, small=0, exact=True).nearest(query, 3) != hits[:3]


def test_empty_store_finds_nothing(model: LiT, store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "none.lance")
    lance.dataset(str(tmp_path / "none.lance")).delete("true")
    empty = Store(tmp_path / "none.lance")
    assert search(model, empty, "ring") == []
    assert search(model, empty, "ring", where="id = 'a'") == []


def test_index_gives_the_same_hits(model: LiT, large: Store, by_bits: Searcher, tmp_path: Path) -> None:
    path = tmp_path / "large.lance"
    shutil.copytree(large.path, path)
    report = build_index(Store(path))
    assert report.images == 1200
    assert report.recall >= 0.99 or report.probes == report.partitions
    searcher = Searcher(model, Store(path))
    assert searcher.probes == report.probes
    vector = by_bits.encode("ring")
    check(searcher.nearest(vector, 5), [(hit.id, hit.score) for hit in by_bits.nearest(vector, 5)])
    whole = searcher.nearest(vector, 1200)
    assert len({hit.id for hit in whole}) == 1200
    assert {hit.metadata["year"] for hit in searcher.nearest(vector, 30, where="year = 3")} == {3}
    shutil.rmtree(path / "_search")
    assert Searcher(model, Store(path)).probes is None


def test_index_needs_images(store: Store) -> None:
    with pytest.raises(UsageError, match="at least 256"):
        build_index(store)
