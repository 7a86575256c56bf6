"""Each tower as an ONNX file that takes pixels or token ids and gives unit vectors of the joint space.

`image_tower.onnx`: `pixels` (B, 3, height, width) uint8, scaled and cropped but not normalised, to `vectors` (B, D).
`text_tower.onnx`: `input_ids` and `attention_mask` (B, T) int64, padded on the right, to `vectors` (B, D).
Everything else that a caller needs is in `config.json` and `tokenizer/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit._version import __version__
from lamplit.errors import TowerError, first_line
from lamplit.exports.export_report import ExportReport
from lamplit.exports.parts import copy_tokenizer, find_image_tower, find_text_tower
from lamplit.exports.sample import SENTENCES, Sample, require_agreement
from lamplit.model import LiT
from lamplit.store.embed.backends import TOLERANCE
from lamplit.towers.loading import quiet_logging
from lamplit.towers.onnx_files import import_onnxruntime, onnx_errors, open_onnx, write_onnx
from lamplit.towers.texts.text_tower import TextTower
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer

FORMAT = 1
# An int8 file must be at most this fraction of the float32 one (convolutions stay float32) to be worth its loss.
_MAX_INT8_SIZE = 0.75
_WAYS = ("alone", "in_batch")


class _ImageGraph(nn.Module):
    """Pixels to vectors of the joint space: normalisation, tower, centre and head in one."""

    def __init__(self, model: LiT) -> None:
        super().__init__()
        self.tower = find_image_tower(model)
        self.joint = LiT(None, model.identity, center=model.center, image_head=model.image_head)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.joint.project(F.normalize(self.tower(pixels), dim=-1))


class _TextGraph(nn.Module):
    """Token ids to vectors of the joint space: encoder, pooling and head in one."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.tower.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        if self.tower.pooling == "cls":
            features = hidden[:, 0]
        elif self.tower.pooling == "last":
            last = (attention_mask.sum(1, keepdim=True) - 1)[..., None].expand(-1, -1, hidden.shape[2])
            features = hidden.gather(1, last)[:, 0]
        else:
            features = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(self.tower.head(features), dim=-1)


def write(model: LiT, folder: Path, sample: Sample, *, int8: bool = False) -> ExportReport:
    """Write the towers that the model has, and check each against the model's vectors.

    Raises:
        TowerError: a tower cannot be written as ONNX, or its vectors differ by more than 1e-4.
    """
    report = ExportReport("onnx", str(folder), sample.origin)
    config: dict[str, Any] = {
        "format": FORMAT,
        "lamplit": __version__,
        "width": model.width,
        "logit_scale": float(model.logit_multiplier),
        "logit_bias": None if model.logit_bias is None else float(model.logit_bias),
    }
    if model.image_tower is None:
        report.notes.append("the model has no image tower: only the text tower was written")
    else:
        config["image"] = _write_image(model, folder, sample, report)
    if model.text_tower is None:
        report.notes.append("the model has no text tower: only the image tower was written")
    else:
        config["text"] = _write_text(model, folder, sample, report)
    if int8:
        report.int8 = _write_int8(model, folder, sample)
        if list(folder.glob("*.int8.onnx")):
            report.notes.append(
                "an int8 vector depends on what else is in its batch (ONNX Runtime scales by the largest value of the "
                "batch): embed what you compare in the same way, one by one or in like batches"
            )
    config |= {"checked": {"sample": sample.origin, "largest_difference": report.differences}, "int8": report.int8}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return report


def _write_image(model: LiT, folder: Path, sample: Sample, report: ExportReport) -> dict[str, Any]:
    assert sample.pixels is not None
    assert sample.zimg is not None
    tower, file = find_image_tower(model), folder / "image_tower.onnx"
    inputs = {"pixels": sample.pixels[:1].repeat(2, 1, 1, 1)}  # an axis of one would be taken for fixed
    write_onnx(_ImageGraph(model), inputs, file, name=tower.spec, axes=[{0: torch.export.Dim("batch")}])
    vectors = _image_vectors(file, sample)
    report.differences["image vectors"] = require_agreement("image tower", vectors, sample.zimg, TOLERANCE)
    return {
        "file": file.name,
        "input": "pixels",
        "dtype": "uint8",
        "shape": ["batch", 3, *tower.preprocessing.image_size],
        "output": "vectors",
        "tower": tower.spec,
        "fingerprint": model.identity.fingerprint,
        "preprocessing": tower.preprocessing.to_dict(),
    }


def _write_text(model: LiT, folder: Path, sample: Sample, report: ExportReport) -> dict[str, Any]:
    assert sample.ztxt is not None
    tower, file = find_text_tower(model), folder / "text_tower.onnx"
    write_text_graph(tower, file)
    together = _text_vectors(file, tower, [sample.texts])
    alone = _text_vectors(file, tower, [[text] for text in sample.texts])
    report.differences["text vectors, padded"] = require_agreement("text tower", together, sample.ztxt, TOLERANCE)
    report.differences["text vectors, one by one"] = require_agreement("text tower", alone, sample.ztxt, TOLERANCE)
    if isinstance(tower.tokenizer, PretrainedTokenizer):
        copy_tokenizer(tower).save_pretrained(folder / "tokenizer")
    else:
        tower.save_tokenizer(folder / "tokenizer")
    return {
        "file": file.name,
        "inputs": ["input_ids", "attention_mask"],
        "dtype": "int64",
        "shape": ["batch", "tokens"],
        "output": "vectors",
        "tower": tower.spec,
        "tokenizer": "tokenizer",
        "tokenizer_settings": tower.tokenizer.describe(),
        "pad_id": tower.tokenizer.pad_id,
        "context_length": tower.context_length,
        "pooling": tower.pooling,
    }


def write_text_graph(tower: TextTower, file: Path) -> None:
    """Write a text tower as an ONNX file, in eval mode and without gradients; see the module for what it takes.

    Raises:
        TowerError: it does what ONNX cannot hold.
    """
    encoder: Any = tower.encoder
    if hasattr(encoder, "config"):  # a decoder would return what it keeps for the next token
        encoder.config.use_cache = False
    tokens = torch.export.Dim("tokens", max=tower.context_length)
    axes = [{0: torch.export.Dim("batch"), 1: tokens}] * 2
    write_onnx(_TextGraph(tower), _pad(tower, list(SENTENCES[2:5])), file, name=tower.spec, axes=axes)


def _write_int8(model: LiT, folder: Path, sample: Sample) -> dict[str, Any]:
    """Write int8 files beside the others where they are smaller, and measure what they lose.

    ONNX Runtime scales activations by the largest of the whole batch, so a vector depends on what else is in its batch.
    Both ends are measured: each input alone, and all of them together.
    """
    agreement: dict[str, Any] = {}
    exact: dict[str, Tensor] = {}
    rounded: dict[str, dict[str, Tensor]] = {way: {} for way in _WAYS}
    for kind in ("image", "text"):
        file = folder / f"{kind}_tower.onnx"
        if not file.is_file():
            continue
        exact[kind] = _vectors(file, kind, model, sample, "in_batch")
        small = _quantize(file)
        if small is None:
            agreement[kind] = {
                "file": None,
                "reason": "matrix products are too small a part of it: int8 would save less than a quarter",
            }
        else:
            agreement[kind] = {"file": small.name, "batch": len(exact[kind])}
        for way in _WAYS:
            rounded[way][kind] = exact[kind] if small is None else _vectors(small, kind, model, sample, way)
            if small is not None:
                cosines = (exact[kind] * rounded[way][kind]).sum(1)
                agreement[kind][way] = {"mean_cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}
    if len(exact) == 2:
        before = exact["text"] @ exact["image"].T
        for name, dim in (("text_to_image", 1), ("image_to_text", 0)):
            same = {
                way: before.argmax(dim) == (rounded[way]["text"] @ rounded[way]["image"].T).argmax(dim) for way in _WAYS
            }
            agreement[f"{name}_top1_agreement"] = {way: float(same[way].float().mean()) for way in _WAYS}
    return agreement


def _quantize(file: Path) -> Path | None:
    """Round the weights of matrix products and embeddings to int8; None if that saves too little."""
    import_onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = file.with_suffix(".int8.onnx")
    with quiet_logging():  # it recommends a pass that the exporter has made
        quantize_dynamic(
            file, small, op_types_to_quantize=["MatMul", "Gather"], per_channel=True, weight_type=QuantType.QInt8
        )
    if small.stat().st_size <= _MAX_INT8_SIZE * file.stat().st_size:
        return small
    small.unlink()
    return None


def _vectors(file: Path, kind: str, model: LiT, sample: Sample, way: str) -> Tensor:
    if kind == "image":
        assert sample.pixels is not None
        pixels = sample.pixels
        return _run(file, [{"pixels": part} for part in torch.split(pixels, 1 if way == "alone" else len(pixels))])
    texts = [[text] for text in sample.texts] if way == "alone" else [sample.texts]
    return _text_vectors(file, find_text_tower(model), texts)


def _image_vectors(file: Path, sample: Sample) -> Tensor:
    assert sample.pixels is not None
    # A batch of one, too: its axis must have stayed free.
    parts = [sample.pixels[:1], *torch.split(sample.pixels[1:], 16)]
    return _run(file, [{"pixels": part} for part in parts if len(part)])


def _text_vectors(file: Path, tower: TextTower, batches: list[list[str]]) -> Tensor:
    return _run(file, [_pad(tower, batch) for batch in batches])


def _run(file: Path, batches: list[dict[str, Tensor]]) -> Tensor:
    session = open_onnx(file, torch.get_num_threads())
    if session is None:
        raise TowerError(f"ONNX Runtime cannot read {file.name} as it was exported")
    try:
        arrays = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
        return torch.cat([torch.from_numpy(session.run(None, batch)[0]) for batch in arrays])
    except onnx_errors() as error:
        raise TowerError(f"ONNX Runtime cannot run {file.name}: {first_line(error)}") from error


def _pad(tower: TextTower, texts: list[str]) -> dict[str, Tensor]:
    """Token ids of a batch as the graph takes them."""
    tokens = [torch.tensor(ids) for ids in tower.tokenize(texts)]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tower.tokenizer.pad_id)
    lengths = torch.tensor([len(row) for row in tokens])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
