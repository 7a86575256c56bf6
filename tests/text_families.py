"""One tiny random member of each family of text encoders, and what is proved of each.

`FAMILIES` builds them, `PROOFS` are functions that raise AssertionError, `row` describes one: for the tests and for
the table of towers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as hf
from conftest import wordpiece_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F

import lamplit
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.model import LiT
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.texts.shared_rows import row_inputs, share_rows
from lamplit.towers.texts.text_tower import PASS_COST, TextTower, length_groups, open_text_tower

WIDTH = 16
LONGEST = 48  # tokens that each member has positions for, where it has positions
TEXTS = [
    "A small red circle.",
    "a",
    "A large green square, a small blue ring.",
    "",
    "schwarz, groß: Kreuz",
    "red",
    "A small red circle.",
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
DECODER = SMALL | {"num_key_value_heads": 1, "max_position_embeddings": LONGEST}


# Tokenizers


def wordpiece() -> Any:
    return wordpiece_tokenizer(10**30)


def byte_pairs(kind: str, **tokens: str) -> Any:
    """A tokenizer of byte-level BPE, by the class of transformers that reads such files."""
    vocabulary, merges = train_byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False), tokens.values())
    return getattr(hf, kind)(vocab=vocabulary, merges=merges, **tokens)


def roberta_pairs() -> Any:
    return byte_pairs("RobertaTokenizer", cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>")


def clip_pairs() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*alphabet, *(f"{c}</w>" for c in alphabet), "<|s|>", "<|e|>"])}
    return hf.CLIPTokenizer(
        vocab=ids, merges=[], bos_token="<|s|>", eos_token="<|e|>", unk_token="<|e|>", pad_token="<|e|>"
    )


def modernbert_pairs() -> Any:
    """A plain tokenizers file with a class token, as ModernBERT has."""
    plain = byte_pairs("GPT2Tokenizer", eos_token="[SEP]", bos_token="[CLS]", unk_token="[UNK]").backend_tokenizer
    ids = plain.get_vocab()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[UNK]"
    )


def sentence_pairs(kind: str, **tokens: str) -> Any:
    """SentencePiece's BPE: a space is a character of its own, and nothing but a first token is added."""
    vocabulary, merges = train_byte_pairs(pre_tokenizers.Metaspace(), tokens.values())
    return getattr(hf, kind)(vocab=vocabulary, merges=merges, **tokens, add_bos_token=True)


def train_byte_pairs(splitter: Any, tokens: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(dict.fromkeys(tokens)), show_progress=False,
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "▁"],
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def unigram(kind: str, specials: Sequence[str], **options: Any) -> Any:
    """SentencePiece's unigram model: single characters and a few words."""
    characters = sorted({character for text in TEXTS for character in text if character != " "})
    words = sorted({word.strip(".,:") for text in TEXTS for word in text.split()})
    pieces = [*((token, 0.0) for token in specials), ("▁", -3.0), *((c, -4.0) for c in characters)]
    return getattr(hf, kind)(vocab=[*pieces, *((f"▁{word}", -5.0) for word in words)], **options)


def t5_unigram() -> Any:
    return unigram("T5Tokenizer", ["<pad>", "</s>", "<unk>"], extra_ids=0)


def xlm_unigram() -> Any:
    return unigram("XLMRobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])


def gemma_pairs() -> Any:
    return sentence_pairs("GemmaTokenizer", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def llama_pairs() -> Any:
    return sentence_pairs("LlamaTokenizer", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def qwen_pairs() -> Any:
    return byte_pairs("Qwen2Tokenizer", unk_token="<|e|>", eos_token="<|e|>", pad_token="<|pad|>")


# Models


def encoder(name: str, **options: Any) -> Callable[[int], Any]:
    """`name`Model of a small `name`Config, from the size of the vocabulary."""
    model, config = getattr(hf, f"{name}Model"), getattr(hf, f"{name}Config")
    values = SMALL | {"max_position_embeddings": LONGEST} | options
    return lambda vocab_size: model(config(vocab_size=vocab_size, **values))


def decoder(name: str, kind: str = "ForCausalLM", **options: Any) -> Callable[[int], Any]:
    """A decoder saved whole, language model head and all, as they are published."""
    model, config = getattr(hf, f"{name}{kind}"), getattr(hf, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    values = DECODER | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | options
    return lambda vocab_size: model(config(vocab_size=vocab_size, **values))


def t5(model: str) -> Callable[[int], Any]:
    config = hf.MT5Config if model.startswith("MT5") else hf.T5Config
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    return lambda vocab_size: getattr(hf, model)(config(vocab_size=vocab_size, **sizes))


def bart(vocab_size: int) -> Any:
    side = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}
    sides = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 0}
    config = hf.BartConfig(
        vocab_size=vocab_size, d_model=32, max_position_embeddings=LONGEST, forced_eos_token_id=0, **sides, **ids
    )
    return hf.BartForConditionalGeneration(config)


def clip(vocab_size: int) -> Any:
    ends = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    text = hf.CLIPTextConfig(vocab_size=vocab_size, max_position_embeddings=LONGEST, **ends, **SMALL)
    vision = hf.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))


@dataclass(frozen=True)
class Family:
    """How to make one, and what lamplit must find out of it."""

    model: Callable[[int], Any]  # from the size of the vocabulary
    tokenizer: Callable[[], Any]
    pooling: str
    ends: str | None = None  # the token that lamplit adds to every text
    sentences: bool = False  # saved by sentence-transformers
    text_part: Callable[[Any], Any] = lambda model: model  # of a model, what reads texts


def inner(model: Any) -> Any:
    return model.base_model


FAMILIES: dict[str, Family] = {
    "BERT": Family(encoder("Bert"), wordpiece, "cls"),
    "ALBERT": Family(encoder("Albert", embedding_size=16), wordpiece, "cls"),
    "DistilBERT": Family(encoder("DistilBert"), wordpiece, "cls"),
    "ELECTRA": Family(encoder("Electra", embedding_size=16), wordpiece, "cls"),
    "MPNet": Family(encoder("MPNet", pad_token_id=0), wordpiece, "cls"),
    "RoBERTa": Family(encoder("Roberta", pad_token_id=1), roberta_pairs, "cls"),
    "XLM-R": Family(encoder("XLMRoberta", pad_token_id=1), xlm_unigram, "cls"),
    "ModernBERT": Family(
        encoder("ModernBert", pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
        modernbert_pairs, "cls",
    ),
    "T5": Family(t5("T5ForConditionalGeneration"), t5_unigram, "mean", text_part=lambda model: model.get_encoder()),
    "T5, encoder alone": Family(t5("T5EncoderModel"), t5_unigram, "mean"),
    "mT5": Family(t5("MT5EncoderModel"), t5_unigram, "mean"),
    "BART": Family(bart, roberta_pairs, "mean", text_part=lambda model: model.get_encoder()),
    "CLIP's text model": Family(clip, clip_pairs, "last", text_part=lambda model: model.text_model),
    "sentence-transformers": Family(encoder("Bert"), wordpiece, "mean", sentences=True),
    "GPT-2": Family(
        decoder("GPT2", "LMHeadModel"), lambda: byte_pairs("GPT2Tokenizer", eos_token="<|e|>"), "last", "<|e|>",
        text_part=inner,
    ),
    "Llama": Family(decoder("Llama"), llama_pairs, "last", "</s>", text_part=inner),
    "Mistral": Family(decoder("Mistral"), llama_pairs, "last", "</s>", text_part=inner),
    "Qwen2": Family(decoder("Qwen2"), qwen_pairs, "last", "<|e|>", text_part=inner),
    "Qwen3": Family(decoder("Qwen3", head_dim=16), qwen_pairs, "last", "<|e|>", text_part=inner),
    "Gemma": Family(decoder("Gemma", head_dim=16), gemma_pairs, "last", "<eos>", text_part=inner),
    "Gemma 3": Family(
        decoder("Gemma3", head_dim=16, sliding_window=4), gemma_pairs, "last", "<eos>", text_part=inner
    ),
    "Gemma 3, bidirectional": Family(
        decoder("Gemma3", "TextModel", head_dim=16, use_bidirectional_attention=True), gemma_pairs, "mean"
    ),
}  # fmt: skip


@dataclass
class Member:
    """A member of a family on disk, open as a text tower."""

    family: Family
    folder: Path
    model: Any  # as it was before it was saved
    tower: TextTower


def make(name: str, folder: Path) -> Member:
    """Save a random member of a family into `folder` and open it by `hf:FOLDER`."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family.model(len(tokenizer)).eval()
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        if family.sentences:
            save_sentences(folder)
        return Member(family, folder, model, open_text_tower(f"hf:{folder}", width=WIDTH).eval())


def save_sentences(folder: Path) -> None:
    """Save once more what lies in `folder`, by sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folder))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    shutil.rmtree(folder)
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder))


@torch.no_grad()
def vectors(tower: TextTower, texts: Sequence[str] = TEXTS) -> Tensor:
    return F.normalize(tower(tower.tokenize(texts)), dim=-1)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# Proofs


def prove_pooling(member: Member) -> None:
    """The vector is the head's of the hidden state(s) that the whole model itself gives, one text at a time."""
    tower = member.tower
    assert tower.pooling == member.family.pooling
    for text in TEXTS:
        [ids] = tower.tokenize([text])
        with torch.no_grad():
            hidden = member.family.text_part(member.model)(input_ids=torch.tensor([ids])).last_hidden_state[0]
            pooled = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[tower.pooling]
            assert distance(tower.features([ids])[0], pooled) < 1e-5
            assert distance(tower([ids])[0], tower.head(pooled)) < 1e-5
    assert tower.head.in_features == hidden.shape[-1]


def prove_padding(member: Member) -> None:
    """No padding, all padded to the longest, and padding filled with other ids: the same vectors, to 1e-6."""
    tower = member.tower
    lengths = sorted(map(len, tower.tokenize(TEXTS)))
    assert lengths[0] < lengths[-1]
    with padded(tower, False):
        expected = vectors(tower)
    assert distance(expected[0], expected[2]) > 1e-3, "they do read"
    assert len(length_groups(lengths, 10**9)) == 1
    for fill in (None, 0, 7, len(tower.tokenizer) - 1):
        with padded(tower, True, fill):
            assert distance(vectors(tower), expected) < 1e-6, f"filled with {fill}"


@contextmanager
def padded(tower: TextTower, everything: bool, fill: int | None = None) -> Iterator[None]:
    """Pad nothing, or everything to the longest text, and with what."""
    pad_id = tower.tokenizer.pad_id if fill is None else fill
    with (
        patch.dict(PASS_COST, cpu=10**9 if everything else 0),
        patch.object(type(tower.tokenizer), "pad_id", property(lambda _: pad_id)),
    ):
        yield


def prove_batches(member: Member) -> None:
    """One text at a time, all together, backwards: the same vectors, to 1e-6."""
    together = vectors(member.tower)
    assert distance(torch.cat([vectors(member.tower, [text]) for text in TEXTS]), together) < 1e-6
    assert distance(vectors(member.tower, TEXTS[::-1]).flip(0), together) < 1e-6


READ_ALONE = ("BART", "CLIP's text model", "Gemma 3")  # the last one here sees a window of four tokens


def prove_rows(member: Member) -> None:
    """Texts that share rows have the vectors that they have alone, to 1e-6; some families cannot read such rows."""
    tower = member.tower
    assert (tower._sight is None) == (member.family in [FAMILIES[name] for name in READ_ALONE])
    if tower._sight is None:
        return
    tokens = tower.tokenize([*TEXTS, *TEXTS[::-1]])
    tokens[1] = [*tokens[1][:2], tower.tokenizer.pad_id, *tokens[1][2:]]  # as "<pad>" in a caption is read
    rows = share_rows(list(map(len, tokens)))
    assert len(rows.texts) < len(tokens)
    with torch.no_grad():
        given = row_inputs(tokens, rows, tower.encoder, sight=tower._sight, pad_id=tower.tokenizer.pad_id)
        shared = given.pool(given.read(tower.encoder), tower.pooling)
        alone = torch.cat([tower.features([ids]) for ids in tokens])
    assert distance(shared, alone) < 1e-6 * float(alone.abs().max().clamp(min=1))


def prove_end(member: Member) -> None:
    """A decoder reads an end token behind every text, its own or one that lamplit adds; other tokenizers are left."""
    before, tower = member.family.tokenizer(), member.tower
    for text, ids in zip(TEXTS, tower.tokenize(TEXTS), strict=True):
        end = [] if member.family.ends is None else [before.convert_tokens_to_ids(member.family.ends)]
        assert ids == [*before(text)["input_ids"], *end]
    if tower.pooling == "last":
        assert {ids[-1] for ids in tower.tokenize(TEXTS)} == {before.eos_token_id}


def prove_truncation(member: Member) -> None:
    """A cut text keeps its special tokens, one of the greatest length is read, and what is cut is counted."""
    long = "red " * 100
    short = open_text_tower(f"hf:{member.folder}", width=WIDTH, context_length=5)
    whole, cut = member.tower.tokenizer.encode([long], None)[0], short.tokenize([long])[0]
    assert len(whole) > 5 == len(cut) == short.context_length
    if member.tower.pooling in ("cls", "last"):
        place = 0 if member.tower.pooling == "cls" else -1
        assert cut[place] == whole[place]
    assert short.count_truncated([long, "", long]) == 2
    assert vectors(member.tower, [long]).isfinite().all()


def prove_gradients(member: Member) -> None:
    """Every parameter that is to train gets a gradient, and nothing is kept that texts do not pass through."""
    tower = member.tower
    tower.zero_grad()
    tower(tower.tokenize(TEXTS)).square().sum().backward()
    lacking = [
        name for name, parameter in tower.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    tower.zero_grad()
    assert lacking == []


def prove_round_trip(member: Member) -> None:
    """A saved model gives the same bytes without the folder it came from, its tokenizer included."""
    gray = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)
    identity = TowerIdentity("module:made.up", "0" * 32, WIDTH, gray, {"library": "module", "name": "made.up"})
    hidden, saved = member.folder.with_name(f"{member.folder.name} hidden"), member.folder.with_name("saved")
    LiT(member.tower, identity).save(saved)
    member.folder.rename(hidden)
    try:
        again = lamplit.load(saved)
    finally:
        hidden.rename(member.folder)
    assert again.text_tower is not None
    assert again.text_tower.tokenize(TEXTS) == member.tower.tokenize(TEXTS)
    assert torch.equal(again.encode_texts(TEXTS), vectors(member.tower))
    assert again.text_tower.describe() == member.tower.describe()
    shutil.rmtree(saved)


PROOFS: dict[str, Callable[[Member], None]] = {
    "pooling by hand": prove_pooling,
    "padding": prove_padding,
    "batch and order": prove_batches,
    "shared rows": prove_rows,
    "end token": prove_end,
    "truncation": prove_truncation,
    "gradients": prove_gradients,
    "round trip": prove_round_trip,
}


def row(name: str, member: Member) -> dict[str, str]:
    """What the table of towers says of a family; run `PROOFS` first."""
    tower = member.tower
    backend: Any = tower.tokenizer.tokenizer.backend_tokenizer.model  # type: ignore[attr-defined]
    context = tower.context_length
    return {
        "family": name,
        "opened from": type(member.model).__name__,
        "encoder": type(tower.encoder).__name__,
        "tokenizer": f"{type(tower.tokenizer.tokenizer).__name__} ({type(backend).__name__})",  # type: ignore[attr-defined]
        "pooling": tower.pooling,
        "end token": f"{member.family.ends} added" if member.family.ends else "as the tokenizer has it",
        "feature width": str(tower.head.in_features),
        "positions": "relative" if context >= 10**6 else str(context),
    }
