"""The map over HTTP: points, colours, regions, and areas that a search is limited to."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import write_store
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from test_server import png, said

import lamplit
from lamplit.app.collection_map import MOST_VALUES, STEPS, colour_cells, inside
from lamplit.app.kept_rows import typical_text
from lamplit.app.server import make_app
from lamplit.errors import UsageError
from lamplit.model import LiT
from lamplit.retrieval import searcher as searching
from lamplit.retrieval.projection import find_map, make_map, principal_axes
from lamplit.store.arrays import derived
from lamplit.store.arrays.row_vectors import read_vectors
from lamplit.store.lance_store import Store

ALL = [[-2.0, -2.0], [2.0, -2.0], [2.0, 2.0], [-2.0, 2.0]]


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


@pytest.fixture(scope="module")
def client(model: LiT, store_path: Path, model_path: Path) -> TestClient:
    return TestClient(make_app(model, Store(store_path), name=str(model_path)), base_url="http://127.0.0.1")


def points_of(client: TestClient) -> NDArray[np.float32]:
    content = client.get("/map/points").content
    return np.frombuffer(content, "<f4").reshape(2, -1).T


def colours_of(client: TestClient, **question: str) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    legend = client.get("/map/legend", params=question)
    assert legend.status_code == 200, legend.text
    return legend.json(), np.frombuffer(client.get("/map/colours", params=question).content, np.uint8)


def around(points: NDArray[np.float32], rows: list[int]) -> list[list[float]]:
    """Corners of the smallest rectangle that holds some points, and a little more."""
    (left, low), (right, up) = points[rows].min(0).tolist(), points[rows].max(0).tolist()
    return [[left - 1e-4, low - 1e-4], [right + 1e-4, low - 1e-4], [right + 1e-4, up + 1e-4], [left - 1e-4, up + 1e-4]]


def test_all_images_are_on_the_map(client: TestClient, store: Store) -> None:
    described = client.get("/map").json()
    expected = principal_axes(read_vectors(store))
    assert described["images"] == 60
    assert described["explained"] == pytest.approx(expected.explained)
    assert f"lamplit map {Path(store.path).name}" in described["advice"]
    assert str(Path(store.path).parent) not in described["advice"]
    np.testing.assert_allclose(points_of(client), expected.points, atol=1e-5)


def test_browser_that_has_the_points_gets_them_not_again(client: TestClient) -> None:
    first = client.get("/map/points")
    again = client.get("/map/points", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/map").json()["tag"] in first.headers["etag"]


def test_map_of_neighbours_is_shown_as_soon_as_it_was_made(model: LiT, store_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(store_path, tmp_path / "a.lance")
    client = TestClient(make_app(model, Store(path)), base_url="http://127.0.0.1")
    before = client.get("/map").json()
    make_map(path)
    after = client.get("/map").json()
    assert (after["explained"], after["advice"]) == (None, None)
    assert after["tag"] != before["tag"]
    found = find_map(Store(path))
    assert found is not None
    assert np.array_equal(points_of(client), found.points)
    answer = client.post("/map/area", json={"tag": before["tag"], "corners": ALL})
    assert answer.status_code == 422
    assert "the map has changed" in said(answer)
    assert client.get("/map/regions").json()["tag"] == after["tag"]


def test_colours_are_those_of_a_column_or_of_words(client: TestClient, model: LiT, store: Store) -> None:
    legend, numbers = colours_of(client)
    assert (legend["entries"], set(numbers.tolist()), len(numbers)) == ([], {0}, 60)
    legend, numbers = colours_of(client, column="shape")
    names = [entry["name"] for entry in legend["entries"]]
    assert [names[number] for number in numbers] == store.column("shape")
    assert [entry["images"] for entry in legend["entries"]] == [12] * 5
    query = '"A small red circle." - 0.7 * "ring"'
    legend, numbers = colours_of(client, query=query)
    cosines = lamplit.Searcher(model, store).encode(query) @ model.read_store(store).numpy().T
    assert (legend["low"], legend["high"]) == pytest.approx(tuple(np.percentile(cosines, (5, 99.5))), abs=1e-5)
    expected = (cosines - legend["low"]) / (legend["high"] - legend["low"]) * STEPS
    assert np.abs(numbers - np.clip(expected, 0, STEPS - 1).astype(int)).max() <= 1
    assert numbers.min() == 0
    assert numbers.max() == STEPS - 1 == legend["steps"] - 1
    for question in ({"column": "vector"}, {"column": "path"}, {"column": "nope"}):
        assert "no column" in said(client.get("/map/legend", params=question))
        assert client.get("/map/colours", params=question).status_code == 404
    assert "blank" in said(client.get("/map/colours", params={"query": '""'}))


def test_cells_of_any_kind_have_colours() -> None:
    legend, numbers = colour_cells(pa.array([3, None, 1, 2], pa.int64()))
    assert (legend.kind, legend.low, legend.high, legend.entries) == ("scale", 1, 3, [("none", 1)])
    assert numbers.tolist() == [STEPS - 1, STEPS, 0, STEPS // 2]
    legend, numbers = colour_cells(pa.array([float("nan"), float("inf")]))
    assert (legend.entries, numbers.tolist()) == ([("none", 2)], [STEPS, STEPS])
    legend, numbers = colour_cells(pa.array([True, False, None, True]))
    assert (legend.entries, numbers.tolist()) == ([("true", 2), ("false", 1), ("none", 1)], [0, 1, 2, 0])
    legend, _ = colour_cells(pa.array([date(2020, 1, 1), date(2021, 1, 1)]))
    assert [name for name, _ in legend.entries] == ["2020-01-01", "2021-01-01"]
    many = [f"value {n:02}" for n in range(20) for _ in range(20 - n)]
    legend, numbers = colour_cells(pa.array(many))
    assert len(legend.entries) == MOST_VALUES + 1
    assert legend.entries[-1] == ("others", sum(range(1, 20 - MOST_VALUES + 1)))
    assert np.bincount(numbers).tolist() == [count for _, count in legend.entries]
    legend, numbers = colour_cells(pa.array([None, None], pa.string()))
    assert (legend.entries, numbers.tolist()) == ([("none", 2)], [0, 0])
    with pytest.raises(UsageError, match="list"):
        colour_cells(pa.array([["a"], []]))


def test_points_have_ids_and_texts(client: TestClient, store: Store) -> None:
    tag = client.get("/map").json()["tag"]
    items = client.post("/map/items", json={"tag": tag, "rows": [59, 3, 3]}).json()["items"]
    ids, texts = store.column("id"), store.texts()
    assert items == [{"row": row, "id": ids[row], "text": texts[row][0]} for row in (59, 3, 3)]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("items", {"rows": [60]}, 404),
        ("items", {"rows": [-1]}, 422),
        ("items", {"rows": [2**31]}, 422),
        ("items", {"rows": [0] * 201}, 422),
        ("items", {"rows": [0], "tag": "another"}, 422),
        ("area", {"corners": ALL[:2]}, 422),
        ("area", {"corners": ALL * 26}, 422),
        ("area", {"corners": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}, 422),
        ("area", {"corners": ALL, "tag": "another"}, 422),
        ("area", {"corners": ALL, "tag": "a" * 101}, 422),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(client: TestClient, path: str, body: dict[str, Any], status: int) -> None:
    answer = client.post(f"/map/{path}", json={"tag": client.get("/map").json()["tag"]} | body)
    assert answer.status_code == status
    assert said(answer)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
def test_corners_are_numbers(client: TestClient, number: str) -> None:
    content = f'{{"tag": "{client.get("/map").json()["tag"]}", "corners": [[0, 0], [1, {number}], [1, 1]]}}'
    answer = client.post("/map/area", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert client.post("/map/area", content=content, headers={"content-type": "text/plain"}).status_code == 415


def test_search_is_limited_to_an_area(client: TestClient, store: Store) -> None:
    points, ids = points_of(client), store.column("id")
    area = {"tag": client.get("/map").json()["tag"], "corners": around(points, [4, 9, 17])}
    expected = {ids[row] for row in np.flatnonzero(inside(points, tuple(map(tuple, area["corners"]))))}
    assert 3 <= len(expected) < 60
    assert client.post("/map/area", json=area).json() == {"images": len(expected)}
    hits = client.post("/search", json={"query": "ring", "k": 60, "area": area}).json()["hits"]
    assert {hit["id"] for hit in hits} == expected
    everywhere = [hit["id"] for hit in client.post("/search", json={"query": "ring", "k": 60}).json()["hits"]]
    assert [hit["id"] for hit in hits] == [name for name in everywhere if name in expected]
    both = client.post("/search", json={"query": "ring", "k": 60, "area": area, "where": "shape = 'ring'"}).json()[
        "hits"
    ]
    assert {hit["id"] for hit in both} == {hit["id"] for hit in hits if hit["metadata"]["shape"] == "ring"}
    like = client.post("/search", json={"like": ids[4], "k": 60, "area": area}).json()["hits"]
    assert {hit["id"] for hit in like} == expected - {ids[4]}
    form = {"k": "60", "area": json.dumps(area)}
    sent = client.post("/search", data=form, files={"image": ("a.png", png())}).json()["hits"]
    assert {hit["id"] for hit in sent} == expected
    for wrong in ("{", "[]", json.dumps(area | {"tag": "x"}), "[" * 100_000, "[" * 101 + "]" * 101):
        answer = client.post("/search", data={"area": wrong}, files={"image": ("a.png", png())})
        assert answer.status_code == 422, wrong[:9]
        assert said(answer)


def test_area_of_a_large_store_is_searched_by_bits_or_exactly(
    model: LiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = torch.randn(600, 64, generator=torch.Generator().manual_seed(4))
    store = write_store(tmp_path / "a.lance", vectors, [["a"]] * 600)
    reader = searching.as_reader(model)
    monkeypatch.setattr(Store, "require_tower", lambda *_: None)
    monkeypatch.setattr(derived, "SMALL", 10)
    among = np.arange(600) % 3 == 0
    query = read_vectors(store)[torch.tensor([300])][0]
    found = [
        searching.Searcher(reader, store, exact=is_exact).find(query, 20, among=among) for is_exact in (True, False)
    ]
    assert all(row % 3 == 0 for each in found for row in each.rows.tolist())
    assert found[0].rows[0] == found[1].rows[0] == 300


def test_inside_is_what_a_ray_says() -> None:
    star = ((0.0, 1.0), (0.2, 0.2), (1.0, 0.0), (0.2, -0.2), (0.0, -1.0), (-0.2, -0.2), (-1.0, 0.0), (-0.2, 0.2))
    points = np.array([[0, 0], [0.6, 0.6], [0.05, 0.5], [-0.5, 0.05], [3, 3], [0.99, 0.0005]], np.float32)
    assert inside(points, star).tolist() == [True, False, True, True, False, True]
    assert not inside(points, ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))).any()


def test_regions_have_words_and_images(client: TestClient, store: Store) -> None:
    answer = client.get("/map/regions").json()
    assert answer["tag"] == client.get("/map").json()["tag"]
    assert answer["regions"]
    known = dict(zip(store.column("id"), (texts[0] for texts in store.texts()), strict=True))
    for region in answer["regions"]:
        assert -1 <= region["x"] <= 1
        assert -1 <= region["y"] <= 1
        assert region["images"] >= len(region["typical"]) > 0
        assert all(known[item["id"]] == item["text"] for item in region["typical"])
        captions = " ".join(known.values()).lower()
        assert all(word in captions for word in region["name"].split(", "))


def test_example_is_a_typical_caption() -> None:
    assert (
        typical_text(["bo", "A red hat.", "A very long and winding caption of a hat", "A blue sailing boat"])
        == "A blue sailing boat"
    )
    assert typical_text(["bo", "red hat"]) == "red hat"
    assert typical_text(["bo"]) == "bo"
    assert typical_text([]) is None
