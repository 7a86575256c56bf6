"""ONNX files: written by torch, read by ONNX Runtime."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamplit.errors import TowerError, first_line
from lamplit.files import replacing

if TYPE_CHECKING:
    from torch import Tensor, nn

# What torch.export raises if it cannot follow a module: its tracer runs the code of the module with values that are no
# tensors, so that nearly any error of that code can come out. `embed` then goes on with torch.
_EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def open_onnx(file: Path, threads: int, *, spinning: bool = True) -> Any:
    """Open an ONNX file with ONNX Runtime on the CPU; return None if it cannot be read.

    Threads that spin after a call answer the next one sooner, but use a core while they wait.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, too
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")  # from one product to the next
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except onnx_errors():
        return None


def import_onnxruntime() -> Any:
    """Import ONNX Runtime without its telemetry.

    From version 1.29 on it keeps an id of the machine in the user's cache, and sends names and digests of models to
    Microsoft, unless this variable is set before it is imported.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def onnx_errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises; its errors have no common base."""
    import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    # A file of weights that may not be read gives ModelRequiresCompilation, so no few are picked.
    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def write_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    file: Path,
    *,
    name: str,
    axes: Sequence[Mapping[int, Any]],
) -> None:
    """Write a module as an ONNX file whose one output is `vectors`.

    Args:
        module: what to export, in eval mode.
        inputs: names and examples of the inputs, in the order of `module.forward`.
        file: written whole or not at all.
        name: of the module, for the error.
        axes: for each input, the `torch.export.Dim` of every axis of variable length.

    Raises:
        TowerError: the module cannot be expressed in ONNX.
    """
    import torch  # not needed to open a file, and slow to import

    example = tuple(inputs.values())
    names = tuple({axis: length.__name__ for axis, length in each.items()} for each in axes)
    with warnings.catch_warnings(), replacing(file) as partial:
        warnings.simplefilter("ignore")  # the exporter warns of its own future
        try:
            program = torch.export.export(module, example, dynamic_shapes=tuple(map(dict, axes)))
        except _EXPORT_ERRORS as error:
            raise TowerError(f"{name} cannot be exported to ONNX: {first_line(error)}") from error
        try:
            torch.onnx.export(
                program, example, partial, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=names, input_names=list(inputs), output_names=["vectors"],
            )  # fmt: skip
        except RuntimeError as error:  # the base of all errors of torch.onnx
            raise TowerError(f"{name} cannot be exported to ONNX: {first_line(error)}") from error
