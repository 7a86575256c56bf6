from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lamplit.errors import TowerError
from lamplit.towers.published.big_vision import build_backbone
from lamplit.towers.published.layout import Layout, Piece, canonical_names, read_layout
from lamplit.towers.texts.encoder_building import build_from
from lamplit.towers.texts.scratch import ScratchEncoder

Shapes = dict[str, tuple[int, ...]]
LARGE, BASE = (1024, 24, 16), (768, 12, 12)  # width, layers, heads; an MLP is four times as wide, a head 64
# name: image tower, image head, text tower, tokens, parameters (those of the authors' own test)
PUBLISHED = {
    "B16B": (BASE, 768, ("bert", *BASE), 30_522, 195_871_489),
    "B16B_2": (BASE, None, ("bert", *BASE), 30_522, 195_280_897),
    "L16L": (LARGE, None, ("bert", *LARGE), 30_522, 638_443_521),
    "L16S": (LARGE, None, ("transformer", 384, 12, 6), 16_000, 331_140_353),
    "L16Ti": (LARGE, None, ("transformer", 192, 12, 3), 16_000, 311_913_089),
}
LEAVES = {"B16B": 400, "B16B_2": 398, "L16L": 782, "L16S": 589, "L16Ti": 589}


def tree(name: str) -> Shapes:
    """Name and shape of every array of a published model, as the authors' code makes them."""
    (width, num_layers, num_heads), head_width, (kind, *text), vocab_size, _ = PUBLISHED[name]
    shapes = dict(transformer("img/Transformer", width, num_layers, num_heads))
    shapes |= {
        "t": (1,),
        "img/cls": (1, 1, width),
        "img/embedding/kernel": (16, 16, 3, width),
        "img/embedding/bias": (width,),
        "img/Transformer/posembed_input/pos_embedding": (1, 197, width),
    }
    if head_width is not None:
        shapes |= dense("img/head", width, head_width)
    text_width = text[0]
    if kind == "bert":
        shapes |= dict(bert("txt/BertEncoder_0", text_width, text[1], vocab_size))
    else:
        shapes |= dict(transformer("txt/Encoder_0", *text))
        shapes |= {"txt/Embed_0/embedding": (vocab_size, text_width), "txt/pos_embedding": (1, 16, text_width)}
    return shapes | dense("txt/head", text_width, head_width or width)


def dense(path: str, inputs: int, outputs: int) -> Shapes:
    return {f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)}


def norm(path: str, width: int) -> Shapes:
    return {f"{path}/scale": (width,), f"{path}/bias": (width,)}


def transformer(path: str, width: int, num_layers: int, num_heads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for i in range(num_layers):
        block = f"{path}/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for part in ("query", "key", "value"):
            yield f"{attention}/{part}/kernel", (width, num_heads, 64)
            yield f"{attention}/{part}/bias", (num_heads, 64)
        yield f"{attention}/out/kernel", (num_heads, 64, width)
        yield f"{attention}/out/bias", (width,)
        yield from norm(f"{block}/LayerNorm_0", width).items()
        yield from norm(f"{block}/LayerNorm_1", width).items()
        yield from dense(f"{block}/MlpBlock_0/Dense_0", width, 4 * width).items()
        yield from dense(f"{block}/MlpBlock_0/Dense_1", 4 * width, width).items()
    yield from norm(f"{path}/encoder_norm", width).items()


def bert(path: str, width: int, num_layers: int, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for table, rows in {"token": vocab_size, "position": 512, "segment": 2}.items():
        yield f"{path}/embedder/embedders_{table}_ids/embedding", (rows, width)
    yield from norm(f"{path}/layer_norm", width).items()
    for i in range(num_layers):
        layer = f"{path}/encoder_block/layer_sequence/layers_{i}"
        for part in ("query", "key", "value"):
            yield from dense(f"{layer}/attention_block/attention_layer/{part}", width, width).items()
        yield from dense(f"{layer}/attention_block/dense_layer", width, width).items()
        yield from norm(f"{layer}/attention_block/layer_norm", width).items()
        yield from dense(f"{layer}/mlp_block/mlp/dense_layer", width, 4 * width).items()
        yield from dense(f"{layer}/mlp_block/dense_layer", 4 * width, width).items()
        yield from norm(f"{layer}/mlp_block/layer_norm", width).items()


def made(piece: Piece) -> Tensor:
    return piece.make(*(torch.empty(piece.shape, device="meta") for _ in piece.names))


def modules(layout: Layout) -> list[tuple[nn.Module, dict[str, Piece]]]:
    """The layout's towers without memory for their weights, each with its plan."""
    with torch.device("meta"):
        backbone, encoder = build_backbone(**layout.image.config), build_from(layout.text.config)
        head = nn.Linear(layout.text.width, layout.image.width)
    return [(backbone, layout.image.plan), (encoder, layout.text.plan), (head, layout.head_plan)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_array_of_a_published_model_has_its_place(name: str) -> None:
    shapes = tree(name)
    assert len(shapes) == LEAVES[name]
    layout = read_layout(shapes)
    assert layout.expected() == shapes
    count = 1  # t
    for module, plan in modules(layout):
        state = module.state_dict()
        assert {key: made(piece).shape for key, piece in plan.items()} == {key: state[key].shape for key in state}
        count += sum(parameter.numel() for parameter in module.parameters())
    assert count == sum(map(math.prod, shapes.values())) == PUBLISHED[name][-1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_built(name: str) -> None:
    (width, num_layers, num_heads), head_width, (kind, text_width, *text), vocab_size, _ = PUBLISHED[name]
    layout = read_layout(tree(name))
    [(backbone, _), (encoder, _), _] = modules(layout)
    assert (layout.image.config["image_size"], layout.image.width) == (224, head_width or width)
    assert (len(backbone.blocks), backbone.blocks[0].attn.num_heads) == (num_layers, num_heads)
    assert {module.eps for module in backbone.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert (layout.text.width, layout.text.vocab_size) == (text_width, vocab_size)
    if kind == "bert":
        config = AutoConfig.for_model(**layout.text.config["config"])
        assert [config.num_hidden_layers, config.num_attention_heads] == text
        assert (config.hidden_act, config.hidden_dropout_prob) == ("gelu_pytorch_tanh", 0.1)
        assert {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)} == {1e-12}
        assert (layout.text.pooling, layout.text.num_positions) == ("cls", 512)
    else:
        assert isinstance(encoder, ScratchEncoder)
        assert [len(encoder.blocks), encoder.blocks[0].attn.num_heads] == text
        assert {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
        assert (layout.text.pooling, layout.text.num_positions) == ("last", 16)


def test_old_names_become_today_s() -> None:
    block = "params/img/Transformer/encoderblock_3"
    old = [
        f"{block}/LayerNorm_0/bias",
        f"{block}/MultiHeadDotProductAttention_1/query/bias",
        f"{block}/LayerNorm_2/bias",
        f"{block}/MlpBlock_3/Dense_0/bias",
        "opt/state/0/step",
    ]
    new = [
        "img/Transformer/encoderblock_3/LayerNorm_0/bias",
        "img/Transformer/encoderblock_3/MultiHeadDotProductAttention_0/query/bias",
        "img/Transformer/encoderblock_3/LayerNorm_1/bias",
        "img/Transformer/encoderblock_3/MlpBlock_0/Dense_0/bias",
    ]
    assert canonical_names(old) == dict(zip(new, old, strict=False))
    assert canonical_names([name.replace("params/", "opt/target/") for name in old[:1]]) == {
        new[0]: f"opt/target/{new[0]}"
    }
    assert canonical_names(new) == {name: name for name in new}
    with pytest.raises(TowerError, match="twice, as img/LayerNorm_1/bias and as img/LayerNorm_2/bias"):
        canonical_names(["img/LayerNorm_1/bias", "img/LayerNorm_2/bias"])


def without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


POSITIONS = "img/Transformer/posembed_input/pos_embedding"
QUERY = "img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"img/cls": None}, "1 missing: img/cls"),
        ({"t": None}, "1 missing: t"),
        ({"b": (1,)}, "1 unexpected: b"),
        ({"img/MAPHead_0/probe": (1, 1, 768)}, "1 unexpected: img/MAPHead_0/probe"),
        ({"img/cls": None, "img/CLS": (1, 1, 768)}, "1 missing: img/cls; 1 unexpected: img/CLS"),
        ({"img/head/bias": (767,)}, r"1 of another shape: img/head/bias \(767,\) for \(768,\)"),
        ({"txt/head/kernel": (768, 512)}, r"1 of another shape: txt/head/kernel \(768, 512\) for \(768, 768\)"),
        ({"img/Transformer/encoderblock_12/LayerNorm_0/bias": (768,)}, "15 missing: img/Transformer/encoderblock_12/"),
        ({"img/embedding/kernel": None}, "it lacks img/embedding/kernel"),
        ({"img/embedding/kernel": (16, 768)}, r"img/embedding/kernel is of shape \(16, 768\); expected 4 axes"),
        ({"img/embedding/kernel": (16, 8, 3, 768)}, "of another shape: img/embedding/kernel"),
        ({"img/embedding/kernel": (16, 16, 1, 768)}, "of another shape: img/embedding/kernel"),
        ({QUERY: (768, 12, 32)}, "768 wide, but has 12 heads of 32"),
        ({POSITIONS: None}, "it lacks img/pos_embedding"),
        ({POSITIONS: (1, 198, 768)}, "198 rows, which are no square"),
        ({POSITIONS: (1, 129**2, 768)}, "more than any ViT"),
        ({"img/embedding/kernel": (300, 300, 3, 768)}, "more than any ViT"),
        ({"img/pos_embedding": (1, 196, 768)}, f"1 unexpected: {POSITIONS}"),
        ({"img/embedding/bias": (0,)}, "arrays without values: img/embedding/bias"),
    ],
)
def test_what_has_no_place_is_named(change: dict[str, tuple[int, ...] | None], reason: str) -> None:
    shapes = tree("B16B") | {name: shape for name, shape in change.items() if shape is not None}
    removed = [name for name, shape in change.items() if shape is None]
    with pytest.raises(TowerError, match=reason):
        read_layout(without(shapes, *removed))


def test_one_tower_is_no_model() -> None:
    shapes = tree("L16Ti")
    with pytest.raises(TowerError, match="it lacks txt/Embed_0/embedding"):
        read_layout({name: shape for name, shape in shapes.items() if not name.startswith("txt/")})
    with pytest.raises(TowerError, match="it lacks img/embedding/kernel"):
        read_layout({name: shape for name, shape in shapes.items() if not name.startswith("img/")})
    with pytest.raises(TowerError, match="it lacks img/embedding/kernel"):
        read_layout({})


def test_a_bert_that_the_heads_do_not_divide() -> None:
    shapes = tree("B16B")
    kernel = (16, 16, 3, 768)
    shapes |= {name: (768, 8, 96) if shape == (768, 12, 64) else shape for name, shape in shapes.items()}
    shapes["img/embedding/kernel"] = kernel
    shapes["txt/BertEncoder_0/embedder/embedders_token_ids/embedding"] = (30_522, 1024)
    with pytest.raises(TowerError, match="BERT is 1024 wide, which heads of 96 do not divide"):
        read_layout(shapes)
