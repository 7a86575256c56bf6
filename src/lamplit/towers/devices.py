"""Where a model runs."""

from __future__ import annotations

import torch

from lamplit.errors import UsageError, first_line


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device that was asked for, or by default the accelerator if there is one, else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)  # a driver that is missing says so here
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # CUDA's absence is an AssertionError
        raise UsageError(f"there is no device {str(device)!r} here: {first_line(error)}") from error
    return found


def is_same_device(asked: str | torch.device, current: torch.device) -> bool:
    """Tell whether a tensor on `current` is where it was asked to be: `cuda` is any `cuda:N`."""
    wanted = torch.device(asked)
    return wanted.type == current.type and wanted.index in (None, current.index)


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bf16 is faster than float32 here; on a CPU without hardware for it, it is six times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
