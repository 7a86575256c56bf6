"""Take screenshots of the web page: four tabs at desktop and phone width, in light and dark.

Run with: python docs/page.py runs/quickstart/model runs/quickstart/stamps.lance [FOLDER], after `make quickstart`.
Needs `pip install 'lamplit[app]' playwright` and a Chromium on the PATH. The docs show some of them, joined in
docs/page-*.png; FOLDER gets all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import lamplit

DOCS = Path(__file__).parent
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
CLASSES = ["an animal", "a fruit", "a musical instrument", "a vehicle", "a piece of clothing"]
STAMPS = [
    "animals/birds/owl.png",
    "food/fruit/banana.png",
    "hobbies/music/string/guitar_classical.png",
    "vehicles/auto/sportscar.png",
    "clothes/hats/tophat.png",
]
SHOWN = {  # file in docs/ to the screenshots in it, side by side
    "page-search.png": ["search-desktop-light", "search-phone-dark"],
    "page-classify.png": ["classify-desktop-dark", "classify-phone-light"],
    "page-explore.png": ["explore-desktop-light", "explore-phone-dark"],
    "page-run.png": ["run-desktop-dark", "run-phone-light"],
}


def main() -> None:
    model, store = sys.argv[1:3]
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium on the PATH; on Debian type: apt install chromium")
    with served(model, store) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for width, (columns, rows) in WIDTHS.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    viewport={"width": columns, "height": rows}, color_scheme=scheme, device_scale_factor=1,
                    has_touch=width == "phone", is_mobile=width == "phone",
                )  # fmt: skip
                page = context.new_page()
                for name, visit in {"search": search, "classify": classify, "explore": explore, "run": run}.items():
                    page.goto(f"{address}#{name}")
                    page.wait_for_selector("html[data-ready]")
                    visit(page)
                    page.wait_for_load_state("networkidle")
                    page.wait_for_timeout(300)
                    page.screenshot(path=folder / f"{name}-{width}-{scheme}.png")
                    print(name, width, scheme)
                page.goto(f"{address}#search")
                search(page)
                page.locator("#hits button").first.click()
                page.wait_for_selector("#neighbours li")
                page.wait_for_load_state("networkidle")
                page.screenshot(path=folder / f"detail-{width}-{scheme}.png")
                context.close()
        browser.close()
    for file, names in SHOWN.items():
        put_together([folder / f"{name}.png" for name in names], DOCS / file)


@contextmanager
def served(model: str, store: str) -> Iterator[str]:
    """Run `lamplit app` on a free port; yield its address."""
    command = [sys.executable, "-c", "from lamplit.cli.main import main; main()", "app", model, store, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            found = re.search(r"http://\S+", line)
            assert found, f"lamplit app said: {line!r}"
            yield found.group()
        finally:
            process.terminate()


def search(page: Page) -> None:
    page.fill("#query", "a horse")
    page.press("#query", "Enter")
    page.wait_for_selector("#hits li")


def classify(page: Page) -> None:
    page.fill("#classes", "\n".join(CLASSES))
    stamps = lamplit.fetch("stamps").parent / "images"
    page.set_input_files("#classify-files", [stamps / name for name in STAMPS])
    page.locator("#classified .bars").nth(4).wait_for()


def explore(page: Page) -> None:
    page.wait_for_selector("#map[data-drawn]")
    page.wait_for_selector("#map[data-named]")
    if page.viewport_size["width"] < 500:
        for _ in range(3):
            page.click("#zoom-in")
        page.wait_for_timeout(4000)  # images of the map come one by one
    page.evaluate("window.scrollTo(0, 0)")


def run(page: Page) -> None:
    page.wait_for_selector(".curves svg")


def put_together(files: list[Path], out: Path) -> None:
    """Place screenshots side by side, as high as the highest, in 256 colours."""
    shots = [Image.open(file).convert("RGB") for file in files]
    sheet = Image.new("RGB", (sum(shot.width for shot in shots) + 20, max(shot.height for shot in shots)), "#888")
    left = 0
    for shot in shots:
        sheet.paste(shot, (left, 0))
        left += shot.width + 20
    sheet.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main()
