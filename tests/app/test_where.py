"""Where in an image of the store words are read: the endpoint, and the button on the page."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_page
from fastapi.testclient import TestClient
from PIL import Image
from playwright.sync_api import Page
from test_page import found_by_its_caption, in_a_browser, run_app
from test_server import id_of, said

import lamplit
from lamplit.app.server import WHERE, make_app
from lamplit.model import LiT
from lamplit.store.lance_store import Store

browser = test_page.browser
page = test_page.page


@pytest.fixture(scope="module")
def model(places_path: Path) -> LiT:
    return lamplit.load(places_path / "model")


@pytest.fixture(scope="module")
def store(places_path: Path) -> Store:
    return Store(places_path / "drawings.lance")


@pytest.fixture(scope="module")
def client(model: LiT, store: Store) -> TestClient:
    return TestClient(make_app(model, store), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def running(places_path: Path) -> Iterator[str]:
    with run_app(places_path / "model", places_path / "drawings.lance") as address:
        yield address


def test_png_is_what_the_library_draws(client: TestClient, model: LiT, store: Store, image_folder: Path) -> None:
    name = id_of(store, "large_blue_triangle")
    answer = client.get("/where", params={"id": name, "query": "A large blue triangle."})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    expected = lamplit.locate(model, image_folder / name, "A large blue triangle.").draw()
    with Image.open(io.BytesIO(answer.content)) as drawn:
        difference = np.abs(np.asarray(drawn, int) - np.asarray(expected, int))
    assert difference.max() <= 1  # words alone, or in a batch of words
    other = client.get("/where", params={"id": name, "query": '"ring" - "A large blue triangle."'})
    assert other.status_code == 200
    assert other.content != answer.content
    assert client.get("/where", params={"id": name, "query": "  A large blue triangle. "}).content == answer.content


def test_large_image_is_drawn_small(model: LiT, places_path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "wide.png")
    tower = model.unlocked_image_tower
    lamplit.embed(tmp_path, tmp_path / "a.lance", image_tower=tower, backend="torch")
    with TestClient(make_app(model, Store(tmp_path / "a.lance")), base_url="http://127.0.0.1") as client:
        answer = client.get("/where", params={"id": "wide.png", "query": "ring"})
        with Image.open(io.BytesIO(answer.content)) as drawn:
            assert drawn.size == (WHERE, round(WHERE / 3))
        (tmp_path / "wide.png").write_bytes(b"no image any more")
        assert client.get("/where", params={"id": "wide.png", "query": "ring"}).content == answer.content  # kept
        gone = client.get("/where", params={"id": "wide.png", "query": "cross"})
        assert gone.status_code == 404
        assert "this image cannot be shown: not an image" in said(gone)
        (tmp_path / "wide.png").unlink()
        gone = client.get("/where", params={"id": "wide.png", "query": "cross"})
        assert (gone.status_code, "not found" in said(gone)) == (404, True)


@pytest.mark.parametrize(
    ("params", "status", "sentence"),
    [
        ({"query": "ring"}, 422, "id"),
        ({"id": "x"}, 422, "query"),
        ({"id": "x", "query": ""}, 422, "query"),
        ({"id": "x", "query": "a" * 1001}, 422, "query"),
        ({"id": "x", "query": "ring"}, 404, "no image of this id"),
        ({"id": "../../etc/passwd", "query": "ring"}, 404, "no image of this id"),
        ({"id": "large_blue_ring.png", "query": " "}, 422, "blank"),
        ({"id": "large_blue_ring.png", "query": '"ring" - "ring"'}, 422, "cancel"),
        ({"id": "large_blue_ring.png", "query": '"ring'}, 422, "not closed"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(
    client: TestClient, store: Store, params: dict[str, str], status: int, sentence: str
) -> None:
    if params.get("id", "").startswith("large"):
        params = params | {"id": id_of(store, "large_blue_ring")}
    answer = client.get("/where", params=params)
    assert answer.status_code == status
    assert sentence in said(answer)


def test_about_says_whether_it_can(
    client: TestClient, model: LiT, places_path: Path, store: Store, model_path: Path, store_path: Path
) -> None:
    assert client.get("/about").json()["locates"] is True
    of_words = TestClient(make_app(lamplit.load(places_path / "model", towers="text"), store), base_url="http://[::1]")
    assert of_words.get("/about").json()["locates"] is False
    of_class_tokens = TestClient(make_app(lamplit.load(model_path), Store(store_path)), base_url="http://127.0.0.1")
    assert of_class_tokens.get("/about").json()["locates"] is False
    answer = of_class_tokens.get("/where", params={"id": Store(store_path).column("id")[0], "query": "ring"})
    assert answer.status_code == 422
    assert "embed with --pool mean" in said(answer)


@pytest.mark.slow
@in_a_browser
def test_button_shows_where_and_takes_it_off_again(page: Page, model: LiT, store: Store) -> None:
    caption, _ = found_by_its_caption(model, store)
    page.fill("#query", caption)
    page.press("#query", "Enter")
    page.locator("#hits button").first.click()
    page.locator("#neighbours li").nth(11).wait_for()
    button = page.get_by_role("button", name=f"Where is “{caption}”?")
    plain = page.locator("#detail-image").get_attribute("src")
    assert plain is not None
    assert plain.startswith("image?id=")
    button.click()
    page.get_by_text("Orange: where the words are read most").wait_for()
    assert button.get_attribute("aria-pressed") == "true"
    assert str(page.locator("#detail-image").get_attribute("src")).startswith("blob:")
    page.locator("#detail-image").evaluate("async (image) => { await image.decode(); }")
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('detail-image').getAttribute('src').startsWith('image?id=')")
    assert page.locator("#detail-legend").inner_text() == ""
    page.keyboard.press("Enter")
    page.get_by_text("Orange: where the words are read most").wait_for()
    page.locator("#neighbours button").first.click()  # another image: plain, with the same words to look for
    page.locator("#detail-title").filter(has_not_text=caption).wait_for()
    assert page.locator("#detail-legend").inner_text() == ""
    assert button.is_visible()
    page.keyboard.press("Escape")


@pytest.mark.slow
@in_a_browser
def test_image_that_was_not_found_by_words_has_no_button(page: Page, image_folder: Path) -> None:
    page.set_input_files("#search-file", next(image_folder.glob("large_blue_cross.*")))
    page.locator("#hits button").first.click()
    page.locator("#neighbours li").nth(11).wait_for()
    assert page.locator("#detail-where").is_hidden()


@pytest.mark.slow
@in_a_browser
def test_image_that_is_gone_is_a_sentence(
    browser: test_page.Browser, places_path: Path, image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "images")
    lamplit.embed(
        tmp_path / "images/pairs.csv", tmp_path / "a.lance",
        image_tower=lamplit.load(places_path / "model", towers="image").unlocked_image_tower, backend="torch",
    )  # fmt: skip
    with run_app(places_path / "model", tmp_path / "a.lance") as address:
        opened = browser.new_page()
        opened.goto(address)
        opened.fill("#query", "ring")
        opened.press("#query", "Enter")
        opened.locator("#hits button").first.click()
        opened.locator("#neighbours li").nth(11).wait_for()
        for file in (tmp_path / "images").iterdir():
            file.unlink()
        opened.click("#detail-where")
        opened.get_by_text("This image cannot be shown: file not found.").wait_for()
        assert opened.locator("#detail-legend").inner_text() == ""
        opened.close()
