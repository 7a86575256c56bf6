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
from lamplit.model import LiT, load

Target = Literal["onnx", "transformers", "open-clip", "sentence-transformers"]


def export(
    model: LiT | str | Path,
    folder: str | Path,
    *,
    to: Target,
    int8: bool = False,
    sample: str | Path | None = None,
) -> ExportReport:
    """Write a model for another library, open it there, and compare its vectors with the model's.

    Nothing stays in the folder unless every comparison holds: 1e-4 for ONNX Runtime, 1e-5 for the others, as the
    largest difference of any coordinate of a unit vector.

    Args:
        model: a model, or the folder of one. It is left as it is.
        folder: where to; new or empty.
        to: `onnx`, `transformers`, `open-clip` or `sentence-transformers` (the text tower alone).
        int8: with `onnx`, write int8 files too, and measure what they lose.
        sample: pairs to compare on (anything that `read_pairs` reads); by default sentences and patterns made here.

    Raises:
        UsageError: the target is unknown, or the folder is not empty.
        TowerError: the other library has no place for what the model does; the text says for what.
        MissingExtraError: the other library is not installed.
    """
    folder = Path(folder)
    if to not in get_args(Target):
        raise UsageError(f"there is no export to {to!r}; expected one of: {', '.join(get_args(Target))}")
    if int8 and to != "onnx":
        raise UsageError(f"int8 is for ONNX Runtime; {to} opens float32 alone")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder; give another, or remove it first")
    if isinstance(model, LiT):
        model = copy.deepcopy(model)
    else:
        model = load(model, towers="text" if to == "sentence-transformers" else "both")
    if model.text_tower is not None and model.text_tower.lora is not None:
        model.text_tower.merge_lora()
    model = model.cpu().float().eval().requires_grad_(False)
    checked_on = take_sample(model, sample)
    with ExitStack() as failed:
        failed.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if to == "onnx":
            report = onnx.write(model, folder, checked_on, int8=int8)
        elif to == "transformers":
            report = transformers.write(model, folder, checked_on)
        elif to == "open-clip":
            report = open_clip.write(model, folder, checked_on)
        else:
            report = sentence_transformers.write(model, folder, checked_on)
        failed.pop_all()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    report.files = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    return report
