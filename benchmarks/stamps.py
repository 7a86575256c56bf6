"""Held-out recall of the quickstart's run over five splits of the stamps' captions.

A fifth of the distinct captions (125) is never seen. Chance is 0.008 at 1 and 0.04 at 5. "Last" is the model
after the last step; "best" is the checkpoint kept by recall on these same captions, so it is a little too good.
The closed form is taken apart, too: a linear head instead of a kernel, what the classifier alone gives, what the
training pairs alone give, and both with plain instead of whitened image vectors.

    python benchmarks/stamps.py [--quick]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table
from timing import arguments, console, finish

import lamplit
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.tuning import closed_form
from lamplit.tuning.split import held_out_recall, split_store

METRICS = ("image_to_text/recall@1", "image_to_text/recall@5", "text_to_image/recall@1", "text_to_image/recall@5")
EVERYTHING_ALIKE = 1e9  # so much shrinkage leaves nothing of the covariance: image vectors stay as they are


def main() -> None:
    options = arguments(__doc__ or "")
    seeds = range(2 if options.quick else 5)
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "stamps.lance"
        lamplit.embed(lamplit.fetch("stamps"), store, image_tower="demo:efficientnet-lite0", progress=True)
        for seed in seeds:
            for name, metrics in closed_forms(lamplit.Store(store), seed).items():
                results.setdefault(name, []).append(metrics)
            settings = lamplit.TuneSettings(text_tower="demo:minilm", seed=seed, epochs=1 if options.quick else None)
            report = lamplit.tune(store, Path(folder) / str(seed), settings, progress=True)
            results.setdefault("closed form as it is", []).append(report.start)
            results.setdefault("tuned: last step", []).append(report.last)
            results.setdefault("tuned: best checkpoint", []).append(report.best)
    short = [
        metric.replace("image_to_text", "image to caption").replace("text_to_image", "caption to image")
        for metric in METRICS
    ]
    table = Table("held-out", *short, title=f"mean and deviation over {len(seeds)} splits of the stamps")
    for name, rows in results.items():
        cells = [[row[metric] for row in rows] for metric in METRICS]
        table.add_row(name, *(f"{mean(values):.3f} ± {stdev(values):.3f}" for values in cells))
    console.print(table)
    options.turns = len(seeds)
    finish(options, [{"title": "stamps", "seeds": list(seeds), "results": results}])


def closed_forms(store: lamplit.Store, seed: int) -> dict[str, dict[str, float]]:
    """Held-out recall of closed forms that lack a part."""
    tower = lamplit.open_image_tower(store.tower.spec)
    split = split_store(store, "texts", 0.2, seed)
    train, held_out = split.train, split.held_out
    zimg, texts = store.vectors(), [train.texts[i] for i in train.text_index.tolist()]
    text_tower = lamplit.open_text_tower("demo:minilm", width=tower.width)
    linear = text_tower.head
    kernel = KernelHead(linear.in_features, tower.width, closed_form.count_anchors(train.texts, tower.class_head))
    model = lamplit.LiT(text_tower, store.tower)

    def measure() -> dict[str, float]:
        return held_out_recall(zimg, model.encode_texts(held_out.texts), held_out)

    parts: dict[str, tuple[Any, Any, dict[str, float]]] = {
        "linear head": (linear, tower.class_head, {}),
        "classifier alone": (kernel, tower.class_head, {"PAIR_WEIGHT": 1e-9}),
        "training pairs alone": (kernel, None, {}),
        "plain image vectors": (kernel, tower.class_head, {"SHRINKAGE": EVERYTHING_ALIKE}),
    }
    results = {}
    known = cache(closed_form.text_features)  # no head changes them
    for name, (text_tower.head, class_head, constants) in parts.items():
        with changed(text_features=lambda tower, texts: known(tower, tuple(texts)), **constants):
            closed_form.fit_head(text_tower, zimg[train.image_index], texts, class_head)
        results[f"closed form: {name}"] = measure()
    return results


@contextmanager
def changed(**constants: Any) -> Iterator[None]:
    """Run with other constants and functions of the closed form."""
    before = {name: getattr(closed_form, name) for name in constants}
    for name, value in constants.items():
        setattr(closed_form, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(closed_form, name, value)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
