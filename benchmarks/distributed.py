"""One loss over two processes on this machine, against open_clip's ClipLoss: time, bytes and exactness.

    python benchmarks/distributed.py            # B = 2048 to 8192: minutes on two cores
    python benchmarks/distributed.py --quick    # seconds; its figures mean nothing

A locked image tower: the texts and the scale need a gradient, the images do not. D = 512. Both processes have a thread
and talk through gloo on loopback. Ours read the vectors of all images, as `lamplit tune` does from the store. Those of
open_clip have half of the images each, and gather them (`gather_with_grad`, with and without `local_loss`).

Time: forward and backward pass together, both sides in turn; the slower of the two processes counts. Bytes: what the
system counts on loopback in a turn, the least of all turns, because other programs may use it, too. Exactness: the
relative error (norm) of the texts' gradient against the plain loss of one process in float64; with open_clip after the
mean over the processes that DistributedDataParallel takes.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
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


def work(rank: int, count: int, turns: int, port: int, out: str) -> None:
    """Run all sides in turn as one process; the first one saves what was measured."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=SIZE, timeout=timedelta(minutes=5))
    zimg, ztxt = make_pairs(count)
    sides = open_sides(rank, zimg, ztxt)
    expected = exact_gradient(zimg, ztxt).chunk(SIZE)[rank]
    found: dict[str, Any] = {"seconds": {name: [] for name in sides}, "bytes": {}, "errors": {}}
    for turn in range(turns + 1):  # the first warms up
        for name, side in sides.items():
            dist.barrier()
            before, began = sent(), time.perf_counter()
            gradient = side()
            taken = torch.tensor([time.perf_counter() - began, float((gradient - expected).norm() / expected.norm())])
            dist.barrier()
            moved = sent() - before
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn:
                found["seconds"][name].append(float(taken[0]))
            found["bytes"][name] = min(moved, found["bytes"].get(name, moved))
            found["errors"][name] = float(taken[1])
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def sent() -> int:
    """Bytes that went through loopback so far."""
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def measure(count: int, turns: int) -> dict[str, Any]:
    """Start the processes; print and return what they found."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    with TemporaryDirectory() as folder:
        out = str(Path(folder) / "found")
        torch.multiprocessing.spawn(work, (count, turns, port, out), nprocs=SIZE)
        found = torch.load(out, weights_only=True)
    figures = compare(f"softmax loss over {SIZE} processes, B = {count}, D = {WIDTH}", found["seconds"], ours=OURS)
    for name, side in figures["sides"].items():
        side |= {"bytes": found["bytes"][name], "error": found["errors"][name]}
        console.print(f"{name}: {side['bytes']:,} bytes on loopback, error {side['error']:.1e}")
    return figures


def main() -> None:
    """Measure the sizes that were asked for."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sizes", type=int, nargs="+", help="pairs in a batch")
    given = filled(options.parse_args())
    sizes = given.sizes or ([64] if given.quick else [2048, 4096, 8192])
    finish(given, [measure(count, given.turns) for count in sizes])


if __name__ == "__main__":
    main()
