"""Words and images to vectors, for many who ask at once.

No request waits for a lock that another one's image holds: images are decoded by a few threads, large ones by one of
their own, and what is decoded meanwhile goes through the tower in one pass.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from threading import Lock, get_native_id
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lamplit.data.decoding.images import decode_image, decoding_cost
from lamplit.errors import ImageError
from lamplit.model import LiT
from lamplit.retrieval.model_reader import ModelReader
from lamplit.store.embed.backends import SAMPLE, Backend, choose_backend
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.lock import Locked
from lamplit.towers.texts.word_reader import WordReader

MAX_PIXELS = 25_000_000  # of an image that is sent
MAX_WORK = 500_000_000  # pixels times scans of a JPEG: some seconds
_LIGHT = 4_000_000  # pixels times scans that are decoded at once; what takes longer has a thread of its own
_TOGETHER = 16  # images in one pass of the tower
AT_ONCE, LATER = 0, 10  # steps back: of pages and of the image tower, which all wait for; of all other work
T = TypeVar("T")


async def run(pool: Executor, function: Callable[..., T], *arguments: object) -> T:
    """Run a function in a pool of threads, and wait for it without holding up anybody else."""
    return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *arguments))


def pool_of(threads: int, name: str, steps_back: int) -> ThreadPoolExecutor:
    """Open a pool of threads that let others go first: those with fewer steps, of the system's 20.

    Linux alone knows the threads of a process apart; elsewhere all are alike.
    """

    def step_back() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, get_native_id(), steps_back)

    return ThreadPoolExecutor(threads, name, step_back)


class PageReader(ModelReader):
    """An open model as search reads it, whose words are read without torch if its folder says how.

    Args:
        model: an open model.
        words: its text tower for ONNX Runtime, which takes any number of threads; without it, torch reads one text
            after the other, because tokenizers of transformers take one thread.
    """

    def __init__(self, model: LiT, words: WordReader | None = None) -> None:
        super().__init__(model)
        self._words = words
        self._lock = Lock()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        if self._words is not None:
            return self._words.tokenize(texts)
        with self._lock:
            return super().tokenize(texts)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts: N strings in, (N, E) unit vectors out."""
        if self._words is not None:
            return self._words.encode_texts(texts)
        with self._lock:
            return super().encode_texts(texts)


class ImageEncoder:
    """Embeds images that are sent, each (D,) in the joint space of a model."""

    def __init__(self, model: LiT) -> None:
        self._model = model
        self._light = pool_of(2, "decode", LATER)
        self._heavy = pool_of(1, "decode-large", LATER)
        self._tower = pool_of(1, "image-tower", AT_ONCE)
        self._waiting: deque[tuple[Tensor, Future[Tensor]]] = deque()
        self._backend: Backend | None = None

    async def encode(self, file: BinaryIO) -> Tensor:
        """Embed one encoded image.

        Raises:
            ImageError: it cannot be used, or is too large.
            TowerError: the model is open without its image tower.
        """
        pixels = await run(self._light, self._decode, file, _LIGHT)
        if pixels is None:
            pixels = await run(self._heavy, self._decode, file, MAX_WORK)
        assert pixels is not None, "what is too large is an error"
        done: Future[Tensor] = Future()
        self._waiting.append((pixels, done))
        self._tower.submit(self._encode_waiting)
        return await asyncio.wrap_future(done)

    def _decode(self, file: BinaryIO, most: int) -> Tensor | None:
        """Decode and scale an image; None if it needs more work than `most`."""
        resize = self._model.image_preprocessing().resize  # before anything is read: there may be no tower
        file.seek(0)
        data = file.read()
        if not data:
            raise ImageError("empty file")
        pixels, scans = decoding_cost(data)
        if pixels > MAX_PIXELS:
            raise ImageError(f"{pixels / 1e6:.1f} megapixels, more than the bound of {MAX_PIXELS / 1e6:g} here")
        if pixels * scans > MAX_WORK:
            raise ImageError(f"{scans:,} scans of {pixels / 1e6:.1f} megapixels, too much to decode; save it again")
        return None if pixels * scans > most else resize(decode_image(data, max_pixels=MAX_PIXELS))

    def _encode_waiting(self) -> None:
        """Embed all images that wait now, in one pass; if another pass took them, there is nothing to do.

        An image whose client has gone is left out; one whose client goes later is embedded for nobody.
        """
        taken: list[tuple[Tensor, Future[Tensor]]] = []
        while self._waiting and len(taken) < _TOGETHER:
            pixels, done = self._waiting.popleft()
            if done.set_running_or_notify_cancel():
                taken.append((pixels, done))
        if not taken:
            return
        try:
            for (_, done), vector in zip(taken, self._vectors([pixels for pixels, _ in taken]), strict=True):
                done.set_result(vector)
        finally:  # whatever went wrong, nobody waits for ever
            for _, done in taken:
                if not done.done():
                    done.set_exception(RuntimeError("the image tower failed; see the terminal of lamplit app"))

    @torch.no_grad()
    def _vectors(self, pixels: list[Tensor]) -> Tensor:
        if self._backend is None:
            self._backend = self._open_backend()
        return self._backend(torch.stack(pixels)).cpu()

    def _open_backend(self) -> Backend:
        """Take what embed would take: ONNX Runtime if the tower's file was made already and agrees with torch."""
        model, tower = self._model, self._model.unlocked_image_tower
        if not isinstance(tower, ImageTower) or not isinstance(model.image_tower, Locked):
            return model.encode_pixels
        noise = torch.rand(SAMPLE, 3, 7, 7, generator=torch.Generator().manual_seed(0))
        images = F.interpolate(noise, tower.preprocessing.image_size, mode="bicubic").clamp(0, 1)
        images = (255 * images).to(torch.uint8)
        _, backend, _ = choose_backend(tower, "auto", images, num_images=20 * SAMPLE, device=model.device)
        return lambda pixels: model.project_all(backend(pixels))
