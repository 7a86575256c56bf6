"""Weights and configurations from disk: strict, and never run as code."""

from __future__ import annotations

import argparse
import json
import logging
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lamplit.errors import TowerError, first_line

# What transformers raises on damaged files and on configurations with wrong values; only for calls of its own.
READ_ERRORS = (
    OSError, UnpicklingError, SafetensorError, EOFError, RuntimeError, ValueError, LookupError, TypeError,
    AttributeError,
)  # fmt: skip
# What torch's unpickler raises: files that were cut off or damaged at random gave all of these.
_PICKLE_ERRORS = (
    OSError, UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error,
)  # fmt: skip


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file or a pickled state dict, never running code that the file brings.

    Raises:
        TowerError: the file is not there, or is not a plain dictionary of tensors.
    """
    state = read_checkpoint(file)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TowerError(f"{file} is not a state dict: expected a dictionary of tensors")
    return dict(state)


def read_checkpoint(file: str | Path) -> Any:
    """Read what a trainer wrote, whatever is in it, never running code that the file brings.

    Raises:
        TowerError: the file is not there, is damaged, or holds objects that only code could make.
    """
    path = Path(file)
    if not path.is_file():
        raise TowerError(f"no weights at {path}; expected a .safetensors file or a state dict")
    require_readable(path)
    return _load_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TowerError(f"{path} is damaged: it is no safetensors file ({first_line(error)})") from error


def _unpickle(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch raises if that matters
        try:
            # A Namespace is a bag of values, in which timm's and other trainers keep their settings.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except _PICKLE_ERRORS as error:
            raise _unreadable(path, _refusal(path)) from error


def _refusal(path: Path) -> str:
    """Say what torch refused; the names of classes are only to be had from its newer format of files."""
    try:
        classes = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
    except _PICKLE_ERRORS:
        classes = set()
    if classes:
        return f"it holds objects of {', '.join(sorted(classes)[:5])}, which could only be read by running code from it"
    return "it is damaged, or could only be read by running code from it"


def _unreadable(path: Path, reason: str) -> TowerError:
    return TowerError(
        f"{path} is neither a safetensors file nor a plain state dict: {reason}, which lamplit never does; save its "
        "state_dict() as safetensors"
    )


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
    listed = [f"{len(keys)} {kind}: {', '.join(keys[:10])}" for kind, keys in problems.items() if keys]
    if listed:
        raise TowerError(f"the weights do not fit {name}; {'; '.join(listed)}")
    module.load_state_dict(state)


def require_readable(file: Path) -> None:
    """Refuse a file that may not be read, of which safetensors would say that it does not exist.

    Raises:
        TowerError: it is there and cannot be opened.
    """
    try:
        with file.open("rb"):
            pass
    except FileNotFoundError:
        return  # its reader says so
    except OSError as error:
        raise TowerError(
            f"{file} may not be read ({error.strerror}); its owner can allow it: chmod a+r {file}"
        ) from error


def load_whole(module: nn.Module, file: Path) -> None:
    """Load a file of a saved model, every tensor or none.

    Raises:
        TowerError: the file is not there, is damaged, or is another module's.
    """
    if not file.is_file():
        raise TowerError(f"{file} is missing: the model is not whole")
    require_readable(file)
    try:
        load_model(module, file)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last if the tensors are another module's
        raise TowerError(f"{file} does not fit its config.json: {error}") from error


def map_parameters(module: nn.Module, file: Path) -> None:
    """Let the parameters of a module that was loaded from a file lie in that file, mapped into memory.

    What is not used is not read, and several processes have it in memory once. A parameter that the file has under
    another name or in another type stays as it is.

    Args:
        module: on the CPU, with the values that the file has.
        file: a safetensors file, which nobody writes to; another may take its place.
    """
    stored = load_file(file)  # maps it
    for name, parameter in module.named_parameters():
        found = stored.get(name)
        if found is not None and (found.shape, found.dtype) == (parameter.shape, parameter.dtype):
            parameter.data = found


def require_whole(name: str, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise if transformers' loading report says that some of the tower stayed random.

    Raises:
        TowerError: naming the keys that are missing or of another shape.
    """
    shapes = [f"{key} ({tuple(found)} for {tuple(own)})" for key, found, own in mismatched]
    if keys := [*sorted(missing), *sorted(shapes)]:
        raise TowerError(f"{name} lacks weights for: {', '.join(keys[:20])}")


def key_difference(module: nn.Module, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the keys of `module` that `state` lacks, and the keys of `state` that `module` does not have."""
    own = module.state_dict()
    return [k for k in own if k not in state], [k for k in state if k not in own]


def plain_config(config: Any) -> dict[str, Any]:
    """Return a transformers configuration as JSON values, without its path and the release that read it."""
    # Through JSON, which turns keys into text: sorted for a fingerprint, 2 comes before 10, but "10" before "2".
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


@contextmanager
def opening(spec: str) -> Iterator[None]:
    """Turn what transformers raises into a `TowerError` that names `spec`; only calls of its own go inside."""
    try:
        yield
    except (*READ_ERRORS, ImportError) as error:
        raise TowerError(f"{spec} could not be opened: {first_line(error)}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and reports off stderr: ours are shown, and missing weights raise."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_logging(name: str | None = None) -> Iterator[None]:
    """Keep back what a logger says below an error, by default that of every library; its level is restored."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_model_json(name: str, file: str) -> Any:
    """Read a JSON file of a model's folder or hub repository; return None if there is none."""
    path = Path(name) / file
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, file))
        except EntryNotFoundError:
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
