"""`lamplit app` in a process of its own: many who ask at once, and the page in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from test_server import CLASSES, png

import lamplit
from lamplit.model import LiT
from lamplit.store.lance_store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; type: apt install chromium")


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


@contextmanager
def run_app(model: Path, store: Path) -> Iterator[str]:
    """Run `lamplit app` in a process of its own; yield its address."""
    command = [sys.executable, "-c", "from lamplit.cli.main import main; main()", "app", str(model), str(store)]
    with subprocess.Popen([*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130)


@pytest.fixture(scope="module")
def running(model_path: Path, store_path: Path) -> Iterator[str]:
    with run_app(model_path, store_path) as address:
        yield address


@pytest.mark.slow
def test_200_in_flight_lose_none(running: str, model: LiT, store: Store) -> None:
    words = [
        f"A {size} {color} {shape}." for size in ("small", "large") for color in ("red", "blue") for shape in CLASSES
    ]
    expected = {query: [hit.id for hit in lamplit.search(model, store, query, k=3)] for query in words}
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=running, limits=limits, timeout=120) as client, ThreadPoolExecutor(200) as pool:

        def ask(number: int) -> bool:
            query = words[number % len(words)]
            if number % 5 == 0:
                answer = client.post("/embed", files={"images": ("a.png", png())})
                return answer.status_code == 200 and len(answer.json()["vectors"]) == 1
            answer = client.post("/search", json={"query": query, "k": 3})
            return answer.status_code == 200 and [hit["id"] for hit in answer.json()["hits"]] == expected[query]

        assert all(pool.map(ask, range(600)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, running: str) -> Iterator[Page]:
    """Open the page; whatever it does, it asks nobody else, logs no error and is never wider than the window."""
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    asked: list[str] = []
    errors: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        # What the page explains, and what the map says before it draws with WebGL 2.
        expected = ("Failed to load resource", "Could not request WebGPU adapter", "Could not get WebGPU device")
        if message.type == "error" and not message.text.startswith(expected):
            errors.append(message.text)

    opened.on("request", lambda each: asked.append(each.url))
    opened.on("console", listen)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(running)
    opened.wait_for_selector("html[data-ready]")
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors
    assert not [url for url in asked if not url.startswith((running, f"blob:{running}"))]
    context.close()


def drop(page: Page, area: str, name: str, data: bytes) -> None:
    """Drop a file from outside the browser onto a part of the page."""
    script = """([name, data]) => {
        const dropped = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        dropped.items.add(new File([bytes], name, { type: "image/png" }));
        return dropped;
    }"""
    dropped = page.evaluate_handle(script, [name, base64.b64encode(data).decode()])
    page.dispatch_event(area, "drop", {"dataTransfer": dropped})


def found_by_its_caption(model: LiT, store: Store) -> tuple[str, str]:
    """Choose a caption whose image this untrained model does find first; and the id of the image."""
    searcher = lamplit.Searcher(model, store)
    captions = ((texts[0], name) for texts, name in zip(store.texts(), store.column("id"), strict=True))
    return next((text, name) for text, name in captions if searcher.search(text, k=1)[0].id == name)


def show_less_likely(page: Page) -> None:
    """Wait for the images of a search, and ask for those that are hidden."""
    page.locator("#hits li").first.wait_for()
    page.get_by_text("best first").wait_for()
    if page.locator("#unlikely").is_visible():
        page.click("#unlikely")
        page.locator("#hits li").first.wait_for()


@pytest.mark.slow
@in_a_browser
def test_words_show_the_right_image_first(page: Page, model: LiT, store: Store) -> None:
    caption, name = found_by_its_caption(model, store)
    for _ in range(20):  # by the keyboard alone
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "query":
            break
    page.keyboard.type(caption)
    page.keyboard.press("Enter")
    first = page.locator("#hits button").first
    first.wait_for()
    assert first.get_attribute("data-id") == name
    assert caption in first.inner_text()
    show_less_likely(page)
    page.locator("#hits img").first.evaluate("async (image) => { await image.decode(); }")  # or it is broken
    assert page.locator("#hits li").count() == 24
    page.click("#more")
    page.locator("#hits li").nth(47).wait_for()

    first.focus()
    page.keyboard.press("Enter")
    page.locator("#neighbours li").nth(11).wait_for()
    assert page.locator("#detail-title").inner_text() == caption
    shape = str(store.column("shape")[store.column("id").index(name)])
    assert shape in page.locator("#detail").inner_text()
    page.locator("#neighbours button").first.click()
    page.locator("#detail-title").filter(has_not_text=caption).wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()


@pytest.mark.slow
@in_a_browser
def test_filter_shows_only_its_images(page: Page) -> None:
    page.fill("#query", "ring")
    page.press("#query", "Enter")
    show_less_likely(page)
    page.locator("#hits li").nth(23).wait_for()
    page.click("#filter summary")
    page.select_option("#filter-column", "shape")
    page.fill("#filter-value", "cross")
    page.press("#filter-value", "Enter")
    page.get_by_text("12 images, best first").wait_for()
    assert all("cross" in text for text in page.locator("#hits .text").all_inner_texts())
    page.fill("#filter-value", "o'clock")
    page.press("#filter-value", "Enter")
    page.get_by_text("No image fits this filter.").wait_for()
    page.click("#filter-clear")
    page.get_by_text("24 images, best first").wait_for()


@pytest.mark.slow
@in_a_browser
def test_image_that_is_dropped_is_searched_by(page: Page, image_folder: Path) -> None:
    [file] = image_folder.glob("large_blue_triangle.*")
    drop(page, "#search", "<b>mine</b>.png", file.read_bytes())
    page.locator("#hits li").first.wait_for()
    assert "large blue triangle" in page.locator("#hits .text").first.inner_text()
    assert "<b>mine</b>.png" in page.locator("#search-query").inner_text()
    drop(page, "#search", "broken.png", b"no image at all")
    page.get_by_text("Not an image.").wait_for()
    assert page.locator("#hits li").count() == 0
    assert "Traceback" not in page.locator("body").inner_text()


@pytest.mark.slow
@in_a_browser
def test_classes_are_changed_and_the_bars_follow(page: Page, image_folder: Path) -> None:
    page.click("nav a[href='#classify']")
    page.fill("#classes", "circle\nring")
    [file] = image_folder.glob("large_blue_cross.*")
    drop(page, "#classify", file.name, file.read_bytes())
    page.locator("#classified .bars li").nth(1).wait_for()
    page.fill("#classes", "circle\nring\ncross\nsquare")
    page.locator("#classified .bars li").nth(3).wait_for()
    shares = [float(text.split()[0]) for text in page.locator("#classified .share").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert shares == sorted(shares, reverse=True)
    page.click("summary:has-text('Templates')")
    page.fill("#templates", "a photo")
    page.get_by_text("the class name").wait_for()
    page.fill("#templates", "a {}")
    drop(page, "#classify", "broken.png", b"no image at all")
    page.get_by_text("This image cannot be used: not an image.").wait_for()
    assert page.locator("#classified article").count() == 2


@pytest.mark.slow
@in_a_browser
def test_map_is_pointed_at_with_mouse_and_keys(page: Page) -> None:
    page.click("nav a[href='#explore']")
    page.locator("#map[data-drawn='60']").wait_for()
    page.get_by_text("All 60 images").wait_for()
    page.select_option("#colour-column", "shape")
    page.locator("#legend span").nth(4).wait_for()
    page.fill("#colour-query", "ring")
    page.press("#colour-query", "Enter")
    page.get_by_text("cosine to “ring”").wait_for()
    page.locator(".thumbnails img").nth(3).wait_for()  # there is room for images of so few
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    page.locator(".peek.full").wait_for()
    text = page.locator(".peek p").inner_text()
    page.keyboard.press("ArrowLeft")
    page.locator(".peek.full p").filter(has_not_text=re.compile(f"^{re.escape(text)}$")).wait_for()
    text = page.locator(".peek p").inner_text()
    page.keyboard.press("Enter")
    page.locator("#neighbours li").first.wait_for()
    assert page.locator("#detail-title").inner_text() == text
    page.keyboard.press("Escape")
    page.uncheck("#as-images")
    page.locator(".thumbnails img").first.wait_for(state="detached")
    before = ink(page)
    page.click("#zoom-in")
    page.click("#zoom-in")
    assert ink(page) != before, "the map does not move"
    page.click("#zoom-all")


@pytest.mark.slow
@in_a_browser
def test_images_that_are_chosen_on_the_map_are_searched_alone(page: Page) -> None:
    page.click("nav a[href='#explore']")
    page.locator("#map[data-drawn]").wait_for()
    page.click("#choose-rectangle")
    assert page.locator("#choose-rectangle").get_attribute("aria-pressed") == "true"
    box = page.locator("#map").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(x, y, steps=4)
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] - 70, steps=4)
    page.mouse.up()
    page.locator("#chosen:not([hidden])").wait_for()
    count = int(page.locator("#chosen-text").inner_text().split()[0])
    assert 0 < count < 60
    page.click("#chosen-search")
    page.get_by_text(f"Only the {count} images chosen on the map").wait_for()
    page.fill("#query", "ring")
    page.press("#query", "Enter")
    show_less_likely(page)
    while page.locator("#more").is_visible():
        page.click("#more")
        page.wait_for_load_state("networkidle")
    assert page.locator("#hits li").count() == count
    page.click("#within-clear")
    page.locator("#within").wait_for(state="hidden")
    page.get_by_text("24 images, best first").wait_for()
    page.click("nav a[href='#explore']")
    page.click("#choose-rectangle")
    page.click("#choose-lasso")
    page.mouse.move(x, y)
    page.mouse.down()
    for across, up in ((150, 0), (150, -150), (-100, -150), (-100, -20)):
        page.mouse.move(x + across, y + up, steps=3)
    page.mouse.up()
    page.get_by_text("images chosen.").wait_for()
    page.click("#chosen-clear")
    page.locator("#chosen").wait_for(state="hidden")


@pytest.mark.slow
@in_a_browser
def test_map_is_moved_zoomed_and_chosen_from_by_fingers(browser: Browser, running: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    phone = context.new_page()
    phone.goto(f"{running}#explore")
    phone.locator("#map[data-named]").wait_for()
    phone.locator("#map").scroll_into_view_if_needed()
    box = phone.locator("#map").bounding_box()
    assert box is not None
    session, x, y = context.new_cdp_session(phone), box["x"] + box["width"] / 2, box["y"] + box["height"] / 3

    def drag(*ways: tuple[tuple[float, float], tuple[float, float]]) -> None:
        """Move fingers, each from one place to another, both beside the middle."""
        for step in range(6):
            places = [
                {"x": x + ax + (bx - ax) * step / 5, "y": y + ay + (by - ay) * step / 5, "id": number}
                for number, ((ax, ay), (bx, by)) in enumerate(ways)
            ]
            kind = "touchStart" if step == 0 else "touchMove"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        phone.wait_for_timeout(300)

    seen = [ink(phone)]
    for ways in ([((0, 0), (60, 40))], [((-20, 0), (-90, 0)), ((20, 0), (90, 0))]):
        drag(*ways)
        seen.append(ink(phone))
    assert len(set(seen)) == 3
    phone.click("#zoom-all")
    phone.click("#choose-rectangle")
    drag(((-170, -100), (170, 150)))
    phone.locator("#chosen:not([hidden])").wait_for()
    assert int(phone.locator("#chosen-text").inner_text().split()[0]) > 0
    context.close()


@pytest.mark.slow
@in_a_browser
def test_regions_are_listed_and_shown_on_the_map(page: Page) -> None:
    page.click("nav a[href='#explore']")
    page.locator("#regions:not([hidden]) summary").click()
    image = page.locator("#regions-list img").first
    image.evaluate("async (image) => { await image.decode(); }")  # or it is broken
    before = ink(page)
    page.locator("#regions-list button.link").first.click()
    page.wait_for_timeout(500)
    assert ink(page) != before
    caption = image.get_attribute("alt")
    page.locator("#regions-list .tiny").first.click()
    page.locator("#neighbours li").first.wait_for()
    assert page.locator("#detail-title").inner_text() == caption


def ink(page: Page) -> str:
    """Return the picture of the map, as the component gives it."""
    picture: str = page.locator("#map canvas").evaluate("(canvas) => canvas.toDataURL()")
    return picture


@pytest.mark.slow
@in_a_browser
def test_browser_that_cannot_draw_gets_a_list(browser: Browser, running: str) -> None:
    plain = browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-3d-apis"])
    opened = plain.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(f"{running}#explore")
    opened.get_by_text("neither WebGPU nor WebGL 2").wait_for()
    opened.locator("#regions-list .tiny").first.click()
    opened.locator("#neighbours li").first.wait_for()
    assert opened.locator("#map").is_hidden()
    assert not errors
    plain.close()


@pytest.mark.slow
@in_a_browser
def test_run_and_api_have_their_pages(page: Page, running: str) -> None:
    page.click("nav a[href='#run']")
    page.get_by_text("no finished tuning run").wait_for()
    page.get_by_text("timm:test_vit").first.wait_for()
    page.goto(f"{running}docs")
    page.get_by_text("POST /classify").wait_for()


@pytest.mark.slow
@in_a_browser
def test_server_that_is_gone_is_a_sentence(page: Page) -> None:
    page.context.set_offline(True)
    page.fill("#query", "ring")
    page.press("#query", "Enter")
    page.get_by_text("Is lamplit app still running?").wait_for()


@pytest.mark.slow
@in_a_browser
def test_what_is_probably_no_answer_is_hidden(
    browser: Browser, model: LiT, model_path: Path, store_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(store_path, tmp_path / "a.lance")
    searcher = lamplit.Searcher(model, tmp_path / "a.lance")
    caption, _ = found_by_its_caption(model, searcher.store)
    vector = searcher.encode(caption)
    searcher.min_score(vector)
    [file] = (tmp_path / "a.lance").glob("_search/*/answers.json")
    scores, hits = searcher.collection.vectors @ vector, searcher.nearest(vector, 24)
    height = ((hits[2].score + hits[3].score) / 2 - scores.mean()) / scores.std()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"deviations": float(height), "largest": 1.0}))
    with run_app(model_path, tmp_path / "a.lance") as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        page.fill("#query", caption)
        page.press("#query", "Enter")
        page.get_by_text("21 of the nearest are hidden").wait_for()
        assert page.locator("#hits li").count() == 3
        assert page.locator("#more").is_hidden()
        page.click("#unlikely")
        page.locator("#hits li").nth(23).wait_for()
        assert page.locator("#unlikely").is_hidden()
        page.close()
        file.write_text(json.dumps(json.loads(file.read_text()) | {"deviations": 99.0}))
    with run_app(model_path, tmp_path / "a.lance") as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        page.fill("#query", caption)
        page.press("#query", "Enter")
        page.get_by_text("Perhaps no image shows this. 24 images, best first").wait_for()
        page.close()
