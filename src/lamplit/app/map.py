"""A map of a collection: vectors in two dimensions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """Vectors projected onto the map."""

    points: Tensor  # (N, 2), each axis from -1 to 1
    explained: float  # part of the variance that the two axes hold


def sample(num_rows: int, size: int) -> list[int]:
    """Choose `size` of `num_rows` rows, always the same ones; all rows if there are no more."""
    generator = torch.Generator().manual_seed(0)
    chosen: list[int] = torch.randperm(num_rows, generator=generator)[:size].sort().values.tolist()
    return chosen


def project(vectors: Tensor) -> Projection:
    """Project (N, D) vectors onto their two principal axes; the same vectors always give the same map."""
    centered = vectors - vectors.mean(0)
    rank = min(8, *centered.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # pca_lowrank begins from random directions
        _, lengths, axes = torch.pca_lowrank(centered, q=rank, center=False, niter=4)
    axes = axes[:, :2] * axes[:, :2].gather(0, axes[:, :2].abs().argmax(0, keepdim=True)).sign()
    points = torch.zeros(len(vectors), 2)
    points[:, : axes.shape[1]] = centered @ axes
    low, high = points.amin(0), points.amax(0)
    points = points - (low + high) / 2
    spread = ((high - low) / 2).clamp(min=1e-9)
    total = float(centered.square().sum())
    return Projection(points / spread, float(lengths[:2].square().sum()) / total if total else 1.0)
