"""Backends that run a locked tower: torch, torch.compile or ONNX Runtime, whichever is fastest and agrees.

A locked tower is a constant function, so it can be compiled once; convolutional towers run four times as fast on a
CPU. A backend whose vectors differ from torch's is refused, however fast it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.errors import TowerError, first_line
from lamplit.files import cache_folder
from lamplit.towers.devices import keep_freed_memory
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.images.pooling import pool_features
from lamplit.towers.lock import Locked, weights_digest
from lamplit.towers.onnx_files import onnx_errors, open_onnx, write_onnx

BackendName = Literal["auto", "torch", "compile", "onnx"]
Backend = Callable[[Tensor], Tensor]  # (B, 3, height, width) uint8 in, (B, D) float32 unit vectors out, on the CPU

SAMPLE = 8  # images that backends are compared on
CPU_IMAGES = 16  # in one pass of torch; its activations pass through the cache, and more images are no faster
TOLERANCE = 1e-4  # largest difference of any coordinate of a unit vector
# Minimum remaining run time of the eager tower, in seconds, that justifies starting this backend.
_START_PAYS = {"onnx": 60.0, "compile": 600.0}


def choose_backend(
    tower: ImageTower, name: BackendName, images: Tensor, *, num_images: int | None, device: torch.device
) -> tuple[str, Backend, Tensor]:
    """Choose the backend that runs `tower`; return its name, the backend, and the vectors of the first batch.

    `auto` times torch on the first batch, and tries another backend if enough images are left to justify its start. A
    backend is taken if it agrees with torch to `TOLERANCE` on real images and is faster on them.

    Args:
        tower: the tower to run. It is locked and moved to `device`; `towers.borrowing.borrowed` gives it back.
        name: the backend asked for.
        images: (B, 3, height, width) uint8 images, the first batch.
        num_images: how many images there are in all, if that is known.
        device: where torch runs.

    Raises:
        TowerError: a backend asked for by name disagrees with torch or cannot run this tower.
    """
    torch_backend = _torch_backend(tower, device)
    began = time.perf_counter()
    vectors = torch_backend(images)
    seconds = time.perf_counter() - began
    if name == "torch":
        return "torch", torch_backend, vectors
    sample, expected = images[:SAMPLE], vectors[:SAMPLE]
    if name != "auto":
        return name, _start(name, tower, sample, device, expected), vectors
    for other in ("onnx", "compile"):
        if other == "onnx" and device.type != "cpu":
            continue
        # A source of unknown size counts as large enough for ONNX Runtime, because its file is kept for the next run.
        left = _START_PAYS["onnx"] if num_images is None else seconds / len(images) * num_images
        ready = other == "onnx" and _onnx_file(tower).is_file() and (num_images or 0) >= 20 * SAMPLE
        if left < _START_PAYS[other] and not ready:
            continue
        try:
            backend = _start(other, tower, sample, device, expected)
        except TowerError as error:
            logging.getLogger(__name__).warning("%s", error)
            continue
        if _seconds(backend, sample) < _seconds(torch_backend, sample):
            return other, backend, vectors
    return "torch", torch_backend, vectors


def _start(name: str, tower: ImageTower, sample: Tensor, device: torch.device, expected: Tensor) -> Backend:
    """Start a backend that gives `expected` for `sample`."""
    # Every error of torch's compilers is a RuntimeError.
    errors: tuple[type[Exception], ...] = (RuntimeError, *onnx_errors())
    try:
        compiles = name == "compile"
        backend = _torch_backend(tower, device, compiled=True) if compiles else _onnx_backend(tower, sample)
        vectors = backend(sample)
    except errors as error:
        raise TowerError(f"backend {name} cannot run {tower.spec}: {first_line(error)}") from error
    _require_agreement(name, vectors, expected)
    return backend


def _torch_backend(tower: ImageTower, device: torch.device, *, compiled: bool = False) -> Backend:
    # channels_last gains 1.4 times on convolutions, costs nothing elsewhere, and changes no value's meaning.
    locked = Locked(tower).to(device).to(memory_format=torch.channels_last)
    function = torch.compile(locked, dynamic=True) if compiled else locked
    if device.type == "cpu":
        keep_freed_memory()

    def run(images: Tensor) -> Tensor:
        parts = torch.split(images, CPU_IMAGES) if device.type == "cpu" else [images]
        return torch.cat(
            [F.normalize(function(part.to(device, non_blocking=True)).float(), dim=-1).cpu() for part in parts]
        )

    return run


class _Features(nn.Module):
    """A tower without its preprocessing: (B, 3, height, width) normalised images in, (B, D) pooled features out."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.backbone, self.pool = tower.backbone, tower.pool

    def forward(self, images: Tensor) -> Tensor:
        return pool_features(self.backbone, images, self.pool)


def _onnx_backend(tower: ImageTower, sample: Tensor) -> Backend:
    file = _onnx_file(tower)
    threads = torch.get_num_threads()
    session = open_onnx(file, threads) if file.is_file() else None
    if session is None:  # not made yet, or damaged since
        example = tower.preprocessing.normalize(sample[:2])
        graph = _Features(tower)
        write_onnx(graph, {"images": example}, file, name=tower.spec, axes=[{0: torch.export.Dim("batch")}])
        session = open_onnx(file, threads)
    if session is None:
        raise TowerError(f"ONNX Runtime cannot read {tower.spec} as torch exported it")
    [entry] = session.get_inputs()
    normalize = tower.preprocessing.normalize

    def run(images: Tensor) -> Tensor:
        [features] = session.run(None, {entry.name: normalize(images).numpy()})
        return F.normalize(torch.from_numpy(features), dim=-1)

    return run


def _onnx_file(tower: ImageTower) -> Path:
    """Name the file after what is in it: a tower that brings images to the same size in another way shares it."""
    content = [weights_digest(tower), tower.preprocessing.image_size, tower.config]
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / "onnx" / f"{digest}.onnx"


def _require_agreement(name: str, vectors: Tensor, expected: Tensor) -> None:
    difference = float((vectors - expected).abs().max())
    if not difference <= TOLERANCE:
        raise TowerError(f"backend {name} differs from torch by {difference:.1e}, more than {TOLERANCE:.0e}; not used")


def _seconds(backend: Backend, sample: Tensor) -> float:
    """Time a backend that has run before."""
    began = time.perf_counter()
    backend(sample)
    return time.perf_counter() - began
