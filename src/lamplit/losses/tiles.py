"""Tiles of the matrix of logits, for the losses: each is computed, used and dropped.

On a CPU every thread takes whole tiles of its own, which is faster than splitting each small product between
the threads. Whatever is added up over tiles has a fixed order, so that a run repeats to the last bit.

Shapes: B pairs, D width; b of the pairs have their texts here, in a process of its own all B.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

_CPU_SIDE = 512  # at most: 512 × 512 float32 are 1 MB, and a tile stays in its core's own cache
_ACCELERATOR_SIDE = 4096
_GATHERED = 2**17  # float64 values of rows that are multiplied one by one: 1 MB
_SERIAL = 2**14  # values that torch adds up in one thread

Visit = Callable[[list[Tensor], int, int], None]
TileRow = tuple[int, list[int]]  # a text block, and the image blocks it meets


class Tiles:
    """The logits of b texts (down) against B images (across), one square tile at a time; the first b images are theirs.

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
        self.blocks = _cut(self.size, self.side)  # of images
        self.text_blocks = _cut(len(ztxt), self.side)
        self.wide = widest(zimg.device)

    def logits(self, j: int, i: int, out: Tensor) -> Tensor:
        """Write the logits of text block j against image block i to `out`, and return it."""
        return out.addmm_(self.ztxt[self.text_blocks[j]], self.zimg[self.blocks[i]].T, beta=0, alpha=self.scale)

    def own_logits(self) -> Tensor:
        """Return the logits of the texts with their own images, (b,), in float64."""
        step = self._rows_at_once()
        return self._multiply(torch.split(self.ztxt, step), torch.split(self.zimg[: len(self.ztxt)], step))

    def single_logits(self, texts: Tensor, images: Tensor) -> Tensor:
        """Return the logits of text rows with image rows, (N,) of each, in float64."""
        step = self._rows_at_once()
        return self._multiply(
            (self.ztxt[rows] for rows in torch.split(texts, step)),
            (self.zimg[rows] for rows in torch.split(images, step)),
        )

    def wide_logits(self, j: int, i: int) -> Tensor:
        """Return a whole tile in float64."""
        texts, images = self.ztxt[self.text_blocks[j]].to(self.wide), self.zimg[self.blocks[i]].to(self.wide)
        return (texts @ images.T).mul_(self.scale)

    def _rows_at_once(self) -> int:
        return max(1, _GATHERED // self.ztxt.shape[1])

    def _multiply(self, texts: Iterable[Tensor], images: Iterable[Tensor]) -> Tensor:
        parts = [(text.to(self.wide) * image).sum(1) for text, image in zip(texts, images, strict=True)]
        return torch.cat(parts).mul_(self.scale)

    def sweep(self, visit: Visit, *, disjoint: bool = False) -> None:
        """Call `visit(spares, j, i)` for every text block j and image block i.

        `spares` are three tensors of a tile's shape, with anything in them. Several threads call at once, but
        never with the same text block, nor, if `disjoint`, with the same image block; and the calls of a
        block have a fixed order. So sums by block need no lock.
        """
        rows, numbers = range(len(self.text_blocks)), range(len(self.blocks))
        if disjoint:  # a Latin square: in round r each text block j meets the image block j + r
            rounds: list[list[TileRow]] = [[(j, [(j + shift) % len(numbers)]) for j in rows] for shift in numbers]
        else:
            rounds = [[(j, list(numbers)) for j in rows]]

        def visit_row(buffers: Tensor, row: TileRow) -> None:
            j, images = row
            for i in images:
                shape = [block.stop - block.start for block in (self.text_blocks[j], self.blocks[i])]
                visit(list(buffers[:, : shape[0] * shape[1]].view(3, *shape)), j, i)

        threads = torch.get_num_threads() if self.zimg.device.type == "cpu" else 1
        buffers = [self.ztxt.new_empty(3, self.side**2) for _ in range(min(threads, len(rows)))]
        for tile_rows in rounds:
            if threads == 1:
                for row in tile_rows:
                    visit_row(buffers[0], row)
            else:  # even a single row: one torch thread adds up in another order than several
                _in_threads(buffers, visit_row, tile_rows)


def _cut(size: int, side: int) -> list[slice]:
    return [slice(k, min(k + side, size)) for k in range(0, size, side)]


def _in_threads(buffers: list[Tensor], visit_row: Callable[[Tensor, TileRow], None], rows: list[TileRow]) -> None:
    """Visit all rows, in as many threads as there are buffers."""
    inference = torch.is_inference_mode_enabled()  # a thread's own, like the gradient mode
    waiting = deque(rows)

    def work(own: Tensor) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while waiting:
                try:
                    row = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                visit_row(own, row)

    started = [_pool(len(buffers)).submit(work, own) for own in buffers]
    wait(started)
    for future in started:
        future.result()


class _Pool:
    """Threads for tiles, made once: each has one torch thread, for its products are not to be split again."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None
        self.size = 0

    def __call__(self, size: int) -> ThreadPoolExecutor:
        with self.lock:
            if self.executor is None or self.size < size:
                self.executor, self.size = _start(size), size
            return self.executor


def _start(size: int) -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(size, "lamplit-tiles", _take_one_thread)
    # torch gives the number that was set last to every thread yet to start. So all of ours start now, and a thread
    # that read the number before them sets it again.
    given: list[int] = []
    everyone = threading.Barrier(size + 1)
    _run_in_new_thread(lambda: given.append(torch.get_num_threads()))
    for _ in range(size):
        executor.submit(everyone.wait)
    everyone.wait()
    _run_in_new_thread(lambda: torch.set_num_threads(given[0]))
    return executor


def _take_one_thread() -> None:
    torch.get_num_threads()  # torch gives a thread the common number at its first use, even over one that was set
    torch.set_num_threads(1)


def _run_in_new_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


_pool = _Pool()
if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.__init__)  # type: ignore[misc]


def add_up(values: Tensor) -> Tensor:
    """Sum all values in an order that does not depend on the number of threads, as torch's own sum does of many."""
    return torch.stack([part.sum() for part in torch.split(values.reshape(-1), _SERIAL)]).sum()


def widest(device: torch.device) -> torch.dtype:
    """Return what to add up in: float64, which only MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class Gradients:
    """Sums over tiles of weights W (texts × images): W @ zimg for texts, W.T @ ztxt for images."""

    def __init__(self, tiles: Tiles, *, both: bool) -> None:
        self.tiles = tiles
        self.text = torch.zeros_like(tiles.ztxt)  # (b, D)
        self.image = torch.zeros_like(tiles.zimg) if both else None  # (B, D)

    def add(self, weights: Tensor, j: int, i: int) -> None:
        """Add the share of one tile."""
        texts, images = self.tiles.text_blocks[j], self.tiles.blocks[i]
        self.text[texts].addmm_(weights, self.tiles.zimg[images])
        if self.image is not None:
            self.image[images].addmm_(weights.T, self.tiles.ztxt[texts])

    def times(self, factor: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradients of images, texts and scale, all times `factor`. The sums are used up."""
        # A logit's derivative by the scale is its cosine, and the sum of W * cosines is <ztxt, W @ zimg>:
        # by block, so as not to make another (B, D) matrix.
        by_block = [(self.tiles.ztxt[k] * self.text[k]).sum(1, dtype=self.tiles.wide) for k in self.tiles.text_blocks]
        of_scale = factor * add_up(torch.cat(by_block)).to(factor.dtype)
        of_image = None if self.image is None else self.image.mul_(factor * scale)
        return of_image, self.text.mul_(factor * scale), of_scale
