"""Weights to disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lamplit.files import safetensors_errors


def save_weights(
    weights: nn.Module | Mapping[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a module's weights, or tensors by their names, as a safetensors file.

    Args:
        weights: a module, whose shared tensors are written once; or contiguous tensors that share nothing.
        file: where to.
        metadata: texts to keep with the tensors.

    Raises:
        OSError: the disk is full, or the file may not be written.
    """
    with safetensors_errors(file):
        if isinstance(weights, nn.Module):
            save_model(weights, str(file), metadata)
        else:
            save_file(dict(weights), file, metadata)
