"""Our losses against open_clip's: time, memory and exactness.

    python benchmarks/loss.py                      # B = 4096 to 32768: needs 20 GB for ClipLoss, takes 20 minutes
    python benchmarks/loss.py --sizes 4096 8192    # what fits into a laptop
    python benchmarks/loss.py --quick              # seconds; its figures mean nothing

All runs are those of a locked image tower: the texts and the scale need a gradient, the images do not. D = 512.

Time: both sides take turns in one process (A B A B ...), so that a busy machine slows both. Reported are medians
of forward and backward pass together, their spread (largest less smallest, over the median), and the ratio.

Memory: each side runs alone in a fresh process, after a small run that loads what is loaded once. A thread reads
the resident size every millisecond; reported is the highest reading less the one before the run, when the inputs
are already in memory. The gradient itself is part of it: 64 MiB at B = 32768.

Exactness: the relative error (norm) of the texts' gradient against the plain loss in float64.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import in_turn, product_rate
from torch import Tensor

from lamplit.losses.contrastive import sigmoid_loss, softmax_loss

WIDTH = 512
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def open_side(name: str) -> Loss:
    """The loss of that name, called with images, texts, scale and bias."""
    if name == "softmax_loss":
        return lambda zimg, ztxt, scale, bias: softmax_loss(zimg, ztxt, scale)
    if name == "sigmoid_loss":
        return sigmoid_loss
    from open_clip.loss import ClipLoss, SigLipLoss  # slow to import, and not needed to measure our memory

    if name == "SigLipLoss":
        return SigLipLoss()
    plain = ClipLoss()
    if name == "compiled ClipLoss":
        plain = torch.compile(plain)
    return lambda zimg, ztxt, scale, bias: plain(zimg, ztxt, scale)


def make_pairs(size: int, similarity: float = 1.0) -> tuple[Tensor, Tensor]:
    """Images and texts, (size, D), whose true pairs have a mean cosine of 0.7 if similarity is 1."""
    generator = torch.Generator().manual_seed(0)
    zimg = F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1)
    noise = F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1)
    return zimg, F.normalize(noise.add_(zimg, alpha=similarity), dim=1)


def step(loss: Loss, zimg: Tensor, ztxt: Tensor, scale: float, bias: float = -10.0) -> tuple[float, Tensor]:
    """One forward and backward pass: the loss and the texts' gradient."""
    ztxt = ztxt.detach().requires_grad_()
    scalars = [torch.tensor(x, dtype=zimg.dtype, requires_grad=True) for x in (scale, bias)]
    value = loss(zimg, ztxt, *scalars)
    value.backward()
    assert ztxt.grad is not None
    return value.item(), ztxt.grad


def time_sides(names: list[str], size: int, turns: int) -> dict[str, list[float]]:
    """Seconds of each side's turns; the first, untimed turn warms up."""
    pairs = make_pairs(size)
    sides = {name: partial(step, open_side(name), *pairs, scale=50.0) for name in names}
    return in_turn(sides, turns)


def measure_memory(name: str, size: int) -> float:
    """Peak of the resident size above the inputs, in MB, of one run in this process."""
    loss = open_side(name)
    step(loss, *make_pairs(64), scale=50.0)
    pairs = make_pairs(size)
    gc.collect()
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(loss, *pairs, scale=50.0)
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def memory_of(name: str, size: int, threads: int) -> float:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", name, str(size)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout)


def compare(names: list[str], size: int, turns: int, threads: int, products: int) -> dict[str, Any]:
    """Time and memory of open_clip's loss (the first name) and of ours (the last).

    `products` is how many products of B × B × D numbers ours takes.
    """
    seconds = time_sides(names, size, turns)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    sides = {
        name: {
            "seconds": seconds[name],
            "median": medians[name],
            "spread": (max(seconds[name]) - min(seconds[name])) / medians[name],
            "times_faster": medians[names[0]] / medians[name],
            "peak_megabytes": memory_of(name, size, threads),
        }
        for name in names
    }
    limit = medians[names[0]] / (products * 2 * size**2 * WIDTH / product_rate())
    return {"size": size, "sides": sides, "limit": limit, "products": products}


def exactness_cases(size: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    zimg, _ = make_pairs(size)
    signs = torch.ones(size, 1)
    signs[1::2] = -1
    line = zimg[:1] * signs
    return {
        "untrained, scale 10": (*make_pairs(size, similarity=0.0), 10.0),
        "half-trained, scale 20": (*make_pairs(size, similarity=0.3), 20.0),
        "trained, scale 20": (*make_pairs(size, similarity=0.5), 20.0),
        "untrained, scale 100": (*make_pairs(size, similarity=0.0), 100.0),
        # Every pair at cosine -1, half of the others at +1: exp(200) is far outside of float32.
        "adversarial, scale 100": (line, -line, 100.0),
    }


def measure_exactness(names: list[str], size: int) -> list[dict[str, Any]]:
    """Loss and gradient error of each side in each case."""
    rows = []
    plain = open_side(names[0])
    for case, (zimg, ztxt, scale) in exactness_cases(size).items():
        expected_loss, expected = step(plain, zimg.double(), ztxt.double(), scale)
        errors, values = {}, {}
        for name in names:
            values[name], gradient = step(open_side(name), zimg, ztxt, scale)
            errors[name] = float((gradient.double() - expected).norm() / expected.norm())
        rows.append({"case": case, "float64_loss": expected_loss, "losses": values, "errors": errors})
    return rows


def show_comparisons(console: Console, title: str, comparisons: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("B", "loss", "median s", "spread", "times faster", "peak MB"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for comparison in comparisons:
        for name, side in comparison["sides"].items():
            numbers = f"{side['median']:.3f}", f"{side['spread']:.0%}", f"{side['times_faster']:.2f}"
            table.add_row(str(comparison["size"]), name, *numbers, f"{side['peak_megabytes']:.0f}")
        table.add_section()
    console.print(table)
    limits = ", ".join(f"{comparison['limit']:.2f} at {comparison['size']}" for comparison in comparisons)
    products = comparisons[0]["products"]
    console.print(f"limit, if ours were {products} products at this machine's speed and nothing else: {limits}\n")


def show_exactness(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in (
        "case",
        "loss in float64",
        *(f"{name}: {x}" for name in rows[0]["errors"] for x in ("loss", "error")),
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        cells = [x for name in row["errors"] for x in (f"{row['losses'][name]:.6f}", f"{row['errors'][name]:.1e}")]
        table.add_row(row["case"], f"{row['float64_loss']:.6f}", *cells)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our losses against open_clip's: time, memory and exactness.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one turn, to see that it runs")
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes of the softmax loss")
    parser.add_argument("--sigmoid-size", type=int, help="batch size of the sigmoid loss")
    parser.add_argument("--turns", type=int, help="timed runs of each side (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile(ClipLoss)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--memory-of", nargs=2, metavar=("LOSS", "B"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.sizes = arguments.sizes or ([256] if arguments.quick else [4096, 8192, 16384, 32768])
    arguments.sigmoid_size = arguments.sigmoid_size or (256 if arguments.quick else 8192)
    arguments.turns = arguments.turns or (1 if arguments.quick else 5)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        name, size = arguments.memory_of
        print(measure_memory(name, int(size)))
        return
    console = Console()
    names = ["ClipLoss", *(["compiled ClipLoss"] if arguments.compile else []), "softmax_loss"]
    peers = ["SigLipLoss", "sigmoid_loss"]
    turns, threads = arguments.turns, arguments.threads
    exactness_size = 256 if arguments.quick else 2048
    results = {
        "torch": torch.__version__,
        "threads": threads,
        "softmax": [compare(names, size, turns, threads, products=3) for size in arguments.sizes],
        "sigmoid": [compare(peers, arguments.sigmoid_size, turns, threads, products=2)],
        "softmax_exactness": measure_exactness(["ClipLoss", "softmax_loss"], exactness_size),
        "sigmoid_exactness": measure_exactness(peers, exactness_size),
    }
    show_comparisons(console, f"softmax, D = {WIDTH}, {threads} threads", results["softmax"])
    show_comparisons(console, f"sigmoid, D = {WIDTH}, {threads} threads", results["sigmoid"])
    show_exactness(console, f"softmax, float32 against float64, B = {exactness_size}", results["softmax_exactness"])
    show_exactness(console, f"sigmoid, float32 against float64, B = {exactness_size}", results["sigmoid_exactness"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
