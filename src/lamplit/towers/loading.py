"""Weights and configurations from disk: strict, and never run as code."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lamplit.errors import TowerError

# What torch, safetensors and transformers raise on damaged files: 12,000 damaged at random gave all of these.
READ_ERRORS = (
    OSError, UnpicklingError, SafetensorError, EOFError, RuntimeError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OverflowError, struct.error,
)  # fmt: skip


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file or a pickled state dict, never running code that the file brings.

    Raises:
        TowerError: the file is not there, or is not a plain dictionary of tensors.
    """
    path = Path(file)
    if not path.is_file():
        raise TowerError(f"no weights at {path}; expected a .safetensors file or a state dict")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except READ_ERRORS as error:
        raise TowerError(
            f"{path} is neither a safetensors file nor a plain state dict: it is damaged, or could only be read by "
            "running code from it, which lamplit never does; save its state_dict() as safetensors"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TowerError(f"{path} is not a state dict: expected a dictionary of tensors")
    return dict(state)


def _unpickle(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # it raises where that matters
        return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Load every tensor or none.

    Raises:
        TowerError: naming the keys that are missing, unexpected or of another shape.
    """
    missing, unexpected = key_difference(module, state)
    own = module.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = [f"{len(keys)} {kind}: {', '.join(keys[:10])}" for kind, keys in problems.items() if keys]
    if told:
        raise TowerError(f"the weights do not fit {name}; {'; '.join(told)}")
    module.load_state_dict(state)


def load_whole(module: nn.Module, file: Path) -> None:
    """Load what a saved model's file holds, every tensor or none.

    Raises:
        TowerError: it is not there, is damaged, or is another module's.
    """
    if not file.is_file():
        raise TowerError(f"{file} is missing: the model is not whole")
    try:
        load_model(module, file)
    except READ_ERRORS as error:
        raise TowerError(f"{file} does not fit its config.json: {error}") from error


def require_whole(name: str, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse a transformers checkpoint that left some of the tower random, by its loading report.

    Raises:
        TowerError: naming the keys that are missing or of another shape.
    """
    shapes = [f"{key} ({tuple(found)} for {tuple(own)})" for key, found, own in mismatched]
    if keys := [*sorted(missing), *sorted(shapes)]:
        raise TowerError(f"{name} lacks weights for: {', '.join(keys[:20])}")


def key_difference(module: nn.Module, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Keys of `module` that `state` lacks, and keys of `state` that `module` has no place for."""
    own = module.state_dict()
    return [k for k in own if k not in state], [k for k in state if k not in own]


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers configuration as JSON values, without where it lay and which release read it."""
    # Through JSON, which turns keys into text: sorted for a fingerprint, 2 comes before 10, but "10" before "2".
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and reports from stderr: our bars are there, and what is missing raises."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
