"""The map of a store: how long it takes to make, how true its neighbours are, and how soon a browser shows it.

    python benchmarks/map.py MODEL STORE [--quick] [--json FILE]

Three parts:
1. `lamplit map` on a copy of the store, in a process of its own, imports and compiling included;
2. of the ten nearest images of some, the part that is among the thirty nearest on the map, and on the principal axes;
3. `lamplit app` in Chromium: from the click on Explore to the drawn map, the first time and when the server knows it;
   to the names of the regions; from a turn of the wheel to the next frame; colouring by words; a rectangle.

Without a GPU, Chromium draws in software, on the same cores as the server. `--quick` takes the quickstart's model and
store, if none are given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page import server
from playwright.sync_api import Page, sync_playwright

from lamplit.retrieval.projection import find_map, principal_axes, sample_rows
from lamplit.store.arrays.row_vectors import read_vectors
from lamplit.store.lance_store import Store

NEAREST, ON_MAP = 10, 30
WORDS = ["an animal", "a house", "an arrow", "food", "a car"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/quickstart/model")
    parser.add_argument("store", nargs="?", default="runs/quickstart/stamps.lance")
    parser.add_argument("--quick", action="store_true", help="fewer queries")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / Path(options.store).name
        shutil.copytree(options.store, copied, ignore=shutil.ignore_patterns("_search"))
        figures = [made(copied), true(copied, 50 if options.quick else 1000), shown(options.model, copied)]
    for part in figures:
        print(json.dumps(part, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}, indent=2) + "\n")


def made(store: Path) -> dict[str, Any]:
    """Make the map by the command; return its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lamplit", "map", str(store), "--json"], check=True, capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    return {"images": report["images"], "laid_out": report["laid_out"], "seconds": time.perf_counter() - began}


def true(path: Path, count: int) -> dict[str, float]:
    """Compare neighbours in the store with neighbours on the map, and on the principal axes."""
    store = Store(path)
    vectors, found = read_vectors(store, store.center), find_map(store)
    assert found is not None
    everything = vectors[torch.arange(len(store))]
    rows = torch.from_numpy(sample_rows(len(store), count))
    near = _nearest(everything @ everything[rows].T, rows, NEAREST)
    places = {"map": found.points, "axes": principal_axes(vectors).points}
    parts = {}
    for name, points in places.items():
        place = torch.from_numpy(np.asarray(points))
        seen = _nearest(-torch.cdist(place, place[rows]), rows, ON_MAP)
        parts[name] = statistics.mean(len(set(a) & set(b)) / len(a) for a, b in zip(near, seen, strict=True))
    return parts


def _nearest(scores: torch.Tensor, rows: torch.Tensor, count: int) -> list[list[int]]:
    """Return the best other rows of each column of (N, n) scores."""
    scores[rows, torch.arange(len(rows))] = -torch.inf
    best: list[list[int]] = scores.T.topk(min(count, len(scores) - 1)).indices.tolist()
    return best


def shown(model: str, store: Path) -> dict[str, Any]:
    """Open the page in Chromium, and time what somebody waits for."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with server(model, str(store), 1) as (address, *_), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        seconds = {}
        for turn in ("first", "again"):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(120_000)
            page.goto(address)
            page.wait_for_selector("html[data-ready]")
            began = time.perf_counter()
            page.click("nav a[href='#explore']")
            page.wait_for_selector("#map[data-drawn]")
            seconds[f"drawn, {turn}"] = time.perf_counter() - began
            page.wait_for_selector("#map[data-named]")
            seconds[f"names, {turn}"] = time.perf_counter() - began
        page.wait_for_timeout(1000)
        moves = moved(page)
        seconds["wheel to frame, median"], seconds["wheel to frame, worst"] = statistics.median(moves), max(moves)
        seconds["colour by words, median"] = statistics.median(coloured(page, words) for words in WORDS)
        seconds["rectangle to number"] = chosen(page)
        browser.close()
    return {name: round(value, 3) for name, value in seconds.items()}


def moved(page: Page) -> list[float]:
    box = page.locator("#map").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    moves = []
    for turn in range(20):
        began = time.perf_counter()
        page.mouse.wheel(0, -60 if turn < 10 else 60)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        moves.append(time.perf_counter() - began)
    return moves


def coloured(page: Page, words: str) -> float:
    began = time.perf_counter()
    page.fill("#colour-query", words)
    page.press("#colour-query", "Enter")
    page.get_by_text(f"cosine to “{words}”").wait_for()
    return time.perf_counter() - began


def chosen(page: Page) -> float:
    box = page.locator("#map").bounding_box()
    assert box is not None
    page.click("#choose-rectangle")
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"] + 500, steps=5)
    page.mouse.up()
    began = time.perf_counter()
    page.wait_for_selector("#chosen:not([hidden])")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
