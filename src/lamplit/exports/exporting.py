"""One model to one folder that another library opens."""

from __future__ import annotations

import copy
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, get_args

from lamplit.errors import UsageError
from lamplit.exports import onnx, open_clip, sentence_transformers, transformers
from lamplit.exports.export_report import ExportReport
from lamplit.exports.sample import take_sample
from lamplit.files import give_permissions
from lamplit.locations.paths import require_local
from lamplit.model import LiT, load
from lamplit.towers.devices import pick_device

Target = Literal["onnx", "transformers", "open-clip", "sentence-transformers"]


def export(
    model: str | Path | LiT,
    out: str | Path,
    *,
    to: Target,
    int8: bool = False,
    sample: str | Path | None = None,
    device: str | None = None,
) -> ExportReport:
    """Write a model for another library, open it there, and compare its vectors with the model's.

    Nothing stays in the folder unless every comparison holds: 1e-4 for ONNX Runtime, 1e-5 for the others, as the
    largest difference of any coordinate of a unit vector.

    On the command line: `lamplit export`.

    Args:
        model: an open model, its folder, or a name that `load` takes. An open one is left as it is.
        out: folder to write; new or empty.
        to: `onnx`, `transformers`, `open-clip` or `sentence-transformers` (the text tower alone).
        int8: with `onnx`, write int8 files too, and measure what they lose.
        sample: pairs to compare on (anything that `read_pairs` reads); by default sentences and patterns made here.
        device: torch device of the vectors that the export is compared with; by default the CPU, where the other
            library runs.

    Returns:
        The files, and the largest differences from the model's vectors.

    Raises:
        UsageError: the target is unknown, or the folder is not empty.
        TowerError: the other library has no place for what the model does; the text says for what.
        MissingExtraError: the other library is not installed.
    """
    require_local(out, "an export")
    folder = Path(out)
    if to not in get_args(Target):
        raise UsageError(f"there is no export to {to!r}; expected one of: {', '.join(get_args(Target))}")
    if int8 and to != "onnx":
        raise UsageError(f"int8 is for ONNX Runtime; {to} opens float32 alone")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder; give another, or remove it first")
    own = _own_copy(model, to)
    checked_on = take_sample(own.to(pick_device(device or "cpu")), sample)
    own = own.cpu()
    with ExitStack() as failed:
        failed.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if to == "onnx":
            report = onnx.write(own, folder, checked_on, int8=int8)
        elif to == "transformers":
            report = transformers.write(own, folder, checked_on)
        elif to == "open-clip":
            report = open_clip.write(own, folder, checked_on)
        else:
            report = sentence_transformers.write(own, folder, checked_on)
        failed.pop_all()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        give_permissions(file)
    report.files = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    return report


def _own_copy(model: str | Path | LiT, to: Target) -> LiT:
    """Return the model in float32 on the CPU, with LoRA merged; a copy if it is the caller's."""
    if isinstance(model, LiT):
        own = copy.deepcopy(model)
    else:
        own = load(model, device="cpu", towers="text" if to == "sentence-transformers" else "both")
    if own.text_tower is not None and own.text_tower.lora is not None:
        own.text_tower.merge_lora()
    return own.cpu().float().eval().requires_grad_(False)
