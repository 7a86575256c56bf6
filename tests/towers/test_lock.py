from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.towers.lock import Locked, weights_digest


class Restless(nn.Module):
    """A tower with everything that moves by itself: batch-norm statistics, dropout and drop-path."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.path = timm.layers.DropPath(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.convolution(images)).relu()
        hidden = hidden + self.path(self.drop(hidden))
        output: Tensor = self.head(hidden.mean((2, 3)))
        return output


def make_tower(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "restless":
        return Restless()
    tower: nn.Module = timm.create_model(name, num_classes=0, drop_path_rate=0.3, drop_rate=0.3)
    return tower


class Peer(nn.Module):
    """What most code calls a lock: no gradients, and nothing else."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.tower(images)
        return output


def mistreat(locked: nn.Module, size: int) -> list[Tensor]:
    """Do all that moves a tower: train mode, gradients, ten forward passes, steps of an optimizer."""
    with torch.no_grad():
        width = copy.deepcopy(locked).eval()(torch.zeros(1, 3, size, size)).shape[1]
    model = nn.ModuleDict({"image": locked, "text": nn.Linear(width, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for _ in range(10):
        model.train()
        model.requires_grad_(True)
        images = torch.rand(4, 3, size, size, generator=generator) + 1  # far from the statistics at the start
        features = locked(images)
        outputs.append(features)
        loss = F.mse_loss(model["text"](features), torch.ones(4, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return outputs


TOWERS = [("restless", 16), ("test_resnet", 64), ("test_efficientnet", 64), ("test_vit", 160), ("test_convnext", 64)]


@pytest.mark.parametrize(("name", "size"), TOWERS)
def test_locked_tower_stays_bit_identical(name: str, size: int) -> None:
    locked = Locked(make_tower(name))
    before, images = weights_digest(locked), torch.rand(2, 3, size, size)
    expected = locked(images)

    outputs = mistreat(locked, size)

    assert weights_digest(locked) == before
    assert torch.equal(locked(images), expected)
    assert all(output.grad_fn is None and not output.requires_grad for output in outputs)


@pytest.mark.parametrize(("name", "size"), TOWERS)
def test_unlocked_tower_drifts(name: str, size: int) -> None:
    tower = make_tower(name)
    before = weights_digest(tower)

    outputs = mistreat(tower, size)

    assert weights_digest(tower) != before
    assert outputs[0].requires_grad


def test_frozen_parameters_alone_are_no_lock() -> None:
    peer = Peer(make_tower("restless"))
    before = weights_digest(peer)
    peer.train()
    first, second = peer(torch.ones(2, 3, 16, 16)), peer(torch.ones(2, 3, 16, 16))
    assert weights_digest(peer) != before  # batch-norm statistics
    assert not torch.equal(first, second)  # dropout


def test_train_on_the_tower_itself_does_not_pass_the_lock() -> None:
    tower = make_tower("restless")
    locked = Locked(tower)
    before = weights_digest(locked)
    images = torch.rand(2, 3, 16, 16)
    expected = locked(images)
    tower.train()
    assert torch.equal(locked(images), expected)
    assert weights_digest(locked) == before


def test_lock_stops_gradients_to_the_input_too() -> None:
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    output = Locked(make_tower("restless"))(images)
    assert not output.requires_grad


def test_lock_says_that_it_does_not_train() -> None:
    locked = Locked(make_tower("restless")).train().requires_grad_()
    model = nn.Sequential(locked, nn.Linear(4, 2)).train()
    assert model.training
    assert not any(module.training for module in locked.modules())
    assert not any(parameter.requires_grad for parameter in locked.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 2 + 2


def test_requires_grad_on_a_parent_is_undone_by_the_next_forward() -> None:
    locked = Locked(make_tower("restless"))
    model = nn.Sequential(locked, nn.Linear(4, 2)).requires_grad_(True)  # sets parameters, asks no module
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert not any(parameter.requires_grad for parameter in locked.parameters())
    assert all(parameter.grad is None for parameter in locked.parameters())


def change_parameter(tower: Any) -> None:
    tower.head.weight.data[0, 0] = torch.nextafter(tower.head.weight.data[0, 0], torch.tensor(9.0))


def change_buffer(tower: Any) -> None:
    tower.norm.running_mean[3] += 1e-7


def change_type(tower: Any) -> None:
    tower.head.half()


def swap(tower: Any) -> None:
    tower.norm.weight, tower.norm.bias = tower.norm.bias, tower.norm.weight


@pytest.mark.parametrize("change", [change_parameter, change_buffer, change_type, swap])
def test_digest_sees_the_smallest_change(change: Any) -> None:
    tower = make_tower("restless")
    before = weights_digest(tower)
    change(tower)
    assert weights_digest(tower) != before


def test_digest_does_not_see_layout_or_place() -> None:
    tower = make_tower("restless")
    before = weights_digest(tower)
    tower.to(memory_format=torch.channels_last)
    assert weights_digest(tower) == before
    assert weights_digest(make_tower("restless")) == before
    assert len(before) == 32


def test_digest_of_scalars_empty_tensors_and_bfloat16() -> None:
    module = nn.Module()
    module.register_buffer("scalar", torch.tensor(1.0))
    module.register_buffer("empty", torch.empty(0, 3))
    module.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))
    before = weights_digest(module)
    module.scalar += 1
    assert weights_digest(module) != before
