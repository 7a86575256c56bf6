"""The tokenizer of a saved model, by its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamplit.towers.tokens.open_clip_tokenizers import OpenClipPairs, OpenClipTokenizer
from lamplit.towers.tokens.static_tokenizer import StaticTokenizer
from lamplit.towers.tokens.tokenizers import SENTENCEPIECE_FILE, PretrainedTokenizer, SentencePiece, Tokenizer
from lamplit.towers.tokens.wordpiece import VOCABULARY_FILE, WordPiece


def load_tokenizer(description: dict[str, Any], folder: Path) -> Tokenizer:
    """Read the tokenizer that was saved into `folder`, by its description.

    Raises:
        TowerError: it is missing or damaged.
        MissingExtraError: it needs a package that is not installed.
    """
    options = {key: value for key, value in description.items() if key != "kind"}
    if description["kind"] == "open_clip":
        return OpenClipTokenizer.load(folder, **options)
    if description["kind"] == "open_clip_pairs":
        return OpenClipPairs(**options)
    if description["kind"] == "static":
        return StaticTokenizer.read(folder, **options)
    if description["kind"] == "wordpiece":
        return WordPiece.read(folder / VOCABULARY_FILE, **options)
    if description["kind"] == "sentencepiece":
        return SentencePiece.read(folder / SENTENCEPIECE_FILE, **options)
    return PretrainedTokenizer.load(folder, **options)
