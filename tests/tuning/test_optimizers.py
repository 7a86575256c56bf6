from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import Attention
from torch import nn

from lamplit.errors import TuneError, UsageError
from lamplit.tuning.optimizers import (
    Adafactor,
    build_optimizer,
    gradient_norm,
    parameter_groups,
    step_clipped,
    warmup_cosine,
)

SHAPES = [(), (5,), (64,), (31, 64), (32, 32), (64, 40), (40, 64), (4, 33, 48), (96, 12, 64), (2, 40, 3, 35)]


def literal_adafactor(parameter, gradients, *, lr, weight_decay):
    """big_vision's `scale_by_adafactor` followed by the update, restated in numpy's float64."""
    shape = parameter.shape
    order = np.argsort(shape, kind="stable")
    factored = len(shape) >= 2 and shape[order[-2]] >= 32
    rows = columns = moment = momentum = 0.0
    for step, gradient in enumerate(gradients):
        decay = min(0.999, 1 - (step + 1.0) ** -0.8)
        squares = gradient**2 + 1e-30
        if factored:
            d1, d0 = order[-2], order[-1]
            rows = decay * rows + (1 - decay) * squares.mean(axis=d0)
            columns = decay * columns + (1 - decay) * squares.mean(axis=d1)
            reduced_d1 = d1 - 1 if d1 > d0 else d1
            row_factor = (rows / rows.mean(axis=reduced_d1, keepdims=True)) ** -0.5
            update = gradient * np.expand_dims(row_factor, d0) * np.expand_dims(columns**-0.5, d1)
        else:
            moment = decay * moment + (1 - decay) * squares
            update = gradient * moment**-0.5
        momentum = 0.1 * update + 0.9 * momentum
        parameter = parameter - lr * (momentum + weight_decay * parameter)
    return parameter


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adafactor_is_the_papers(shape):
    generator = np.random.default_rng(0)
    start = generator.normal(size=shape)
    gradients = [generator.normal(size=shape) * 10.0**-step for step in range(6)]
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = Adafactor([parameter], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    expected = literal_adafactor(start, gradients, lr=0.01, weight_decay=0.1)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_adafactor_takes_each_head_apart():
    """big_vision keeps q, k and v apart, as (W, H, D), and the output projection as (H, D, W)."""
    width, heads, size = 96, 2, 48
    attention = Attention(width, num_heads=heads, qkv_bias=True)
    generator = np.random.default_rng(0)
    kernels = {"qkv": (3 * width, width), "proj": (width, width)}
    starts = {name: generator.normal(size=shape) for name, shape in kernels.items()}
    gradients = {name: [generator.normal(size=shape) * 10.0**-k for k in range(4)] for name, shape in kernels.items()}
    # Heads differ in size, so that one factor for all of them would show.
    for name in kernels:
        for gradient in gradients[name]:
            gradient *= generator.uniform(0.1, 10, size=gradient.shape)
    with torch.no_grad():
        for name, start in starts.items():
            getattr(attention, name).weight.copy_(torch.tensor(start))
    optimizer = build_optimizer("adafactor", attention, lr=0.01, weight_decay=0.1)
    for step in range(4):
        for name in kernels:
            getattr(attention, name).weight.grad = torch.tensor(gradients[name][step], dtype=torch.float32)
        optimizer.step()

    def expected(start, some, there, back):
        moved = literal_adafactor(there(start), [there(gradient) for gradient in some], lr=0.01, weight_decay=0.1)
        return back(moved)

    for part in range(3):
        rows = slice(part * width, (part + 1) * width)
        found = attention.qkv.weight.detach().numpy()[rows]
        kernel = expected(
            starts["qkv"][rows], [gradient[rows] for gradient in gradients["qkv"]],
            lambda x: x.T.reshape(width, heads, size), lambda x: x.reshape(width, width).T,
        )  # fmt: skip
        np.testing.assert_allclose(found, kernel, rtol=1e-5, atol=1e-6)
    kernel = expected(
        starts["proj"], gradients["proj"],
        lambda x: x.T.reshape(heads, size, width), lambda x: x.reshape(width, width).T,
    )  # fmt: skip
    np.testing.assert_allclose(attention.proj.weight.detach().numpy(), kernel, rtol=1e-5, atol=1e-6)
    whole = literal_adafactor(starts["proj"], gradients["proj"], lr=0.01, weight_decay=0.1)
    assert np.abs(whole - kernel).max() > 1e-3, "all heads together are another step"


def test_adafactor_refuses_the_state_of_other_shapes():
    attention = Attention(64, num_heads=2)
    for parameter in attention.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = Adafactor(attention.parameters(), lr=0.1)
    before.step()
    after = build_optimizer("adafactor", nn.ModuleList([attention]), lr=0.1, weight_decay=0.0)
    for parameter in attention.parameters():
        after.state[parameter] = before.state[parameter]
    with pytest.raises(TuneError, match=r"of an earlier lamplit, .*delete checkpoints/last\.safetensors"):
        after.step()


def test_adafactor_keeps_rows_and_columns_only():
    parameter = nn.Parameter(torch.randn(64, 48))
    parameter.grad = torch.randn(64, 48)
    optimizer = Adafactor([parameter], lr=0.01, momentum_dtype=torch.bfloat16)
    optimizer.step()
    sizes = {name: x.numel() for name, x in optimizer.state[parameter].items() if torch.is_tensor(x)}
    assert sorted(sizes.values()) == [48, 64, 64 * 48]
    assert optimizer.state[parameter]["momentum"].dtype == torch.bfloat16


def test_adafactor_steps_along_the_unrounded_momentum():
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(40, 40))
        parameter.grad = torch.linspace(-1, 1, 1600).view(40, 40)
        optimizer = Adafactor([parameter], lr=1.0, momentum_dtype=dtype)
        optimizer.step()
        results.append([parameter.detach().clone()])
        optimizer.step()
        results[-1].append(parameter.detach().clone())
    assert torch.equal(results[0][0], results[1][0])
    difference = (results[0][1] - results[1][1]).abs().max()
    assert 0 < difference < 0.01


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_adafactor_resumes_to_the_last_bit(momentum_dtype):
    gradients = torch.randn(6, 40, 33)

    def steps(parameter, optimizer, some):
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(40, 33))
    optimizer = Adafactor([whole], lr=0.1, momentum_dtype=momentum_dtype)
    steps(whole, optimizer, gradients[:3])
    resumed = nn.Parameter(whole.detach().clone())
    second = Adafactor([resumed], lr=0.1, momentum_dtype=momentum_dtype)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, gradients[3:])
    steps(resumed, second, gradients[3:])
    assert torch.equal(whole, resumed)


def test_adafactor_closure_and_missing_gradients():
    trained, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Adafactor([trained, idle], lr=0.1, weight_decay=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (trained**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (trained < 1).all()
    assert torch.equal(idle, torch.ones(3))


def test_adafactor_refuses_nonsense():
    parameters = [nn.Parameter(torch.ones(3))]
    with pytest.raises(UsageError, match=r"lr=-1"):
        Adafactor(parameters, lr=-1)
    with pytest.raises(UsageError, match=r"beta1=1\.0"):
        Adafactor(parameters, lr=0.1, beta1=1.0)


def test_warmup_cosine_by_hand():
    factors = [warmup_cosine(step, warmup_steps=4, total_steps=8) for step in range(10)]
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    assert factors == pytest.approx([0, 0.25, 0.5, 0.75, *cosine, 0])
    assert warmup_cosine(0, warmup_steps=0, total_steps=2) == 1.0
    assert warmup_cosine(1, warmup_steps=0, total_steps=2) == pytest.approx(0.5)
    assert warmup_cosine(3, warmup_steps=3, total_steps=3) == 1.0


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 100))
def test_warmup_cosine_rises_then_falls(step, warmup_steps, total_steps):
    now, then = (warmup_cosine(k, warmup_steps=warmup_steps, total_steps=total_steps) for k in (step, step + 1))
    assert 0 <= now <= 1
    if warmup_steps < total_steps:
        assert (now <= then) if step < warmup_steps else (now >= then)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 2)})
        self.shared = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


KERNELS = ["patch_embed.proj.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]


def test_only_kernels_decay():
    tower = Tower()
    names = {parameter: name for name, parameter in tower.named_parameters()}
    decaying, others = parameter_groups(tower, weight_decay=0.1)
    assert [names[parameter] for parameter in decaying["params"]] == KERNELS
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert [names[parameter] for parameter in others["params"]] == [
        name for name in names.values() if name not in KERNELS and not name.startswith("frozen")
    ]


def test_embeddings_by_name():
    parameters = [
        ("text.embeddings.word_embeddings.weight", nn.Parameter(torch.zeros(9, 4))),
        ("text.layer.0.dense.weight", nn.Parameter(torch.zeros(4, 4))),
        ("weight", nn.Parameter(torch.zeros(4, 4))),
        ("log_scale", nn.Parameter(torch.zeros(()))),
    ]
    decaying, others = parameter_groups(iter(parameters), weight_decay=1.0)
    assert decaying["params"] == [parameters[1][1], parameters[2][1]]
    assert others["params"] == [parameters[0][1], parameters[3][1]]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adafactor", Adafactor)])
def test_build_optimizer(name, kind):
    tower = Tower()
    optimizer = build_optimizer(name, tower, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95))
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    for parameter in tower.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Without a gradient what decays has shrunk by lr * weight_decay, and nothing else has moved.
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.999 if name in KERNELS else 1))


def test_build_optimizer_refuses_nonsense():
    with pytest.raises(UsageError, match="'sgd'; expected 'adamw' or 'adafactor'"):
        build_optimizer("sgd", Tower(), lr=0.1, weight_decay=0)
    with pytest.raises(UsageError, match="frozen"):
        build_optimizer("adamw", Tower().requires_grad_(False), lr=0.1, weight_decay=0)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("most", [0.5, 1e3])
def test_clipped_steps_are_those_of_torch(name, most):
    def run(clipped):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 3))
        unused = nn.Parameter(torch.ones(2))
        named = [*model.named_parameters(), ("unused", unused)]
        parameters = [parameter for _, parameter in named]
        optimizer = build_optimizer(name, named, lr=0.01, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 40)).square().sum().backward()
            if clipped:
                norm = gradient_norm(parameters)
                step_clipped(optimizer, float(norm), most)
            else:
                norm = nn.utils.clip_grad_norm_(parameters, most)
                optimizer.step()
            assert 0.5 < float(norm) < 1e3
        return parameters

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
