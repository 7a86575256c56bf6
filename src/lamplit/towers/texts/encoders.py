"""Text encoders of transformers, opened strictly, with what they tell of themselves: pooling, width, length.

Which token is read follows from what the model does, not from its name: a model in which no token sees a later one
is a decoder, and only its last token has read the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from lamplit.errors import TowerError, first_line
from lamplit.towers.loading import (
    READ_ERRORS,
    opening,
    plain_config,
    quiet_transformers,
    read_model_json,
    require_whole,
)
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer, holds_words
from lamplit.towers.whole_models import build_part

Pooling = Literal["cls", "mean", "last"]
# Parts that come after the tokens' vectors: BERT's pooler, the projection of SigLIP, CLIP and similar models.
_UNREAD = ("pooler", "head")
# sentence-transformers' names, as flags (pooling_mode_cls_token) and as values ("cls")
_POOLING_NAMES: dict[str, Pooling] = {
    "cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean", "lasttoken": "last",
}  # fmt: skip


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder with what a text tower needs to know of it."""

    encoder: nn.Module
    tokenizer: PretrainedTokenizer
    pooling: Pooling
    context_length: int  # the longest text it can read, in tokens
    feature_width: int
    config: dict[str, Any]  # builds it again, by `build_encoder`


def open_encoder(spec: str, name: str, *, pretrained: bool) -> OpenedEncoder:
    """Open a folder or a hub id: encoders, the encoders of encoder-decoders, decoders, sentence-transformers.

    A sentence-transformers folder is pooled and cut as it says; its dense layers, if any, are left out, for the
    tower's head takes their place. A plain decoder is read at its last token, an encoder at its class
    token where its tokenizer begins texts with one, and over the mean of its tokens elsewhere. A decoder's
    tokenizer mostly ends no text: it is made to add its end token, so that what is read is always the same token
    and stands for the whole text, as in most embedding models made from decoders.

    Args:
        spec: what to call it in errors.
        name: folder or hub id.
        pretrained: read its weights; otherwise they are random.

    Raises:
        TowerError: it cannot be had, is not whole, or does not read text.
    """
    with opening(spec):
        whole_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    config = _text_config(spec, whole_config)
    encoder = _load(spec, name, config) if pretrained else _build(spec, config)
    tokenizer = open_tokenizer(spec, name)
    causal, feature_width = try_out(spec, encoder, len(tokenizer))
    pooling, made_for = _sentence_transformers_settings(name)
    if pooling is None and causal:
        pooling = "last"
        _end_texts(tokenizer)
    elif pooling is None:
        reads_class = _begins_with_class_token(tokenizer) and not type(config).is_encoder_decoder  # T5 never does
        pooling = "cls" if reads_class else "mean"
    longest = min(made_for or 10**6, longest_text(tokenizer, encoder, config))
    return OpenedEncoder(encoder, PretrainedTokenizer(tokenizer), pooling, longest, feature_width, plain_config(config))


def open_tokenizer(spec: str, name: str) -> Any:
    """Open the tokenizer of a folder or hub id.

    Raises:
        TowerError: it cannot be opened, or knows no words.
    """
    with opening(spec):
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not holds_words(tokenizer):
        raise TowerError(
            f"{spec} holds no tokenizer: its vocabulary has special tokens alone, so every text would be the same. "
            "Save the tokenizer that the model was trained with into the folder: tokenizer.save_pretrained(FOLDER)"
        )
    return tokenizer


def build_encoder(config: Any) -> Any:
    """Build an encoder from its transformers configuration, with random weights."""
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return _strip(AutoModelForTextEncoding.from_config(config, dtype=torch.float32), config)
    return _strip(build_part(config), config)


def unread_part(key: str) -> bool:
    """Tell whether a weight of an encoder comes after the tokens' vectors, so that no encoder here has it."""
    return key.startswith(tuple(f"{part}." for part in _UNREAD))


def _build(spec: str, config: Any) -> Any:
    with opening(spec):
        return build_encoder(config)


def _load(spec: str, name: str, config: Any) -> nn.Module:
    with quiet_transformers(), opening(spec):
        model, report = _encoder_class(config).from_pretrained(
            name, config=config, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )  # fmt: skip
    missing = [key for key in report["missing_keys"] if not unread_part(key)]
    require_whole(spec, missing, report["mismatched_keys"])
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TowerError(f"{spec} is an adapter of another model; merge it into that model and save the outcome")
    encoder: nn.Module = _strip(model, config)
    return encoder


def _text_config(spec: str, config: Any) -> Any:
    """Choose what to open of a checkpoint: its text model, where it holds another beside it."""
    if getattr(config, "quantization_config", None):
        raise TowerError(f"{spec} holds quantised weights, which cannot be tuned; give the model in full precision")
    if hasattr(config, "text_config"):
        if type(config.text_config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
            raise TowerError(f"{spec} ({config.model_type}) reads more than text, and no text model of it opens alone")
        config = config.text_config
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a text is read once
    return config


def _encoder_class(config: Any) -> Any:
    # T5 says that it is an encoder with a decoder, or, where only its encoder was saved, that it is not.
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _strip(model: Any, config: Any) -> Any:
    """Leave what makes the tokens' vectors: LiT reads them itself (the authors' code does too)."""
    if config.is_encoder_decoder and _encoder_class(config) is AutoModel:
        model = model.get_encoder()
    for part in _UNREAD:
        if part in dict(model.named_children()):
            setattr(model, part, nn.Identity())
    return model


@torch.no_grad()
def try_out(spec: str, encoder: nn.Module, vocab_size: int) -> tuple[bool, int]:
    """Read two texts that differ in their last token; return whether the first token overlooks that, and the width."""
    was_training = encoder.training
    first = vocab_size // 2  # away from the special tokens at either end
    try:
        hidden = encoder.eval()(input_ids=torch.tensor([[first, first + 1], [first, first - 1]])).last_hidden_state
    except (*READ_ERRORS, NotImplementedError) as error:
        raise TowerError(
            f"{spec} does not read token ids alone, so it is no text tower: {first_line(error)}"
        ) from error
    encoder.train(was_training)
    difference = (hidden[0, 0] - hidden[1, 0]).abs().max()
    return bool(difference <= 1e-5 * hidden.abs().max()), hidden.shape[-1]


def _end_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer that ends no text end every one with its end token, and write that into its own files."""
    ids, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    begin = ids[: len(ids) - len(plain)]
    if tokenizer.eos_token is None or not tokenizer.is_fast or ids != [*begin, *plain]:
        return
    # In the place of the processor that was there: two templates one after the other lose the second one's token.
    tokens = [*tokenizer.convert_ids_to_tokens(begin), "$A", tokenizer.eos_token]
    numbers = dict(zip(tokens, [*begin, -1, tokenizer.eos_token_id], strict=True))
    del numbers["$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=tokens, special_tokens=[*numbers.items()])


def _begins_with_class_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    token: int | None = tokenizer.cls_token_id
    return token is not None and tokenizer("a")["input_ids"][:1] == [token]


def longest_text(tokenizer: Any, encoder: Any, config: Any) -> int:
    """Return the longest text, in tokens, that a tokenizer cuts at and an encoder has positions for."""
    # RoBERTa and similar models count positions from behind the padding's.
    positions: int | None = getattr(config, "max_position_embeddings", None)
    tables = [part for name, part in encoder.named_modules() if name.endswith("embeddings.position_embeddings")]
    padding: int | None = getattr(tables[0], "padding_idx", None) if tables else None
    most = 10**6 if positions is None else positions if padding is None else positions - padding - 1
    return min(most, int(tokenizer.model_max_length))


def _sentence_transformers_settings(name: str) -> tuple[Pooling | None, int | None]:
    """Read pooling and context length, if `name` is a sentence-transformers model."""
    pooling: Pooling | None = None
    for module in read_model_json(name, "modules.json") or []:
        if module["type"].rsplit(".", 1)[-1] == "Pooling":
            pooling = _read_pooling(name, read_model_json(name, f"{module['path']}/config.json") or {})
    made_for = (read_model_json(name, "sentence_bert_config.json") or {}).get("max_seq_length") if pooling else None
    return pooling, made_for


def _read_pooling(name: str, settings: dict[str, Any]) -> Pooling:
    named = settings.get("pooling_mode", [])
    chosen = [named] if isinstance(named, str) else list(named)
    prefix = "pooling_mode_"
    chosen += [key.removeprefix(prefix) for key, value in settings.items() if key.startswith(prefix) and value]
    if len(chosen) != 1 or chosen[0] not in _POOLING_NAMES:
        raise TowerError(
            f"{name} pools in a way that lamplit does not support: {settings}; expected cls, mean or last token"
        )
    return _POOLING_NAMES[chosen[0]]
