"""The models that the paper's authors published, read from their own files.

A model is an .npz of named arrays with its vocabulary beside it: `NAME.txt` (WordPiece) or `NAME.model`
(SentencePiece). Sizes are read from the arrays. Every array must have its place and every place its array, by name
and shape, before any is read.
"""

from __future__ import annotations

import math
from functools import partial
from http.client import HTTPException
from pathlib import Path

from timm.layers import GELUTanh
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError, UsageError, first_line
from lamplit.files import cache_folder, download
from lamplit.towers.loading import load_strictly
from lamplit.towers.published.layout import Plan, canonical_names, read_layout
from lamplit.towers.published.npz import ArrayFile
from lamplit.towers.tokens.tokenizers import Tokenizer, read_vocabulary

# The suffix of each one's vocabulary
NAMES = {"B16B": ".txt", "B16B_2": ".txt", "L16L": ".txt", "L16S": ".model", "L16Ti": ".model"}
BUCKET = "https://storage.googleapis.com/vit_models/lit"  # the authors' own
MAX_LOG_SCALE = 20.0  # theirs are near 4.4
CONTEXT_LENGTH = 16  # what all of them were tuned with


def list_published() -> list[str]:
    """Name the models that the paper's authors published, as `lamplit.load` takes them.

    Example:
        >>> lamplit.list_published()
        ['lit:B16B', 'lit:B16B_2', 'lit:L16L', 'lit:L16S', 'lit:L16Ti']
    """
    return [f"lit:{name}" for name in NAMES]


class Published:
    """A published model on this machine, one tower at a time.

    Args:
        spec: `lit:B16B`, `lit:B16B_2`, `lit:L16L`, `lit:L16S`, `lit:L16Ti`, or `lit:FILE.npz`.

    Raises:
        UsageError: it is none of these.
        TowerError: the file cannot be fetched, or holds something else.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        name = spec.removeprefix("lit:")
        if name in NAMES:
            self.file = _fetched(f"LiT-{name}.npz")
        elif name.endswith(".npz"):
            self.file = Path(name)
        else:
            names = ", ".join(f"lit:{known}" for known in NAMES)
            raise UsageError(f"{spec!r} is not a published model; expected {names} or lit:FILE.npz")
        self._arrays = ArrayFile(self.file)
        try:
            self._names = canonical_names(self._arrays.shapes)
            self.layout = read_layout({new: self._arrays.shapes[old] for new, old in self._names.items()})
        except TowerError as error:
            raise self._arrays.refuse(str(error)) from error
        side = self.layout.image.config["image_size"]
        half = (0.5, 0.5, 0.5)
        # The authors' `PreprocessImages`: squashed to a square, sampled at single points, truncated to whole numbers.
        self.preprocessing = Preprocessing((side, side), half, half, "bilinear", fit="squash", antialias=False)

    @property
    def logit_multiplier(self) -> float:
        """What the model multiplies cosines by.

        Raises:
            TowerError: the file is damaged, or its number is out of range.
        """
        log_scale = float(self._arrays.read(self._names["t"]))
        if not abs(log_scale) < MAX_LOG_SCALE:  # not a number, either
            raise self._arrays.refuse(f"its t, the logarithm of a multiplier of cosines, is {log_scale}")
        return math.exp(log_scale)

    def read_backbone(self) -> nn.Module:
        """Build the image tower, (B, 3, height, width) floats to (B, width) features, with its weights."""
        return self.fill(build_backbone(**self.layout.image.config), self.layout.image.plan)

    def open_tokenizer(self) -> Tokenizer:
        """Open the vocabulary beside the arrays; fetch it if it is one of the authors'.

        Raises:
            TowerError: there is none, or it is another model's.
        """
        endings = (".txt",) if self.layout.text.pooling == "cls" else (".model", ".txt")
        files = [self.file.with_suffix(ending) for ending in endings]
        file = next((file for file in files if file.is_file()), None)
        name = self.file.stem.removeprefix("LiT-")
        if file is None and name in NAMES:
            file = _fetched(f"LiT-{name}{NAMES[name]}")
        if file is None:
            raise TowerError(f"{self.file} has no vocabulary; put it at {' or '.join(map(str, files))}")
        tokenizer = read_vocabulary(file, fill=self.layout.text.pooling == "last")
        vocab_size = self.layout.text.vocab_size
        if len(tokenizer) > vocab_size or (file.suffix == ".txt" and len(tokenizer) < vocab_size):
            raise TowerError(f"{file} has {len(tokenizer)} tokens, but {self.file} has vectors for {vocab_size}")
        return tokenizer

    def fill(self, module: nn.Module, plan: Plan) -> nn.Module:
        """Load the weights of `module` by one of the layout's plans; return it.

        Raises:
            TowerError: the file is damaged.
        """
        state = {
            key: piece.make(*(self._arrays.read(self._names[name]) for name in piece.names)).contiguous()
            for key, piece in plan.items()
        }
        load_strictly(module, state, self.spec)
        return module


def build_backbone(
    image_size: int,
    patch_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    mlp_width: int,
    pre_logits_width: int | None,
    head_width: int | None,
) -> nn.Module:
    """Build the authors' ViT without weights: tanh GELU, layer norms' epsilon 1e-6, the class token read."""
    backbone: nn.Module = VisionTransformer(
        image_size, patch_size, num_classes=0, embed_dim=width, depth=num_layers, num_heads=num_heads,
        # timm takes the ratio and rounds down.
        mlp_ratio=(mlp_width + 0.5) / width, act_layer=GELUTanh, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
    )  # fmt: skip
    head = nn.Sequential()
    if pre_logits_width is not None:
        head.add_module("pre_logits", nn.Linear(width, pre_logits_width))
        head.add_module("tanh", nn.Tanh())
    if head_width is not None:
        head.add_module("head", nn.Linear(pre_logits_width or width, head_width))
    if len(head):
        backbone.head = head
    return backbone


def _fetched(name: str) -> Path:
    """Return one of the authors' files, from the cache or from their bucket."""
    file = cache_folder() / "lit" / name
    if not file.is_file():
        url = f"{BUCKET}/{name}"
        try:
            download(url, file)
        except (OSError, HTTPException) as error:
            raise TowerError(f"{url} could not be fetched ({first_line(error)}); put it at {file} by hand") from error
    return file
