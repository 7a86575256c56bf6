"""One loss over two processes on this machine, against open_clip's ClipLoss: time, bytes and exactness.

    python benchmarks/distributed.py            # B = 2048 to 8192: minutes on two cores
    python benchmarks/distributed.py --quick    # seconds; its figures mean nothing
    python benchmarks/distributed.py --link 1000 100    # with a link of 1,000 and of 100 megabits a second between them

A locked image tower: the texts and the scale need a gradient, the images do not. D = 512. Both processes have a thread
and talk through gloo on loopback. Ours read the vectors of all images, as `lamplit tune` does from the store. Those of
open_clip have half of the images each, and gather them (`gather_with_grad`, with and without `local_loss`).

Time: forward and backward pass together, both sides in turn; the slower of the two processes counts. Bytes: what the
system counts on loopback in a turn, the least of all turns, because other programs may use it, too. Exactness: the
relative error (norm) of the texts' gradient against the plain loss of one process in float64; with open_clip after the
mean over the processes that DistributedDataParallel takes.

With `--link`, each process has a network namespace of its own, and a card that sends so many megabits a second (as
root, on Linux, with iproute2). Bytes are what went over the link both ways, with all headers. Where the system does not
let us, both talk on loopback, half of the bytes are taken to go each way, and the time of the link is reckoned and
added: the title says so. The sum of the text tower's gradients, which both sides need, is not part of this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from limited_link import LOOPBACK, End, limited_link
from timing import compare, console, filled, finish, parser
from torch import Tensor

from lamplit.losses.shares import softmax_share
from lamplit.tuning.ranks import Ranks

WIDTH, SIZE, SCALE = 512, 2, 20.0
OURS, GATHERED, LOCAL = "lamplit", "open_clip, gather_with_grad", "open_clip, gather_with_grad and local_loss"
Side = Callable[[], Tensor]  # the gradient of the own texts


def make_pairs(count: int) -> tuple[Tensor, Tensor]:
    """Images and texts, (count, D), whose true pairs have a mean cosine of 0.7."""
    generator = torch.Generator().manual_seed(0)
    zimg = F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1)
    return zimg, F.normalize(F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1) + zimg, dim=1)


def exact_gradient(zimg: Tensor, ztxt: Tensor) -> Tensor:
    """Of the texts, by one process in float64."""
    texts = ztxt.double().requires_grad_()
    logits = SCALE * zimg.double() @ texts.T
    target = torch.arange(len(zimg))
    torch.autograd.backward((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    assert texts.grad is not None
    return texts.grad


def open_sides(rank: int, zimg: Tensor, ztxt: Tensor) -> dict[str, Side]:
    """Ours, and open_clip's two."""
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)
    from open_clip.loss import ClipLoss

    rows = torch.arange(len(zimg)).chunk(SIZE)[rank]
    ranks = Ranks(rank, SIZE)

    def ours() -> Tensor:
        texts, scale = ztxt[rows].requires_grad_(), torch.tensor(SCALE, requires_grad=True)
        torch.autograd.backward(softmax_share(zimg, texts, rows, scale, ranks.exchange))
        assert texts.grad is not None
        return texts.grad

    def theirs(local: bool) -> Side:
        loss = ClipLoss(local_loss=local, gather_with_grad=True, cache_labels=True, rank=rank, world_size=SIZE)

        def run() -> Tensor:
            texts, scale = ztxt[rows].requires_grad_(), torch.tensor(SCALE, requires_grad=True)
            torch.autograd.backward(loss(zimg[rows], texts, scale))
            assert texts.grad is not None
            return texts.grad / SIZE

        return run

    return {OURS: ours, GATHERED: theirs(False), LOCAL: theirs(True)}


def work(rank: int, count: int, turns: int, end: End, meeting: Path) -> None:
    """Run all sides in turn as one process; the first one saves what was measured."""
    os.environ["GLOO_SOCKET_IFNAME"] = end.interface
    torch.set_num_threads(1)
    store = dist.FileStore(str(meeting / "store"), SIZE)  # files are seen in both namespaces
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(minutes=5))
    zimg, ztxt = make_pairs(count)
    sides = open_sides(rank, zimg, ztxt)
    expected = exact_gradient(zimg, ztxt).chunk(SIZE)[rank]
    found: dict[str, Any] = {"seconds": {name: [] for name in sides}, "bytes": {}, "errors": {}}
    for turn in range(turns + 1):  # the first warms up
        for name, side in sides.items():
            dist.barrier()
            before, began = moved(end), time.perf_counter()
            gradient = side()
            taken = torch.tensor([time.perf_counter() - began, float((gradient - expected).norm() / expected.norm())])
            dist.barrier()
            bytes_moved = moved(end) - before
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn:
                found["seconds"][name].append(float(taken[0]))
            found["bytes"][name] = min(bytes_moved, found["bytes"].get(name, bytes_moved))
            found["errors"][name] = float(taken[1])
    if rank == 0:
        torch.save(found, meeting / "found")
    dist.destroy_process_group()


def moved(end: End) -> int:
    """Bytes that went between the processes so far, both ways."""
    counted = psutil.net_io_counters(pernic=True)[end.interface]
    return int(counted.bytes_sent + (counted.bytes_recv if end.command else 0))  # loopback receives what it sends


def measure(count: int, turns: int, megabits: float | None) -> dict[str, Any]:
    """Start the processes; print and return what they found."""
    with link(megabits) as ends, TemporaryDirectory() as folder:
        words = [str(count), str(turns), folder]
        here = [sys.executable, __file__, "--work"]
        processes = [
            subprocess.Popen([*end.command, *here, str(rank), *words, *end.command, end.interface])
            for rank, end in enumerate(ends)
        ]
        if any([process.wait() for process in processes]):
            raise SystemExit("a process failed")
        found = torch.load(Path(folder) / "found", weights_only=True)
        is_measured = bool(ends[0].command)
    title = f"softmax loss over {SIZE} processes, B = {count}, D = {WIDTH}"
    if megabits is not None:
        title += f", {megabits:g} Mbit/s" + ("" if is_measured else ", the time of the link reckoned")
        for name, seconds in found["seconds"].items() if not is_measured else ():
            wait = found["bytes"][name] / 2 * 8 / (megabits * 1e6)
            found["seconds"][name] = [each + wait for each in seconds]
    figures = compare(title, found["seconds"], ours=OURS) | {"megabits": megabits, "is_measured": is_measured}
    for name, side in figures["sides"].items():
        side |= {"bytes": found["bytes"][name], "error": found["errors"][name]}
        ratio = side["bytes"] / found["bytes"][OURS]
        console.print(f"{name}: {side['bytes']:,} bytes ({ratio:.1f}x), error {side['error']:.1e}")
    return figures


@contextmanager
def link(megabits: float | None) -> Iterator[tuple[End, End]]:
    """Make the two ends: of loopback, of a limited link, or of loopback if there can be none."""
    with ExitStack() as stack:
        ends = LOOPBACK
        if megabits is not None:
            try:
                ends = stack.enter_context(limited_link(megabits))
            except OSError as error:
                console.print(f"no link of {megabits:g} Mbit/s here ({error}): its time is reckoned")
        yield ends


def main() -> None:
    """Measure the sizes that were asked for."""
    if sys.argv[1:2] == ["--work"]:
        rank, count, turns, folder, *command, interface = sys.argv[2:]
        work(int(rank), int(count), int(turns), End(tuple(command), interface), Path(folder))
        return
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sizes", type=int, nargs="+", help="pairs in a batch")
    options.add_argument("--link", type=float, nargs="+", help="megabits a second between the processes")
    given = filled(options.parse_args())
    sizes = given.sizes or ([64] if given.quick else [2048, 4096, 8192])
    rates = given.link or [None]
    finish(given, [measure(count, given.turns, rate) for rate in rates for count in sizes])


if __name__ == "__main__":
    main()
