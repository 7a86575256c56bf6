from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.towers.borrowing import borrowed
from lamplit.towers.lock import Locked

META = torch.device("meta")


class Small(nn.Module):
    """One of everything that a tower can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
        self.tied = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.layers(images).mean((2, 3))
        output: Tensor = self.tied(pooled) + self.other(pooled) * self.get_buffer("scale")
        return output


@pytest.fixture
def module() -> Small:
    torch.manual_seed(0)
    module = Small().train()
    module.layers[1].eval()  # as where batch statistics stay and the rest trains
    F.mse_loss(module(torch.rand(2, 3, 8, 8)), torch.zeros(2, 4)).backward()
    return module


def everything(module: nn.Module) -> dict[str, Any]:
    """List what a module is made of: objects, storages, layouts, gradients and modes."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    found: dict[str, Any] = {
        name: (
            id(t),
            t.device,
            t.dtype,
            t.data_ptr(),
            t.stride(),
            t.requires_grad,
            None if t.grad is None else id(t.grad),
        )
        for name, t in tensors.items()
    }
    return found | {f"mode of {name}": part.training for name, part in module.named_modules()}


def lock_and_move(module: nn.Module) -> None:
    Locked(module).to(META)


def lock_and_reorder(module: nn.Module) -> None:
    Locked(module).to(memory_format=torch.channels_last)


def widen(module: nn.Module) -> None:
    module.double().requires_grad_()


@pytest.mark.parametrize("change", [lock_and_move, lock_and_reorder, widen])
@pytest.mark.parametrize("fails", [False, True])
def test_gives_everything_back(module: Small, change: Any, fails: bool) -> None:
    before, weights = everything(module), {name: t.clone() for name, t in module.state_dict().items()}
    try:
        with borrowed(module):
            change(module)
            assert everything(module) != before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert everything(module) == before
    assert all(torch.equal(t, weights[name]) for name, t in module.state_dict().items())
    assert module.other.weight is module.tied.weight


def test_gradients_do_not_travel(module: Small) -> None:
    with borrowed(module):
        assert all(parameter.grad is None for parameter in module.parameters())
    assert module.tied.weight.grad is not None
