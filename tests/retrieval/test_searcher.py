from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
import torch
from conftest import write_store
from torch.nn import functional as F

import lamplit
from lamplit.errors import ImageError, StoreError, UsageError
from lamplit.exports.text_graph import write_words
from lamplit.model import LiT
from lamplit.retrieval.indexing import build_index
from lamplit.retrieval.model_reader import ModelReader, as_reader
from lamplit.retrieval.searcher import Hit, Searcher, search
from lamplit.store.arrays import derived
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.model_folder import TEXT_GRAPH
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.towers.texts.word_reader import WordReader


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


@pytest.mark.parametrize("query", ["A small red circle.", "ring", "etwas anderes"])
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


def test_paths_and_objects(model_path: Path, model: LiT, store: Store, image_folder: Path) -> None:
    expected = search(model, store, "ring", k=3)
    for hits in (
        search(model_path, store.path, "ring", k=3),
        search(str(model_path), Path(store.path), "ring", k=3, device="cpu"),
        Searcher(model_path, store.path).search("ring", k=3),
    ):
        assert [hit.id for hit in hits] == [hit.id for hit in expected]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-4)
    file = drawing(image_folder, "large_blue_triangle")
    assert Path(search(model_path, store.path, image=file, k=1)[0].path).name == file.name
    with pytest.raises(UsageError, match="the model is open on cpu"):
        Searcher(model, store, device="meta")


@pytest.mark.slow
def test_words_are_read_without_torch_if_they_can_be(model_path: Path, tmp_path: Path, store: Store) -> None:
    model = Path(shutil.copytree(model_path, tmp_path / "model"))
    (model / TEXT_GRAPH).unlink(missing_ok=True)
    assert isinstance(as_reader(model, images=False), ModelReader)
    assert write_words(model)
    words = as_reader(model, images=False)
    assert isinstance(words, WordReader)
    assert isinstance(as_reader(model, images=False, device="cpu"), ModelReader)
    assert isinstance(as_reader(model), ModelReader)
    expected = search(as_reader(model), store, "ring", k=5)
    assert [hit.id for hit in Searcher(words, store).search("ring", k=5)] == [hit.id for hit in expected]


def test_repr_of_a_hit() -> None:
    assert repr(Hit(0.12345, "1", "a/owl.png", ["An owl.", "A bird."], {})) == "<Hit 0.123 a/owl.png: 'An owl.'>"
    assert repr(Hit(-0.5, "1", "b.png", [], {"year": 1})) == "<Hit -0.500 b.png>"


def test_repr(model: LiT, large: Store, by_bits: Searcher, store: Store) -> None:
    assert repr(Searcher(model, store)) == "<Searcher drawings.lance: 60 × 64, exact>"
    assert repr(by_files(model, large, exact=True)) == "<Searcher large.lance: 1200 × 64, exact>"
    assert re.fullmatch(r"<Searcher large.lance: 1200 × 64, recall@10 \d\.\d{3}>", repr(by_bits))


def test_text_tower_alone_is_enough_for_words(model_path: Path, model: LiT, store: Store) -> None:
    alone = lamplit.load(model_path, towers="text")
    assert search(alone, store, "ring", k=3) == search(model, store, "ring", k=3)


def test_other_tower_is_refused(model: LiT, words_path: Path) -> None:
    with pytest.raises(StoreError, match=r"was embedded by module:made\.up .* not by timm:test_vit .*lamplit embed"):
        search(model, Store(words_path), "ring")


def test_words_or_an_image(model: LiT, store: Store, image_folder: Path) -> None:
    with pytest.raises(UsageError, match="words, an image, or both"):
        search(model, store)
    for query in ("", " \t", '""', '"ring" + " "'):
        with pytest.raises(UsageError, match="the query is blank"):
            search(model, store, query)
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


@pytest.mark.parametrize("query", ["\U00012031", "\U00012031 \U00012032", '"ring" - 0.5 * "\U00012031"'])
def test_a_query_of_unknown_words_says_so(model: LiT, store: Store, query: str) -> None:
    with pytest.raises(UsageError, match="text tower knows no word of '\U00012031"):
        search(model, store, query)
    assert search(model, store, "\U00012031 ring", k=1)  # some of it is known


@pytest.mark.parametrize("small", [0, 50_000])
def test_copies_are_one_hit(text_folder: Path, tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine images, of which 0, 3 and 7 are one, as 2 and 5 are; two more have no known content."""
    monkeypatch.setattr(derived, "SMALL", small)
    vectors = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    vectors[3] = vectors[7] = vectors[0]
    vectors[5] = vectors[2]
    hashes = ["a", "b", "c", "a", "d", "c", "e", "a", "f", "", ""]
    years = [{"year": year} for year in range(11)]
    store = write_store(tmp_path / "a.lance", vectors, [["ring"]] * 11, years, hashes=hashes)
    model = LiT(open_text_tower(f"hf:{text_folder}", width=8), store.tower)
    searcher = Searcher(model, store)
    found = {int(hit.id): [int(name) for name in hit.copies] for hit in searcher.search("ring", k=11)}
    assert found == {0: [3, 7], 1: [], 2: [5], 4: [], 6: [], 8: [], 9: [], 10: []}
    pages = [searcher.search("ring", k=3, offset=offset) for offset in (0, 3, 6)]
    assert [int(hit.id) for page in pages for hit in page] == list(found)
    later = {int(hit.id): [int(name) for name in hit.copies] for hit in searcher.search("ring", k=11, where="year > 2")}
    assert later == {3: [0, 7], 4: [], 5: [2], 6: [], 8: [], 9: [], 10: []}


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


def by_files(model: LiT, store: Store, *, exact: bool = False) -> Searcher:
    """Search a store as one that is large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, "SMALL", 0)
        return Searcher(model, store, exact=exact)


@pytest.fixture(scope="module")
def by_bits(model: LiT, large: Store) -> Searcher:
    searcher = by_files(model, large)
    assert not searcher.collection.is_exact
    return searcher


def test_bits_find_what_the_product_finds(model: LiT, large: Store, by_bits: Searcher, store: Store) -> None:
    exact = by_files(model, large, exact=True)
    vectors = store.vectors()[::6]
    missed = 0
    for vector in vectors:
        mine, true = by_bits.nearest(vector, 10), exact.nearest(vector, 10)
        check(true, brute_force(large, vector, 10))
        missed += len({hit.id for hit in true} - {hit.id for hit in mine})
        assert [hit.score for hit in mine] == sorted((hit.score for hit in mine), reverse=True)
    assert missed <= 0.01 * 10 * len(vectors)


@pytest.mark.parametrize("where", [None, "year < 5"])
@pytest.mark.parametrize("step", [70, 300])
def test_pages_have_no_gaps_and_no_repeats(by_bits: Searcher, where: str | None, step: int) -> None:
    size = 1200 if where is None else 600
    vector = by_bits.encode("ring")
    pages = [by_bits.nearest(vector, step, offset=offset, where=where) for offset in range(0, size, step)]
    assert len({hit.id for page in pages for hit in page}) == sum(map(len, pages)) == size
    for page in pages:
        assert [hit.score for hit in page] == sorted((hit.score for hit in page), reverse=True)
    assert by_bits.nearest(vector, 10, offset=size, where=where) == []


@pytest.mark.parametrize("where", [None, "year < 5"])
@pytest.mark.parametrize("k", [101, 200, 5000])
def test_beyond_the_first_100_hits_are_the_exact_ones(model: LiT, large: Store, k: int, where: str | None) -> None:
    """Candidates alone are kept so few here that a ranking that begins with them would be out of order."""
    searcher = by_files(model, large)
    [part] = searcher.collection.parts
    searcher.collection = replace(searcher.collection, parts=[replace(part, kept=(130, 101))])
    exact = by_files(model, large, exact=True)
    for vector in F.normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), dim=1):
        assert searcher.nearest(vector, k, where=where) == exact.nearest(vector, k, where=where)


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
    for name, value in (("offset", -1), ("k", -1), ("k", "3"), ("k", 3.0)):
        with pytest.raises(UsageError, match=f"^{name} is {value!r}; expected a whole number of at least 0$"):
            Searcher(model, store).search("ring", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (["hat", "dog"], r"query is a list; search takes one text\. For many: .*\[s\.search\(q\) for q in queries\]"),
        (np.zeros(64), r"query is an ndarray; .*nearest\(vector, k\)"),
        (Path("a.png"), "query is a .*Path; search takes one text. For an image: image=FILE"),
    ],
)
def test_query_that_is_no_text_is_refused(query: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search("no/model", "no.lance", query)


def test_image_head_is_searched_in_its_own_space(text_folder: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.lance", torch.randn(300, 8), [[str(i)] for i in range(300)])
    head = torch.nn.Linear(8, 5)
    model = LiT(open_text_tower(f"hf:{text_folder}", width=5), store.tower, image_head=head)
    [query] = model.encode_texts(["ring"])
    expected = (model.read_store(store) @ query).sort(descending=True)
    for searcher in (Searcher(model, store), by_files(model, store, exact=True)):
        hits = searcher.nearest(query, 300)
        assert [hit.score for hit in hits] == pytest.approx(expected.values.tolist(), abs=1e-3)
    with torch.no_grad():
        head.weight += 1
    assert by_files(model, store, exact=True).nearest(query, 3) != hits[:3]


def test_empty_store_finds_nothing(model: LiT, store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "none.lance")
    lance.dataset(str(tmp_path / "none.lance")).delete("true")
    empty = Store(tmp_path / "none.lance")
    assert search(model, empty, "ring") == []
    assert search(model, empty, "ring", where="id = 'a'") == []


def test_index_gives_the_same_hits(model: LiT, large: Store, by_bits: Searcher, tmp_path: Path) -> None:
    path = tmp_path / "large.lance"
    shutil.copytree(large.path, path)
    report = build_index(path)
    assert report.images == 1200
    searcher, exact = Searcher(model, Store(path)), Searcher(model, Store(path), exact=True)
    assert searcher.probes == report.probes
    assert repr(searcher) == "<Searcher large.lance: 1200 × 64, by the index>"
    found, queries = 0, large.vectors()[::40]
    for query in queries:
        true = {hit.id for hit in exact.nearest(query, 10)}
        found += len(true & {hit.id for hit in searcher.nearest(query, 10)})
    assert found >= 0.97 * 10 * len(queries)
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
