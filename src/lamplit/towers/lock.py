"""The lock: a tower that nothing can change, and the proof that nothing did."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn


class Locked(nn.Module):
    """A tower as a constant function of its input.

    Setting `requires_grad=False` is not a lock: batch-norm statistics still move and dropout still drops. Here
    the tower also stays in eval mode whatever `.train()` is called on, and runs without a graph.
    """

    def __init__(self, tower: nn.Module) -> None:
        """Lock `tower` itself, not a copy: from now on it is in eval mode and has no gradients."""
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: `model.train()` changes every module but those in here."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stay without gradients."""
        return super().requires_grad_(False)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Run the tower; the output never carries a graph."""
        # Somebody who holds the tower itself may have called .train() on it; .requires_grad_() on a parent sets the
        # parameters without asking their modules.
        self.tower.eval().requires_grad_(False)
        output: Tensor = self.tower(inputs)
        return output


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block in eval mode; afterwards each part of `module` has the mode that it had."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def weights_digest(module: nn.Module) -> str:
    """Hash every parameter and buffer of `module`: name, type, shape and bytes, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
