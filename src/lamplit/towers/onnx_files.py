"""ONNX files: written by torch, read by ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamplit.errors import TowerError, first_line
from lamplit.files import replacing

if TYPE_CHECKING:
    from torch import Tensor, nn


def open_onnx(file: Path, threads: int, *, spinning: bool = True) -> Any:
    """Open an ONNX file with ONNX Runtime on the CPU; nothing where it cannot be read.

    Threads that spin answer the next call sooner, and burn a core while there is none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, too
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except onnx_errors():
        return None


def onnx_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its errors have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented",
        "EPFail", "RuntimeException",
    )  # fmt: skip
    return tuple(getattr(state, name) for name in names)


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
        module: what is to run elsewhere, in eval mode.
        inputs: an example of each, in the order of `module.forward`, and what they are to be called.
        file: where to; it is there whole or not at all.
        name: of the module, for the error.
        axes: of each input, the `torch.export.Dim` of every axis of any length.

    Raises:
        TowerError: the module does what ONNX cannot hold.
    """
    import torch  # who opens a file alone does without

    example = tuple(inputs.values())
    names = tuple({place: length.__name__ for place, length in each.items()} for each in axes)
    with warnings.catch_warnings(), replacing(file) as partial:
        warnings.simplefilter("ignore")  # the exporter warns of its own future
        try:
            program = torch.export.export(module, example, dynamic_shapes=tuple(map(dict, axes)))
            torch.onnx.export(
                program, example, partial, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=names, input_names=list(inputs), output_names=["vectors"],
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise TowerError(f"{name} cannot be exported to ONNX: {first_line(error)}") from error
