"""Optimizers and schedule of the paper, and the groups of parameters that decay or do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lamplit.errors import TuneError, UsageError

_MIN_FACTORED = 32  # a second-largest axis that is shorter is not factored


class Adafactor(Optimizer):
    """Adafactor as LiT uses it: big_vision's variant, not the original one.

    The second moment of a matrix is kept as the means of its rows and of its columns; a kernel of attention is a
    matrix for each head. There is no clipping, no step relative to a parameter's size, and no bias correction of the
    momentum. (timm has this variant too, but takes the shapes of kernels as torch keeps them, without heads.)

    Weight decay is decoupled in torch's sense, `p -= lr * (update + weight_decay * p)`. The paper does not
    multiply its decay by the learning rate: divide the paper's value by the learning rate.

    Args:
        params: parameters or groups of them, as for every torch optimizer; in a group, `shapes` may list the shape in
            which each parameter is factored.
        lr: learning rate.
        beta1: decay of the momentum.
        decay: the second moment's decay is `1 - (t + 1) ** -decay` in step t, counted from 0 ...
        beta2_cap: ... and never more than this.
        eps: added to the squared gradients.
        weight_decay: decay of the parameters, in units of `lr`.
        momentum_dtype: how the momentum is stored; the paper's is `torch.bfloat16`.

    Raises:
        UsageError: a number is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        beta1: float = 0.9,
        decay: float = 0.8,
        beta2_cap: float = 0.999,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        *,
        momentum_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= beta1 < 1 and 0 <= beta2_cap < 1):
            raise UsageError(
                f"Adafactor got lr={lr}, weight_decay={weight_decay}, beta1={beta1}, beta2_cap={beta2_cap}; "
                "expected lr and weight_decay of at least 0, betas of at least 0 and less than 1"
            )
        self.momentum_dtype = momentum_dtype
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "decay": decay,
            "beta2_cap": beta2_cap,
            "eps": eps,
            "weight_decay": weight_decay,
            "shapes": None,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = group["shapes"] or [parameter.shape for parameter in group["params"]]
            for parameter, shape in zip(group["params"], shapes, strict=True):
                if parameter.grad is not None:
                    gradient = parameter.grad.float().reshape(shape)
                    update = self._momentum(self.state[parameter], gradient, group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"])
        return loss

    def _momentum(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Take one gradient into a parameter's state; return the direction of the step."""
        axes = _factored_axes(gradient.shape)
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(gradient, dtype=self.momentum_dtype)
            # The means are over axes kept with length 1, so that they broadcast.
            for axis in axes or (None,):
                shape = [1 if axis == k else length for k, length in enumerate(gradient.shape)]
                state["moment" if axis is None else f"moment_{axis}"] = gradient.new_zeros(shape)
        elif state["momentum"].shape != gradient.shape:
            raise TuneError(
                "this checkpoint is of an earlier lamplit, whose Adafactor took all heads of attention together; "
                "delete checkpoints/last.safetensors in the run's folder to start over"
            )
        decay = min(group["beta2_cap"], 1 - (state["step"] + 1) ** -group["decay"])
        state["step"] += 1
        squares = gradient.square().add_(group["eps"])
        if axes is None:
            update = gradient * state["moment"].lerp_(squares, 1 - decay).rsqrt()
        else:
            columns, rows = (state[f"moment_{axis}"] for axis in axes)
            columns.lerp_(squares.mean(axes[0], keepdim=True), 1 - decay)
            rows.lerp_(squares.mean(axes[1], keepdim=True), 1 - decay)
            update = gradient * (rows / rows.mean(axes[0], keepdim=True)).rsqrt() * columns.rsqrt()
        # The step is taken along the momentum before it is rounded for storage.
        momentum: Tensor = state["momentum"].float() * group["beta1"] + update.mul_(1 - group["beta1"])
        state["momentum"] = momentum.to(self.momentum_dtype)
        return momentum


def _factored_axes(shape: torch.Size) -> tuple[int, int] | None:
    """Return the second-largest axis and the largest; None if the former is too short to factor."""
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return (second, largest) if shape[second] >= _MIN_FACTORED else None


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the factor of the learning rate in a step (from 0): a linear rise from 0, then half a cosine to 0."""
    rise = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def set_rates(optimizer: Optimizer, step: int, total_steps: int, warmup_ratio: float) -> dict[str, float]:
    """Set the learning rates of a step, counted from 0.

    Args:
        optimizer: each of its groups has a `peak`, the step of its `start`, and the name of its `rate`.
        step: the step that comes.
        total_steps: steps of the run.
        warmup_ratio: the part of a group's steps over which its rate rises.

    Returns:
        The rates by their names.
    """
    for group in optimizer.param_groups:
        total = total_steps - group["start"]
        # The first step of the paper's schedule has rate 0; counting from 1 puts it to use.
        count = step - group["start"] + 1
        warmup_steps = round(warmup_ratio * total)
        factor = warmup_cosine(count, warmup_steps=warmup_steps, total_steps=total + 1) if count > 0 else 0.0
        group["lr"] = group["peak"] * factor
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


def parameter_groups(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Split the parameters that train into those that decay and those that do not, as the paper does.

    Only kernels decay: weights of two or more dimensions that are not an embedding's. Biases, norms,
    class tokens, position and token embeddings, logit scale and bias do not.

    Args:
        parameters: a module, or pairs of name and parameter, among which an embedding is known by its name only
            ("embed" in the name of its module). Frozen parameters are left out.
        weight_decay: in torch's sense, multiplied by the learning rate.

    Returns:
        Two groups for a torch optimizer, in the order of `named_parameters`; an empty one is left out. `shapes` has
        the shapes of a module's parameters as the paper's code keeps them, for Adafactor.
    """
    embeddings: set[int] = set()
    heads: dict[Tensor, tuple[int, ...]] = {}
    if isinstance(parameters, nn.Module):
        heads = _shapes_with_heads(parameters)
        embeddings = {id(module.weight) for module in parameters.modules() if isinstance(module, nn.Embedding)}
        parameters = parameters.named_parameters()
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            kernel = parameter.ndim >= 2 and id(parameter) not in embeddings and _names_kernel(name)
            (decaying if kernel else others).append(parameter)
    return [
        {"params": group, "weight_decay": decay, "shapes": [heads.get(p, tuple(p.shape)) for p in group]}
        for group, decay in ((decaying, weight_decay), (others, 0.0))
        if group
    ]


def _shapes_with_heads(module: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Map the kernels of a module's attention to their shapes with an axis for heads, as Flax keeps them.

    (W, H, D) of Flax is (H, D, W) here, as torch has a kernel's output first; that of the output projection, (H, D, W)
    there, is (W, H, D) here.
    """
    shapes: dict[Tensor, tuple[int, ...]] = {}
    for attention in module.modules():
        if isinstance(attention, Attention | AttentionPoolLatent):
            heads = (attention.num_heads, attention.head_dim)
            for name in ("qkv", "q", "kv"):
                linear = getattr(attention, name, None)
                if isinstance(linear, nn.Linear):
                    shapes[linear.weight] = (linear.out_features // (heads[0] * heads[1]), *heads, linear.in_features)
            if isinstance(attention.proj, nn.Linear):
                shapes[attention.proj.weight] = (attention.proj.out_features, *heads)
    return shapes


def _names_kernel(name: str) -> bool:
    # "blocks.0.fc1.weight" and "attention.in_proj_weight" are kernels; "pos_embed", "cls_token" and
    # "embeddings.word_embeddings.weight" are not; "patch_embed.proj.weight" is one again.
    *_, module, weight = ["", *name.split(".")]
    return weight.endswith("weight") and "embed" not in module


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients that there are, together."""
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def step_clipped(optimizer: Optimizer, norm: float, most: float) -> None:
    """Take a step along gradients of this norm, scaled down to the norm `most` if theirs is larger.

    torch's fused AdamW scales them in its own pass over the memory, as it does for gradients that were scaled up for
    half precision. What `nn.utils.clip_grad_norm_` gives is the same but for the last bit.
    """
    scale = (norm + 1e-6) / most  # the summand is torch's own
    if scale <= 1:
        optimizer.step()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale  # type: ignore[attr-defined]
    else:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, most, torch.tensor(norm))
        optimizer.step()


def build_optimizer(
    name: Literal["adamw", "adafactor"],
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """Make an optimizer of everything that trains, with decay on kernels only.

    Args:
        name: `adamw` or `adafactor`.
        parameters: as for `parameter_groups`.
        lr: learning rate.
        weight_decay: in torch's sense, multiplied by the learning rate.
        betas: decays of the first moment and of the second; for Adafactor the latter is the largest decay.

    Raises:
        UsageError: there is no such optimizer, or nothing trains.
    """
    groups = parameter_groups(parameters, weight_decay=weight_decay)
    if not groups:
        raise UsageError("every parameter is frozen, so there is nothing to tune; unlock a tower")
    if name == "adamw":
        # One pass over the memory instead of a dozen: 4 to 5 times faster than torch's default on a CPU.
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if name == "adafactor":
        return Adafactor(groups, lr=lr, beta1=betas[0], beta2_cap=betas[1])
    raise UsageError(f"unknown optimizer {name!r}; expected 'adamw' or 'adafactor'")
