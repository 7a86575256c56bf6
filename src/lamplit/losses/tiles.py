"""Tiles of the B × B matrix of logits, for the losses: each is computed, used and dropped.

On a CPU every thread takes whole tiles of its own, which is faster than splitting each small product between
the threads. Whatever is added up over tiles has a fixed order, so that a run repeats to the last bit.

Shapes: B pairs, D width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CPU_SIDE = 512  # at most: 512 × 512 float32 are 1 MB, and a tile stays in its core's own cache
_ACCELERATOR_SIDE = 4096

Visit = Callable[[list[Tensor], int, int], None]
TileRow = tuple[int, list[int]]  # a text block, and the image blocks it meets


class Tiles:
    """The logits of B texts (down) against B images (across), one square tile at a time.

    They are in units of ln 2: two to such a logit is the exponential of the plain one, and torch's `exp2` is
    two to three times as fast as its `exp`, at the same precision.
    """

    def __init__(self, zimg: Tensor, ztxt: Tensor, scale: Tensor) -> None:
        self.zimg, self.ztxt = zimg.detach().contiguous(), ztxt.detach().contiguous()
        self.scale = float(scale.detach()) / math.log(2)
        self.size = len(zimg)
        self.side = _ACCELERATOR_SIDE
        if zimg.device.type == "cpu":
            # Enough rows of tiles for 16 threads, unless the tiles got too small for fast products. The size
            # does not depend on the number of threads, and so neither do the results.
            self.side = max(_CPU_SIDE // 2, min(_CPU_SIDE, self.size // 16))
        self.side = min(self.side, self.size)
        self.blocks = [slice(k, min(k + self.side, self.size)) for k in range(0, self.size, self.side)]
        self.wide = widest(zimg.device)

    def logits(self, j: int, i: int, out: Tensor) -> Tensor:
        """Write the logits of text block j against image block i to `out`, and return it."""
        return out.addmm_(self.ztxt[self.blocks[j]], self.zimg[self.blocks[i]].T, beta=0, alpha=self.scale)

    def own_logits(self) -> Tensor:
        """Return the logits of the pairs themselves, (B,), more exact than those of the tiles."""
        by_block = [(self.ztxt[k] * self.zimg[k]).sum(1, dtype=self.wide) for k in self.blocks]
        return torch.cat(by_block).mul_(self.scale)

    def sweep(self, visit: Visit, *, disjoint: bool = False) -> None:
        """Call `visit(spares, j, i)` for every text block j and image block i.

        `spares` are three tensors of a tile's shape, with anything in them. Several threads call at once, but
        never with the same text block, nor, if `disjoint`, with the same image block; and the calls of a
        block have a fixed order. So sums by block need no lock.
        """
        numbers = range(len(self.blocks))
        if disjoint:  # a Latin square: in round r each text block j meets the image block j + r
            rounds: list[list[TileRow]] = [[(j, [(j + shift) % len(numbers)]) for j in numbers] for shift in numbers]
        else:
            rounds = [[(j, list(numbers)) for j in numbers]]
        local = threading.local()

        def prepare() -> None:
            local.buffers = self.ztxt.new_empty(3, self.side**2)

        def visit_row(row: TileRow) -> None:
            j, images = row
            for i in images:
                shape = [self.blocks[k].stop - self.blocks[k].start for k in (j, i)]
                visit(list(local.buffers[:, : shape[0] * shape[1]].view(3, *shape)), j, i)

        threads = torch.get_num_threads() if self.zimg.device.type == "cpu" else 1
        if threads == 1:
            prepare()
            for row in (row for rows in rounds for row in rows):
                visit_row(row)
        else:
            _in_threads(threads, prepare, visit_row, rounds)


def _in_threads(
    threads: int, prepare: Callable[[], None], visit_row: Callable[[TileRow], None], rounds: list[list[TileRow]]
) -> None:
    inference = torch.is_inference_mode_enabled()  # a thread's own, like the gradient mode

    def start() -> None:
        torch.set_num_threads(1)  # of this thread: its products are not to be split again
        prepare()

    def work(row: TileRow) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            visit_row(row)

    try:
        with ThreadPoolExecutor(threads, "lamplit-tiles", start) as pool:
            for rows in rounds:
                list(pool.map(work, rows))
    finally:
        # The caller's own number has not changed, but torch gives the last one set to threads yet to start.
        torch.set_num_threads(threads)


def widest(device: torch.device) -> torch.dtype:
    """Return what to add up in: float64, which only MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class Gradients:
    """Sums over tiles of weights W (texts × images): W @ zimg for texts, W.T @ ztxt for images."""

    def __init__(self, tiles: Tiles, *, both: bool) -> None:
        self.tiles = tiles
        self.text = torch.zeros_like(tiles.ztxt)  # (B, D)
        self.image = torch.zeros_like(tiles.zimg) if both else None  # (B, D)

    def add(self, weights: Tensor, j: int, i: int) -> None:
        """Add the share of one tile."""
        texts, images = self.tiles.blocks[j], self.tiles.blocks[i]
        self.text[texts].addmm_(weights, self.tiles.zimg[images])
        if self.image is not None:
            self.image[images].addmm_(weights.T, self.tiles.ztxt[texts])

    def times(self, factor: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradients of images, texts and scale, all times `factor`. The sums are used up."""
        # A logit's derivative by the scale is its cosine, and the sum of W * cosines is <ztxt, W @ zimg>:
        # by block, so as not to make another (B, D) matrix.
        by_block = [(self.tiles.ztxt[k] * self.text[k]).sum(dtype=self.tiles.wide) for k in self.tiles.blocks]
        of_scale = factor * torch.stack(by_block).sum().to(factor.dtype)
        of_image = None if self.image is None else self.image.mul_(factor * scale)
        return of_image, self.text.mul_(factor * scale), of_scale
