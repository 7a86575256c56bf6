"""Checkpoint and log of a run: what it needs to go on, in files that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lamplit.errors import TuneError
from lamplit.files import replacing, write_text
from lamplit.towers.devices import random_states, set_random_states
from lamplit.towers.saving import save_weights

_OLD_KEYS = {"head_start": "closed_form"}  # of the log of an earlier version


def save_checkpoint(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write weights, optimizer state, random state and `progress` (JSON values) atomically to `file`."""
    tensors = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    for name, state in random_states(_device(model)).items():
        tensors[f"random.{name}"] = state
    # One key: safetensors writes several in an order of its own, and a resumed run ends in the same bytes.
    described = {"lamplit": json.dumps({"progress": progress, "numbers": numbers})}
    with replacing(file) as partial:
        save_weights({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, described)


def load_checkpoint(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model, optimizer and random state from `file`; return its `progress`.

    Raises:
        TuneError: the file cannot be read, or belongs to another model.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            described = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise TuneError(f"checkpoint {file} cannot be read ({error}); delete it to start over") from error
    own = trained_tensors(model)
    noted = json.loads(described.get("lamplit", "{}"))
    given = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    shapes, given_shapes = ({name: tensor.shape for name, tensor in part.items()} for part in (own, given))
    if not noted or shapes != given_shapes:
        raise TuneError(f"checkpoint {file} belongs to another model; delete it or give another --out")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
    states: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in noted["numbers"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            states.setdefault(int(index), {})[key] = _laid_out_as(parameters[int(index)], tensor)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    random = {name.removeprefix("random."): t for name, t in tensors.items() if name.startswith("random.")}
    set_random_states(_device(model), random)
    progress: dict[str, Any] = noted["progress"]
    return progress


@contextmanager
def open_log(file: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a log to append to; the function that this yields writes one line of JSON at once."""
    with file.open("a", encoding="utf-8") as opened:

        def write(values: dict[str, Any]) -> None:
            opened.write(json.dumps(values) + "\n")
            opened.flush()

        yield write


def read_log(file: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a log, an older one under today's names; an empty list if there is no file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
        lines.append({_OLD_KEYS.get(key, key): value for key, value in values.items()})
    return lines


def cut_log(file: Path, step: int) -> float:
    """Drop the lines after `step`, whose steps are taken again; return the seconds that the run had taken."""
    kept = [values for values in read_log(file) if values["step"] <= step]
    write_text(file, "".join(json.dumps(values) + "\n" for values in kept))
    return next((float(values["seconds"]) for values in reversed(kept) if "seconds" in values), 0.0)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a run changes; locked ones are not among them."""
    kept = model.state_dict().keys()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {name: buffer for name, buffer in model.named_buffers() if name in kept}  # BatchNorm's
    return {name: tensor.detach() for name, tensor in (trained | statistics).items()}


def _device(model: nn.Module) -> torch.device:
    """Where the run is: not the current device of its type, where that is another."""
    return next(model.parameters()).device


def _laid_out_as(parameter: Tensor, state: Tensor) -> Tensor:
    """Lay a moment out in memory as its parameter: torch's fused optimizers read both in one sweep and do not check."""
    if state.shape != parameter.shape:
        return state
    return torch.empty_like(parameter, dtype=state.dtype).copy_(state)
