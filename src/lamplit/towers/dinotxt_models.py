"""dino.txt: Meta's towers of text for DINOv2 and DINOv3, from the files that their authors publish.

The image side is a locked backbone with two more blocks behind it, and gives the class token beside the mean of the
patches; the text side is CLIP's, wider. timm carries the backbones and the blocks. Every tensor of a file must have its
place here, and every place a tensor: the authors' own loader lets DINOv3's pass if their names do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lamplit.errors import TowerError, UsageError
from lamplit.towers.loading import key_difference, load_strictly, read_weights
from lamplit.towers.timm_sources import build_timm

SIDE = 224  # pixels; what the authors' code prepares images to
_HEAD_WIDTH = 64  # of every published backbone but DINOv3's largest, and of the text tower
_LARGEST = 4096  # the width of that one, whose heads are twice as wide
_INITIAL_MULTIPLIER = 1 / 0.07  # DINOv2's files have no other
_FILES = {  # what the name of each file has in it, by what is in the file
    "backbone": "_pretrain",
    "both heads": "vision_head_and_text_encoder",
    "vision head": "vision_head",
    "text encoder": "text_encoder",
}
_EXPECTED = (
    "expected the files as they were published: *_pretrain*.pth with *_vision_head.pth and *_text_encoder.pth "
    "(DINOv2), or with *_vision_head_and_text_encoder*.pth (DINOv3)"
)
State = dict[str, Tensor]


class DinoTxt(NamedTuple):
    """Both sides of a dino.txt, in eval mode, with what builds them again."""

    vision: DinoTxtVision
    vision_config: dict[str, Any]
    text: DinoTxtText
    text_config: dict[str, Any]
    projection: nn.Linear  # behind the text side
    logit_multiplier: float


def open_dinotxt(spec: str) -> DinoTxt:
    """Open the published files of a dino.txt, every tensor or none.

    Args:
        spec: `dinotxt:FOLDER`, with the backbone's file and those of the vision head and the text encoder.

    Raises:
        UsageError: there is no such folder.
        TowerError: a file is missing, damaged, or holds something else.
    """
    backbone, head, text, multiplier = _read_files(spec, Path(spec.removeprefix("dinotxt:")))
    vision_config = _vision_config(spec, backbone, head)
    vision = build_vision(vision_config)
    _fill_backbone(spec, vision, backbone)
    _fill(vision.head, head, f"the vision head of {spec}", _theirs_in_head)
    text_config = _text_config(spec, text)
    encoder = build_text(text_config)
    weight = text.pop("head.linear_projection.weight")
    _fill(encoder, text, f"the text encoder of {spec}", _theirs_in_text)
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight.data.copy_(weight)
    return DinoTxt(vision.eval(), vision_config, encoder.eval(), text_config, projection, multiplier)


def _read_files(spec: str, folder: Path) -> tuple[State, State, State, float]:
    """Return the tensors of the backbone, the vision head and the text encoder, and the multiplier."""
    if not folder.is_dir():
        raise UsageError(f"{spec}: there is no folder {folder}; {_EXPECTED}")
    found: dict[str, Path] = {}
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".pt", ".safetensors")):
        kind = next((kind for kind, part in _FILES.items() if part in file.name), None)
        if kind is not None and kind in found:
            raise TowerError(f"{spec} has two files of its {kind}, {found[kind].name} and {file.name}; keep one")
        if kind is not None:
            found[kind] = file
    joint = "both heads" in found
    needed = ("backbone", "both heads") if joint else ("backbone", "vision head", "text encoder")
    if missing := [kind for kind in needed if kind not in found]:
        raise TowerError(f"{spec} has no file of its {' and of its '.join(missing)}; {_EXPECTED}")
    backbone = read_weights(found["backbone"])
    if not joint:
        return backbone, read_weights(found["vision head"]), read_weights(found["text encoder"]), _INITIAL_MULTIPLIER
    state = read_weights(found["both heads"])
    scale = state.pop("logit_scale", None)
    head, text = _under("visual_model.head.", state), _under("text_model.", state)
    if unknown := sorted(state):
        raise TowerError(f"{found['both heads']} has tensors that dino.txt has no place for: {', '.join(unknown[:10])}")
    return backbone, head, text, _INITIAL_MULTIPLIER if scale is None else math.exp(float(scale))


def _under(prefix: str, state: State) -> State:
    """Take the tensors under a prefix out of `state`."""
    return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}


class DinoTxtHead(nn.Module):
    """What follows the backbone: blocks without positions, a norm, and for some a projection of each token."""

    def __init__(self, width: int, num_heads: int, num_layers: int, mlp_width: int, projected: int | None) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, (mlp_width + 0.5) / width, init_values=1e-5, norm_layer=norm, mlp_layer=SwiGLU,
                  act_layer=nn.SiLU)
            for _ in range(num_layers)
        )  # fmt: skip
        self.norm = norm(width)
        self.projection = nn.Identity() if projected is None else nn.Linear(width, projected, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, T, D) tokens of (B, T, width) tokens."""
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.projection(self.norm(tokens))
        return features


class DinoTxtVision(nn.Module):
    """The image side: (B, 3, height, width) normalised images in, (B, 2 D) out: class token, and mean of the patches.

    `periods` are those of DINOv3's positions, which its files hold in bfloat16's precision; timm computes finer ones.
    """

    def __init__(self, backbone: nn.Module, head: DinoTxtHead) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head
        rope = getattr(backbone, "rope", None)
        self.register_buffer("periods", None if rope is None else rope.periods.clone())
        self.periods: Tensor | None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of images."""
        if self.periods is not None:
            self.backbone.rope.periods = self.periods
        tokens = self.head(self.backbone.forward_features(pixels))
        return torch.cat([tokens[:, 0], tokens[:, self.backbone.num_prefix_tokens :].mean(1)], dim=-1)


def _vision_config(spec: str, backbone: State, head: State) -> dict[str, Any]:
    """Read the sizes of the image side from the shapes of its tensors."""
    try:
        width, _, patch, _ = backbone["patch_embed.proj.weight"].shape
        is_second = "pos_embed" in backbone
        registers = backbone["register_tokens" if is_second else "storage_tokens"].shape[1]
        args: dict[str, Any] = {
            "embed_dim": width,
            "depth": _count(backbone),
            "num_heads": _heads(spec, width),
            "patch_size": patch,
        }
        args |= {"img_size": SIDE, "mlp_ratio": backbone["blocks.0.mlp.fc1.weight"].shape[0] / width}
        args |= {"reg_tokens" if is_second else "num_reg_tokens": registers}
        projected = head.get("linear_projection.weight")
        return {
            "library": "dinotxt",
            "backbone": "vit_large_patch14_reg4_dinov2" if is_second else "vit_large_patch16_dinov3_qkvb",
            "args": args,
            "num_layers": _count(head),
            "mlp_width": head[f"{_blocks(head)}.0.mlp.w1.weight"].shape[0],
            "projected": None if projected is None else projected.shape[0],
        }
    except (KeyError, ValueError) as error:
        raise TowerError(
            f"{spec} is no dino.txt that lamplit knows: it lacks {error}. It reads backbones with registers, of "
            "DINOv2 and DINOv3, and a head with blocks"
        ) from error


def build_vision(config: dict[str, Any]) -> DinoTxtVision:
    """Build an image side from `DinoTxt.vision_config`, with random weights.

    Raises:
        TowerError: the configuration cannot be built.
    """
    backbone: Any = build_timm(config["backbone"], config["args"])
    width, num_heads = config["args"]["embed_dim"], config["args"]["num_heads"]
    head = DinoTxtHead(width, num_heads, config["num_layers"], config["mlp_width"], config["projected"])
    return DinoTxtVision(backbone, head)


def _fill_backbone(spec: str, vision: DinoTxtVision, state: State) -> None:
    """Load a backbone, whose positions timm brings to the size of an image of 224 pixels."""
    if vision.periods is not None and "rope_embed.periods" in state:
        if state["rope_embed.periods"].shape != vision.periods.shape:
            raise TowerError(f"{spec} has positions of another number of periods than its width asks for")
        vision.periods.copy_(state["rope_embed.periods"].float())
    backbone = vision.backbone
    renaming: Callable[..., State] = import_module(type(backbone).__module__).checkpoint_filter_fn
    load_strictly(backbone, renaming(dict(state), backbone), f"the backbone of {spec}")


class _Hidden(NamedTuple):
    last_hidden_state: Tensor  # (B, T, width)


class DinoTxtText(nn.Module):
    """The text side up to its last norm: (B, T) ids in, (B, T, width) out; no token sees a later one."""

    def __init__(self, vocab_size: int, width: int, num_layers: int, context_length: int, mlp_width: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, width).normal_(std=0.01))
        self.blocks = nn.ModuleList(
            Block(width, width // _HEAD_WIDTH, (mlp_width + 0.5) / width, qkv_bias=False, norm_layer=norm)
            for _ in range(num_layers)
        )
        self.norm = norm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> _Hidden:
        """Encode texts. The mask is not needed: what fills a row comes after its end."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.token_embedding(input_ids) + self.position_embedding[places]
        sees = places[None] <= places[:, None]  # each token itself and those before
        for block in self.blocks:
            hidden = block(hidden, attn_mask=sees)
        return _Hidden(self.norm(hidden))


def _text_config(spec: str, text: State) -> dict[str, Any]:
    """Read the sizes of the text side from the shapes of its tensors."""
    try:
        vocab_size, width = text["backbone.token_embedding.weight"].shape
        text["head.linear_projection.weight"]
        _heads(spec, width)
        return {
            "library": "dinotxt",
            "vocab_size": vocab_size,
            "width": width,
            "num_layers": _count(_under("backbone.", dict(text))),
            "context_length": text["backbone.positional_embedding"].shape[0],
            "mlp_width": text["backbone.blocks.0.feed_forward.fc1.weight"].shape[0],
        }
    except (KeyError, ValueError) as error:
        raise TowerError(f"{spec} has no text encoder of dino.txt: it lacks {error}") from error


def build_text(config: dict[str, Any]) -> DinoTxtText:
    """Build a text side from `DinoTxt.text_config`, with random weights."""
    return DinoTxtText(**{key: value for key, value in config.items() if key != "library"})


def _blocks(state: State) -> str:
    return "block_list" if any(key.startswith("block_list.") for key in state) else "blocks"  # DINOv2's, DINOv3's


def _count(state: State) -> int:
    """Count the blocks of a backbone, a head or a text encoder."""
    prefix = f"{_blocks(state)}."
    return len({key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)})


def _heads(spec: str, width: int) -> int:
    head_width = _HEAD_WIDTH if width < _LARGEST else 2 * _HEAD_WIDTH
    if width % head_width:
        raise TowerError(f"{spec} is {width} wide; expected a multiple of {head_width}, the width of a head")
    return width // head_width


def _theirs_in_head(key: str, state: State) -> str:
    for ours, theirs in (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")):
        key = key.replace(f".mlp.{ours}.", f".mlp.{theirs}.")
    if key.startswith("blocks."):
        return f"{_blocks(state)}.{key.removeprefix('blocks.')}"
    return key.replace("norm.", "ln_final.").replace("projection.", "linear_projection.")


def _theirs_in_text(key: str, state: State) -> str:
    if not key.startswith("blocks."):
        names = {"norm.weight": "ln_final.weight", "norm.bias": "ln_final.bias"}
        return f"backbone.{names.get(key, key).replace('position_', 'positional_')}"
    for ours, theirs in (("norm1", "attention_norm"), ("norm2", "ffn_norm"), ("attn", "attention"),
                         ("mlp", "feed_forward")):  # fmt: skip
        key = key.replace(f".{ours}.", f".{theirs}.")
    return f"backbone.{key}"


def _fill(module: nn.Module, state: State, name: str, theirs: Callable[[str, State], str]) -> None:
    """Load tensors under their authors' names, every one or none.

    Raises:
        TowerError: naming the keys that are missing, unexpected or of another shape.
    """
    own = {theirs(key, state): key for key in module.state_dict()}
    named = {own.get(key, key): tensor for key, tensor in state.items()}
    missing, unexpected = key_difference(module, named)
    if missing or unexpected:
        lacking = [theirs(key, state) for key in missing]
        listed = [f"missing: {', '.join(lacking[:10])}"] * bool(missing)
        listed += [f"unexpected: {', '.join(unexpected[:10])}"] * bool(unexpected)
        raise TowerError(f"the weights do not fit {name}; {'; '.join(listed)}")
    load_strictly(module, named, name)
