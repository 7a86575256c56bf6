"""How the authors' files name and shape their arrays, and which of our tensors each of them becomes.

Everything here is decided by names and shapes alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BertConfig

from lamplit.errors import TowerError
from lamplit.towers.loading import plain_config

Shapes = Mapping[str, tuple[int, ...]]
BERT, TRANSFORMER = "txt/BertEncoder_0", "txt/Encoder_0"
# An image is run through the tower to measure its width; a file of the right shapes must not make that take a day.
MAX_PATCHES, MAX_PIXELS = 2**14, 2**12
_PREFIXES = ("opt/target/", "params/")  # of big_vision's training checkpoints
_POSITIONS = ("img/pos_embedding", "img/Transformer/pos_embedding", "img/Transformer/posembed_input/pos_embedding")
# A block's parts were once numbered through, and are now numbered by their kind.
_OLD_NUMBERS = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "MlpBlock_3": "MlpBlock_0",
                "LayerNorm_2": "LayerNorm_1"}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One of our tensors: the arrays it is made of, each of shape `shape`, and how."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., Tensor]


Plan = dict[str, Piece]  # by the name of our tensor


@dataclass(frozen=True)
class ImageLayout:
    """How to build the image tower, and where its tensors come from."""

    config: dict[str, Any]  # for `published.build_backbone`
    plan: Plan
    width: int  # of its vectors


@dataclass(frozen=True)
class TextLayout:
    """How to build the text tower's encoder, and where its tensors come from."""

    config: dict[str, Any]  # as `TextTower.config`
    plan: Plan
    pooling: Literal["cls", "last"]
    width: int  # before the head
    vocab_size: int
    num_positions: int


@dataclass(frozen=True)
class Layout:
    """What a file holds."""

    image: ImageLayout
    text: TextLayout
    head_plan: Plan  # of the text head

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that there must be."""
        pieces = [*self.image.plan.values(), *self.text.plan.values(), *self.head_plan.values()]
        return {name: piece.shape for piece in pieces for name in piece.names} | {"t": (1,)}


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Map current parameter names to the names used in this checkpoint; names that only training needs are left out.

    Raises:
        TowerError: two names of the checkpoint are the same current name.
    """
    found: dict[str, str] = {}
    names = list(names)
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")
    for name in names:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            new = "/".join(_OLD_NUMBERS.get(part, part) for part in parts)
            if new in found:
                raise TowerError(f"it has {new} twice, as {found[new]} and as {name}")
            found[new] = name
    return found


def read_layout(shapes: Shapes) -> Layout:
    """Find the model that has arrays of these names and shapes.

    Raises:
        TowerError: there is none; the message names the arrays that are missing, unexpected or of another shape.
    """
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise TowerError(f"it has arrays without values: {', '.join(empty[:10])}")
    image = _read_image(shapes)
    bert = any(name.startswith(f"{BERT}/") for name in shapes)
    # BERT's kernels do not say how many heads there are; in every model both towers' heads are of one width.
    text = _read_bert(shapes, image.config["width"] // image.config["num_heads"]) if bert else _read_transformer(shapes)
    layout = Layout(image, text, _linear("", "txt/head", text.width, image.width))
    _require_same(layout.expected(), shapes)
    return layout


def _read_image(shapes: Shapes) -> ImageLayout:
    patch_size, _, _, width = patch_shape = _shape(shapes, "img/embedding/kernel", 4)
    blocks, sizes = _read_blocks(shapes, "img/Transformer", "blocks", width)
    positions = next((name for name in _POSITIONS if name in shapes), _POSITIONS[0])
    rows = _shape(shapes, positions, 3)[1]
    grid = math.isqrt(rows)
    # Newer code adds the class token's position to the token itself, and keeps those of the patches alone.
    alone = grid**2 == rows
    if rows not in (grid**2, grid**2 + 1):
        raise TowerError(f"its {positions} has {rows} rows, which are no square of patches, with or without a class")
    image_size = grid * patch_size
    if rows > MAX_PATCHES or image_size > MAX_PIXELS:
        raise TowerError(f"its image tower sees {rows} patches of {patch_size} pixels, more than any ViT")
    plan: Plan = {
        "cls_token": Piece(("img/cls",), (1, 1, width), _unchanged),
        "pos_embed": Piece((positions,), (1, rows, width), _with_class_row if alone else _unchanged),
        "patch_embed.proj.weight": Piece(("img/embedding/kernel",), (patch_size, patch_size, 3, width), _convolution),
        "patch_embed.proj.bias": Piece(("img/embedding/bias",), patch_shape[-1:], _unchanged),
        **blocks,
        **_norm("norm", "img/Transformer/encoder_norm", width),
    }
    out: int = width
    widths: dict[str, int | None] = {}
    for part in ("pre_logits", "head"):
        widths[f"{part}_width"] = None
        if f"img/{part}/kernel" in shapes:
            outputs = widths[f"{part}_width"] = _shape(shapes, f"img/{part}/kernel", 2)[1]
            plan |= _linear(f"head.{part}", f"img/{part}", out, outputs)
            out = outputs
    config = {"image_size": image_size, "patch_size": patch_size, "width": width, **sizes}
    return ImageLayout(config | widths, plan, out)


def _read_transformer(shapes: Shapes) -> TextLayout:
    vocab_size, width = _shape(shapes, "txt/Embed_0/embedding", 2)
    num_positions = _shape(shapes, "txt/pos_embedding", 3)[1]
    blocks, sizes = _read_blocks(shapes, TRANSFORMER, "blocks", width)
    # Some old files have a second table of positions, to be added.
    tables = tuple(name for name in ("txt/pos_embedding", f"{TRANSFORMER}/pos_embedding") if name in shapes)
    plan: Plan = {
        "token_embedding.weight": Piece(("txt/Embed_0/embedding",), (vocab_size, width), _unchanged),
        "position_embedding": Piece(tables, (1, num_positions, width), lambda *arrays: torch.stack(arrays).sum((0, 1))),
        **blocks,
        **_norm("norm", f"{TRANSFORMER}/encoder_norm", width),
    }
    config = {"vocab_size": vocab_size, "width": width, "context_length": num_positions, **sizes}
    return TextLayout({"library": "scratch", **config}, plan, "last", width, vocab_size, num_positions)


def _read_bert(shapes: Shapes, head_width: int) -> TextLayout:
    embedder, layers = f"{BERT}/embedder/embedders", f"{BERT}/encoder_block/layer_sequence/layers"
    vocab_size, width = _shape(shapes, f"{embedder}_token_ids/embedding", 2)
    num_positions, _ = _shape(shapes, f"{embedder}_position_ids/embedding", 2)
    num_types, _ = _shape(shapes, f"{embedder}_segment_ids/embedding", 2)
    mlp_width = _shape(shapes, f"{layers}_0/mlp_block/mlp/dense_layer/kernel", 2)[1]
    if width % head_width:
        raise TowerError(f"its BERT is {width} wide, which heads of {head_width} do not divide")
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=_count(shapes, layers),
        num_attention_heads=width // head_width,
        intermediate_size=mlp_width,
        max_position_embeddings=num_positions,
        type_vocab_size=num_types,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-12,
    )
    plan: Plan = {
        f"embeddings.{ours}_embeddings.weight": Piece((f"{embedder}_{theirs}/embedding",), (count, width), _unchanged)
        for ours, theirs, count in (
            ("word", "token_ids", vocab_size),
            ("position", "position_ids", num_positions),
            ("token_type", "segment_ids", num_types),
        )
    }
    plan |= _norm("embeddings.LayerNorm", f"{BERT}/layer_norm", width)
    for i in range(config.num_hidden_layers):
        plan |= _bert_layer(f"encoder.layer.{i}", f"{layers}_{i}", width, mlp_width)
    built = {"library": "transformers", "config": plain_config(config)}
    return TextLayout(built, plan, "cls", width, vocab_size, num_positions)


def _bert_layer(ours: str, theirs: str, width: int, mlp_width: int) -> Plan:
    attention, mlp = f"{theirs}/attention_block", f"{theirs}/mlp_block"
    plan: Plan = {}
    for part in ("query", "key", "value"):
        plan |= _linear(f"{ours}.attention.self.{part}", f"{attention}/attention_layer/{part}", width, width)
    return (
        plan
        | _linear(f"{ours}.attention.output.dense", f"{attention}/dense_layer", width, width)
        | _norm(f"{ours}.attention.output.LayerNorm", f"{attention}/layer_norm", width)
        | _linear(f"{ours}.intermediate.dense", f"{mlp}/mlp/dense_layer", width, mlp_width)
        | _linear(f"{ours}.output.dense", f"{mlp}/dense_layer", mlp_width, width)
        | _norm(f"{ours}.output.LayerNorm", f"{mlp}/layer_norm", width)
    )


def _read_blocks(shapes: Shapes, theirs: str, ours: str, width: int) -> tuple[Plan, dict[str, int]]:
    """Plan all pre-norm blocks of a transformer, and return their sizes."""
    first = f"{theirs}/encoderblock_0"
    _, num_heads, head_width = _shape(shapes, f"{first}/MultiHeadDotProductAttention_0/query/kernel", 3)
    mlp_width = _shape(shapes, f"{first}/MlpBlock_0/Dense_0/kernel", 2)[1]
    if num_heads * head_width != width:
        raise TowerError(f"its {theirs} is {width} wide, but has {num_heads} heads of {head_width}")
    num_layers = _count(shapes, f"{theirs}/encoderblock")
    plan: Plan = {}
    for i in range(num_layers):
        plan |= _block(f"{ours}.{i}", f"{theirs}/encoderblock_{i}", (width, num_heads, head_width), mlp_width)
    return plan, {"num_layers": num_layers, "num_heads": num_heads, "mlp_width": mlp_width}


def _block(ours: str, theirs: str, attention: tuple[int, int, int], mlp_width: int) -> Plan:
    width, *heads = attention
    path = f"{theirs}/MultiHeadDotProductAttention_0"
    kernels, biases = (
        tuple(f"{path}/{part}/{kind}" for part in ("query", "key", "value")) for kind in ("kernel", "bias")
    )
    return {
        **_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0", width),
        f"{ours}.attn.qkv.weight": Piece(kernels, attention, lambda *parts: torch.cat([p.flatten(1).T for p in parts])),
        f"{ours}.attn.qkv.bias": Piece(biases, (heads[0], heads[1]), lambda *parts: torch.cat(parts).flatten()),
        f"{ours}.attn.proj.weight": Piece((f"{path}/out/kernel",), (*heads, width), lambda a: a.flatten(0, 1).T),
        f"{ours}.attn.proj.bias": Piece((f"{path}/out/bias",), (width,), _unchanged),
        **_norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1", width),
        **_linear(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_0/Dense_0", width, mlp_width),
        **_linear(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_0/Dense_1", mlp_width, width),
    }


def _linear(ours: str, theirs: str, inputs: int, outputs: int) -> Plan:
    names = [f"{ours}.{kind}".removeprefix(".") for kind in ("weight", "bias")]
    kernel = Piece((f"{theirs}/kernel",), (inputs, outputs), lambda array: array.T)
    return dict(zip(names, (kernel, Piece((f"{theirs}/bias",), (outputs,), _unchanged)), strict=True))


def _norm(ours: str, theirs: str, width: int) -> Plan:
    names = {"weight": "scale", "bias": "bias"}
    return {f"{ours}.{our}": Piece((f"{theirs}/{their}",), (width,), _unchanged) for our, their in names.items()}


def _unchanged(array: Tensor) -> Tensor:
    return array


def _convolution(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1)


def _with_class_row(positions: Tensor) -> Tensor:
    return torch.cat([positions.new_zeros(1, 1, positions.shape[2]), positions], 1)


def _shape(shapes: Shapes, name: str, num_axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise TowerError(f"it lacks {name}")
    if len(shapes[name]) != num_axes:
        raise TowerError(f"its {name} is of shape {shapes[name]}; expected {num_axes} axes")
    return shapes[name]


def _count(shapes: Shapes, prefix: str) -> int:
    """Count the layers that are named `prefix`_0, `prefix`_1 and so on."""
    found = re.compile(rf"{re.escape(prefix)}_(\d+)/")
    return len({match[1] for name in shapes if (match := found.match(name))})


def _require_same(expected: Shapes, found: Shapes) -> None:
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]} for {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
        ],
    }
    listed = [f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in problems.items() if names]
    if listed:
        raise TowerError("; ".join(listed))
