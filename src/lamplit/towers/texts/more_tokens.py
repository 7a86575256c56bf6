"""Words that a tokenizer cannot write: how many there are in texts, and pieces of them for its vocabulary.

A WordPiece or Unigram tokenizer makes one unknown token of whatever holds a character that its vocabulary lacks, so
that captions in another script may all be one text to a tower. Those of bytes (GPT-2's, CLIP's, most decoders')
write all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lamplit.errors import UsageError
from lamplit.towers.loading import quiet_transformers
from lamplit.towers.texts.text_tower import TextTower
from lamplit.towers.tokens.static_tokenizer import StaticTokenizer
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer, Tokenizer

MOST_PIECES = 8192  # as many as a vocabulary from scratch has
_AT_ONCE = 10_000
_LEAST = 2  # times that two pieces must stand together to become one: words that occur once are no use to others


def unknown_share(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return which share of the tokens of `texts` is the unknown one; special tokens do not count."""
    if isinstance(tokenizer, StaticTokenizer):
        tokenizer = tokenizer.keeping_unknown()
    unknown = tokenizer.unknown_id
    if unknown is None or not texts:
        return 0.0
    rows = tokenizer.encode(list(texts), None)
    around = len(tokenizer.encode([""], None)[0])
    count = sum(len(row) - around for row in rows)
    return sum(row.count(unknown) for row in rows) / count if count > 0 else 0.0


def add_pieces(tower: TextTower, texts: Sequence[str], seed: int = 0) -> int:
    """Give a tower the pieces of words that its tokenizer cannot write; their vectors begin among those of the others.

    Args:
        tower: a text tower of transformers.
        texts: M texts, whose unknown words are read.
        seed: of the new vectors.

    Returns:
        How many pieces were added: none if every word can be written.

    Raises:
        UsageError: the tower has no such tokenizer.
    """
    tokenizer = tower.tokenizer
    if not isinstance(tokenizer, PretrainedTokenizer) or tower.config["library"] != "transformers":
        raise UsageError(
            f"{tower.spec} has no vocabulary that pieces could be added to; leave out --train-tokenizer (it is for "
            "text towers by hf: and demo:; scratch: makes a vocabulary of your captions anyway)"
        )
    if tokenizer.unknown_id is None or not tokenizer.tokenizer.is_fast:
        return 0
    described = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    kind = described["model"].get("type")
    if kind not in ("WordPiece", "Unigram"):
        return 0
    prefix = described["model"]["continuing_subword_prefix"] if kind == "WordPiece" else ""
    pieces = _train(_unknown_words(tokenizer, texts), prefix)
    vocabulary = described["model"]["vocab"]
    known = set(vocabulary) if kind == "WordPiece" else {piece for piece, _ in vocabulary}
    new = [piece for piece in pieces if piece not in known]
    if not new:
        return 0
    size = len(tokenizer)
    if kind == "WordPiece":
        vocabulary.update({piece: size + number for number, piece in enumerate(new)})
    elif len(vocabulary) == size:
        score = min(score for _, score in vocabulary)  # of all alike, so that the longest are taken
        vocabulary.extend([piece, score] for piece in new)
    else:
        raise UsageError(f"the vocabulary of {tower.spec} ends in tokens of its own, so no piece can be added to it")
    tower.tokenizer = PretrainedTokenizer(_with_backend(tokenizer.tokenizer, described), fill=tokenizer.fill)
    _resize(tower, size + len(new), seed)
    return len(new)


def _unknown_words(tokenizer: PretrainedTokenizer, texts: Sequence[str]) -> Counter[str]:
    """Count the words that a tokenizer cannot write, as it cuts and normalises them."""
    backend: Any = tokenizer.tokenizer.backend_tokenizer
    counts: Counter[str] = Counter()
    for start in range(0, len(texts), _AT_ONCE):
        for text in texts[start : start + _AT_ONCE]:
            plain = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
            cut = [(plain, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(plain)
            counts.update(word for word, _ in cut)
    unknown = tokenizer.unknown_id
    lacking = {word for word in counts if any(token.id == unknown for token in backend.model.tokenize(word))}
    return Counter({word: count for word, count in counts.items() if word in lacking})


def _train(words: Counter[str], prefix: str) -> list[str]:
    """Train pieces on words, by byte pairs; in the order of their characters, whatever the trainer's threads do."""
    if not words:
        return []
    backend = Backend(models.WordPiece())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=MOST_PIECES,
        min_frequency=_LEAST,
        special_tokens=[],
        continuing_subword_prefix=prefix,
        show_progress=False,
    )
    repeated = (" ".join([word] * count) for word, count in sorted(words.items()))
    backend.train_from_iterator(repeated, trainer)
    return sorted(backend.get_vocab())


def _with_backend(tokenizer: Any, described: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with another vocabulary, and all else as it was."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(json.dumps(described)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )


def _resize(tower: TextTower, size: int, seed: int) -> None:
    """Give an encoder vectors of more tokens, spread as those that it has.

    transformers itself draws them so near to the mean that they can hardly be told apart.
    """
    encoder: Any = tower.encoder
    old = encoder.get_input_embeddings().weight.detach().clone()
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        encoder.resize_token_embeddings(size, mean_resizing=False)
    drawn = torch.randn(size - len(old), old.shape[1], generator=torch.Generator().manual_seed(seed))
    encoder.get_input_embeddings().weight.data[len(old) :] = old.mean(0) + old.std(0) * drawn
    settings = tower.config["config"] | {"vocab_size": size}
    tower.config = tower.config | {"config": settings}
