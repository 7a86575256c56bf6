"""Where a model runs."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from lamplit.errors import UsageError, first_line

_MAX_REASON = 80  # characters; torch lists its back ends, dispatch keys and addresses


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
    except (RuntimeError, AssertionError, TypeError) as error:  # CUDA's absence is an AssertionError
        reason = first_line(error)
        reason = reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 1]}…"
        raise UsageError(f"device {str(device)!r} cannot be used here ({reason}); type cpu, or leave it out") from error
    return found


def is_same_device(asked: str | torch.device, current: torch.device) -> bool:
    """Tell whether a tensor on `current` is where it was asked to be: `cuda` is any `cuda:N`."""
    wanted = torch.device(asked)
    return wanted.type == current.type and wanted.index in (None, current.index)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the random state of the CPU and of `device`, by type of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "mps":  # there is one
        states["mps"] = torch.mps.get_rng_state()
    elif device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """Undo `random_states`; what is missing, or of another type of device, is left alone."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
    elif device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bf16 is faster than float32 here; on a CPU without hardware for it, it is six times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def keep_freed_memory() -> None:
    """Let glibc reuse the memory that a layer has freed, in this whole process.

    By default it returns every large tensor to the system and gets new, zeroed pages for the next one, which takes half
    of a convolutional tower's time. Other allocators and other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        map_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        library.mallopt(map_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)
