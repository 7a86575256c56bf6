"""Fold a head's bias into the features before it, for libraries whose projection has no bias.

Features that leave a LayerNorm, and means of them, lie in a plane: z sums to zero, x = gamma z + beta, so that
sum(x / gamma) is the same number for every x. Along the plane's normal a feature is therefore a constant, and a
constant is all that a bias needs: any head with a bias equals one without, for any widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fold_bias(head: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Turn a head with a bias, after a LayerNorm, into one without.

    Args:
        head: width H to D.
        norm: the norm of width H that the head's input leaves, as it is or averaged over tokens.

    Returns:
        W' (D, H) and s (H,) with `W' (x + s) = W x + b` for every x that `norm` can give.
    """
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    fixed = gamma == 0  # such a coordinate is the constant itself
    normal = fixed.double() if fixed.any() else 1 / gamma
    normal = normal / normal.norm()
    constant = normal @ beta
    # The constant becomes as long as a feature is, so that neither drowns the other in float32.
    length = (gamma.square().sum() + beta.square().sum()).sqrt()
    along = (weight @ normal) * constant + bias  # what the head gives for the constant part of every feature
    folded = weight - torch.outer(weight @ normal - along / length, normal)
    return folded.float(), ((length - constant) * normal).float()


@torch.no_grad()
def last_norm(encoder: nn.Module, **inputs: Any) -> tuple[nn.LayerNorm, bool] | None:
    """Find the LayerNorm whose output the encoder returns, and whether it is used in other places too.

    None if the encoder ends in something else, or in a norm without a bias.
    """
    calls: list[tuple[nn.LayerNorm, Tensor]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(module, nn.LayerNorm)
        calls.append((module, output))

    hooks = [m.register_forward_hook(note) for m in encoder.modules() if isinstance(m, nn.LayerNorm)]
    hidden = encoder(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    found = [norm for norm, output in calls if output.shape == hidden.shape and torch.equal(output, hidden)]
    if not found or found[-1].weight is None or found[-1].bias is None:
        return None
    return found[-1], sum(norm is found[-1] for norm, _ in calls) > 1
