"""The figures of evaluation.md: the quickstart's model on Fashion-MNIST's test images and the stamps' categories.

These are not the paper's figures: the model was tuned in two minutes on 562 captions. They show what the commands print
on real data.

    make quickstart
    .venv/bin/python docs/evaluation.py

writes `docs/evaluation/` (report.md, report.csv, report.json, report.html and an image of it, which needs Chromium
and playwright) and runs/evaluation (the results).
"""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import lamplit
from lamplit.data.named.packages import fetch_debian_package

MODEL = Path("runs/quickstart/model")
RESULTS = Path("runs/evaluation")
PAGE = Path(__file__).parent / "evaluation"


def main() -> None:
    """Measure both data sets, zero-shot and with a 10-shot probe, and write the report."""
    fashion = fashion_mnist(RESULTS / "data")
    # Results name a model and a folder of classes after their folders.
    model = link(RESULTS / "quickstart", MODEL)
    stamps = link(RESULTS / "stamps", lamplit.fetch("stamps").parent / "images")
    shutil.rmtree(RESULTS / "results", ignore_errors=True)
    on = {"fashion-mnist": fashion, "folder": stamps}
    lamplit.run_benchmarks(model, on, out=RESULTS / "results", few_shot=10, workers=1, progress=True)
    lamplit.write_report(RESULTS / "results", out=PAGE)
    photograph(PAGE / "report.html", PAGE / "report.png")


def photograph(page: Path, file: Path) -> None:
    """Take a screenshot of the page at desktop width, in few colours."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1100, "height": 900})
        shown.goto(page.resolve().as_uri())
        taken = Image.open(io.BytesIO(shown.screenshot(full_page=True))).convert("RGB")
        browser.close()
    taken.quantize(128).save(file, optimize=True)


def link(name: Path, target: Path) -> Path:
    """Give a folder another name by a link."""
    name.unlink(missing_ok=True)
    name.symlink_to(target.resolve(), target_is_directory=True)
    return name


def fashion_mnist(root: Path) -> Path:
    """Arrange Debian's copy as torchvision reads it."""
    raw = root / "FashionMNIST" / "raw"
    if not raw.is_dir():
        with tempfile.TemporaryDirectory() as work:
            package = fetch_debian_package("dataset-fashion-mnist", Path(work))
            raw.mkdir(parents=True)
            for file in (package / "usr/share/datasets/fashion-mnist").glob("*.gz"):
                (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return root


if __name__ == "__main__":
    main()
