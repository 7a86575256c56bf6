"""A tower of the caller's that is run, moved and frozen for a while, and then given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def borrowed(tower: nn.Module) -> Iterator[None]:
    """Give a module back as it was, whatever the block does to it and however the block ends.

    Restores its parameters and buffers (the same objects with the same storage, and so their device, type and memory
    format), gradients, `requires_grad`, and the mode (train or eval) of every submodule. Nothing is copied: the
    original tensors are kept until the block ends, so a tower that is moved takes its memory twice if both devices
    share theirs.

    Example:
        >>> with borrowed(tower):
        ...     vectors = Locked(tower).to("cuda")(images)
    """
    modes = [(module, module.training) for module in tower.modules()]
    parameters = [
        (module, name, parameter, parameter.data, parameter.requires_grad, parameter.grad)
        for module in tower.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    buffers = [
        (module, name, buffer)
        for module in tower.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    for _, _, parameter, *_ in parameters:
        parameter.grad = None  # else it would be moved along
    try:
        yield
    finally:
        for module, name, parameter, data, requires_grad, grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad).grad = grad
            setattr(module, name, parameter)
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for module, training in modes:
            module.training = training
