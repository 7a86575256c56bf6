"""The page for those who do not see it, do not point, or see it badly: read from Chromium's accessibility tree."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import test_page
from playwright.sync_api import Browser, Page
from test_page import in_a_browser, run_app

import lamplit

IMAGES = {"image", "img", "Canvas", "canvas", "graphics-document"}
CONTROLS = {"button", "link", "textbox", "searchbox", "combobox", "checkbox", "DisclosureTriangle", "application"}
PARTS = ["search", "classify", "explore", "run", "dialog", "docs"]

browser = test_page.browser
pytestmark = pytest.mark.xdist_group("accessibility")  # twelve parts of the page are opened once, not in each process


@pytest.fixture(scope="module")
def running(
    model_path: Path, store_path: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Run `lamplit app` with a model that has a run's curves beside it; yield its address."""
    folder = tmp_path_factory.mktemp("app")
    model = shutil.copytree(model_path, folder / "model")
    settings = lamplit.TuneSettings(f"hf:{text_folder}", steps=6, batch_size=16, val_fraction=0.3)
    lamplit.tune(store_path, folder / "run", settings)
    for name in ("log.jsonl", "settings.json", "report.json"):
        shutil.copy(folder / "run" / name, model)
    with run_app(model, store_path) as address:
        yield address


def show(page: Page, running: str, part: str, image_file: Path) -> None:
    """Bring a part of the page to where it shows all that it can."""
    page.goto(f"{running}docs" if part == "docs" else running)
    if part == "docs":
        page.get_by_text("POST /classify").wait_for()
        return
    page.wait_for_selector("html[data-ready]")
    if part not in ("search", "dialog"):
        page.click(f"nav a[href='#{part}']")
    match part:
        case "search" | "dialog":
            page.click("#filter summary")
            page.select_option("#filter-column", "shape")
            page.fill("#filter-value", "cross")
            page.press("#filter-value", "Enter")
            page.set_input_files("#search-file", image_file)
            page.locator("#hits li").nth(11).wait_for()
            if part == "dialog":
                page.locator("#hits button").first.click()
                page.locator("#neighbours li").nth(11).wait_for()
        case "classify":
            page.click("summary:has-text('Templates')")
            page.fill("#classes", "circle\nring\nsquare")
            broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"no image"}
            page.set_input_files("#classify-files", image_file)
            page.locator("#classified .bars li").nth(2).wait_for()
            page.set_input_files("#classify-files", [broken])
            page.get_by_text("This image cannot be used").wait_for()
        case "explore":
            page.locator("#map[data-drawn]").wait_for()
            page.locator("#regions:not([hidden]) summary").click()
            page.fill("#colour-query", "ring")
            page.press("#colour-query", "Enter")
            page.get_by_text("cosine to “ring”").wait_for()
        case "run":
            page.get_by_text("All settings").click()
            page.locator(".curves svg").nth(3).wait_for()


@pytest.fixture(scope="module")
def image_file(image_folder: Path) -> Path:
    [file] = image_folder.glob("large_blue_cross.*")
    return file


@pytest.fixture(scope="module", params=[(part, scheme) for part in PARTS for scheme in ("light", "dark")], ids="-".join)
def page(request: pytest.FixtureRequest, browser: Browser, running: str, image_file: Path) -> Iterator[Page]:
    """A part of the page, in light or dark; the tests change nothing but the focus."""
    part, scheme = request.param
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    show(opened, running, part, image_file)
    yield opened
    context.close()


# --- What a screen reader is told


def tree(page: Page) -> list[dict[str, Any]]:
    """Nodes of Chromium's accessibility tree that are not ignored, in their order: role, name and properties."""
    session = page.context.new_cdp_session(page)
    session.send("Accessibility.enable")
    nodes = {node["nodeId"]: node for node in session.send("Accessibility.getFullAXTree")["nodes"]}
    ordered: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        if not node["ignored"]:
            properties = {each["name"]: each["value"].get("value") for each in node.get("properties", [])}
            name = node.get("name", {}).get("value", "").strip()
            ordered.append({"role": node["role"]["value"], "name": name, **properties})
        for child in node.get("childIds", []):
            if child in nodes:
                walk(nodes[child])

    walk(next(node for node in nodes.values() if "parentId" not in node))
    session.detach()
    return ordered


@pytest.mark.slow
@in_a_browser
def test_what_a_screen_reader_is_told(page: Page) -> None:
    nodes = tree(page)
    roles = [node["role"] for node in nodes]
    is_dialog = "dialog" in roles  # behind it nothing is there
    assert len(nodes) > 20
    for node in nodes:
        is_control = node["role"] in CONTROLS or (node.get("focusable") and node["role"] != "main")  # a skip link's aim
        assert node["name"] or not is_control, f"no name: {node}"
        assert node["name"] or node["role"] not in IMAGES, f"no name: {node}"
    levels = [int(node["level"]) for node in nodes if node["role"] == "heading"]
    assert levels[0] == (2 if is_dialog else 1)
    assert all(below <= above + 1 for above, below in pairwise(levels)), levels
    assert is_dialog or levels.count(1) == 1
    assert roles.count("main") == (0 if is_dialog else 1)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.title()


# --- Contrast, as in WCAG 2.2: 1.4.3 for text, 1.4.11 for what shows the focus

COLORS = """
const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const rgba = (color) => {  // of any kind of colour that CSS knows
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
};
const behind = (element) => {  // what lies behind it, nearest first
    const layers = [];
    for (let each = element; each; each = each.parentElement) {
        layers.push(rgba(getComputedStyle(each).backgroundColor));
        if (each.matches("dialog")) return [...layers];
    }
    return [...layers, [255, 255, 255, 255]];
};
"""
TEXTS = f"""() => {{ {COLORS}
    const found = [];
    const root = document.querySelector("dialog[open]") ?? document.body;
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {{
        const element = walker.currentNode.parentElement;
        const text = walker.currentNode.data.trim();
        if (!text || element.closest("script, noscript, datalist") || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        found.push([text, rgba(element.closest("svg") ? style.fill : style.color), behind(element)]);
    }}
    for (const input of document.querySelectorAll("[placeholder]")) {{
        const {{ color }} = getComputedStyle(input, "::placeholder");
        if (input.checkVisibility()) found.push([input.placeholder, rgba(color), behind(input)]);
    }}
    return found;
}}"""


def flatten(layers: list[list[int]]) -> list[float]:
    """Lay colours over one another, the first on top; the last is opaque."""
    *above, color = ([float(part) for part in layer] for layer in layers)
    for red, green, blue, alpha in reversed(above):
        part = alpha / 255
        color = [part * over + (1 - part) * under for over, under in zip((red, green, blue), color[:3], strict=True)]
    return color[:3]


def luminance(color: list[float]) -> float:
    shares = [part / 255 for part in color]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(color: list[int], layers: list[list[int]]) -> float:
    low, high = sorted((luminance(flatten([color, *layers])), luminance(flatten(layers))))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag() -> None:
    white, black, grey = [255, 255, 255, 255], [0, 0, 0, 255], [118, 118, 118, 255]
    assert contrast(black, [white]) == pytest.approx(21)
    assert contrast(grey, [white]) == pytest.approx(4.54, abs=0.005)  # the lightest grey that passes on white
    assert contrast([0, 0, 0, 128], [[0, 0, 0, 0], white]) == pytest.approx(contrast([127, 127, 127, 255], [white]))


@pytest.mark.slow
@in_a_browser
def test_text_stands_out(page: Page) -> None:
    texts = page.evaluate(TEXTS)
    assert len(texts) > 10
    faint = {text: round(contrast(*colors), 2) for text, *colors in texts if contrast(*colors) < 4.5}
    assert not faint


# --- The keyboard

REACHABLE = """() => [...(document.querySelector("dialog[open]") ?? document).querySelectorAll(
        "a[href], button, input, select, textarea, summary, [tabindex='0']")]
    .filter((each) => each.checkVisibility() && !each.disabled)
    .map((each, number) => { each.dataset.number = number; return each.outerHTML.slice(0, 120); })"""
FOCUSED = f"""() => {{ {COLORS}
    const focused = document.activeElement;
    if (focused === document.body || !focused.dataset.number) return null;
    const outlined = [focused, focused.closest("label")].filter(Boolean).find((each) => {{
        const {{ outlineStyle, outlineWidth, opacity }} = getComputedStyle(each);
        return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2 && opacity !== "0";
    }});
    if (!outlined) return [focused.dataset.number, null, null];
    const {{ outlineColor, outlineOffset }} = getComputedStyle(outlined);
    const ground = parseFloat(outlineOffset) < 0 ? outlined : outlined.parentElement;
    return [focused.dataset.number, rgba(outlineColor), behind(ground)];
}}"""


@pytest.mark.slow
@in_a_browser
def test_tab_reaches_all_and_shows_where_it_is(page: Page) -> None:
    controls = page.evaluate(REACHABLE)
    reached: dict[str, Any] = {}
    for _ in range(2 * len(controls) + 10):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        if focused is not None:
            reached[controls[int(focused[0])]] = focused[1:]
    assert not set(controls) - set(reached)
    for control, (outline, layers) in reached.items():
        assert outline is not None, f"nothing shows that this has the focus: {control}"
        assert contrast(outline, layers) >= 3, control


# --- The finger

TARGETS = """() => [...(document.querySelector("dialog[open]") ?? document).querySelectorAll(
        "a[href], button, input, select, textarea, summary")]
    .filter((each) => each.checkVisibility() && !each.matches(".skip, .unseen"))
    .concat([...document.querySelectorAll("label:has(.unseen)")].filter((each) => each.checkVisibility()))
    .map((each) => {
        const box = (each.closest("label") ?? each).getBoundingClientRect();  // a label is a target, too
        return [each.outerHTML.slice(0, 120), Math.min(box.width, box.height)];
    })"""


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("part", PARTS)
def test_finger_has_room(browser: Browser, running: str, image_file: Path, part: str) -> None:
    """Targets of 24 pixels and more (WCAG 2.2, 2.5.8), those in a sentence too, though they need not."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    phone = context.new_page()
    show(phone, running, part, image_file)
    targets = phone.evaluate(TARGETS)
    context.close()
    assert targets
    assert not [target for target in targets if target[1] < 24]
