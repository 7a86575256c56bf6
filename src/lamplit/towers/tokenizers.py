"""Tokenizers: what turns a text into token ids, whatever library or vocabulary file it comes from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lamplit.errors import TowerError
from lamplit.towers.loading import READ_ERRORS


class Tokenizer(Protocol):
    """What a text tower asks of its tokenizer."""

    @property
    def pad_id(self) -> int:
        """What fills a row that is shorter than its batch; never read."""

    def __len__(self) -> int:
        """Count the ids there are."""

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `context_length` if there is one."""

    def save(self, folder: Path) -> None:
        """Write its own files."""


class PretrainedTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            TowerError: it is not there, or damaged.
        """
        try:
            return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        except READ_ERRORS as error:
            raise TowerError(f"{folder} is missing or damaged: the model is not whole") from error

    @property
    def pad_id(self) -> int:
        """What fills a row that is shorter than its batch; never read."""
        return self.tokenizer.pad_token_id or 0

    def __len__(self) -> int:
        """Count the ids there are."""
        return len(self.tokenizer)

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `context_length` if there is one."""
        if not texts:
            return []
        if context_length is None:  # it warns of long texts, which are counted on purpose
            logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        ids: list[list[int]] = self.tokenizer(
            list(texts), truncation=context_length is not None, max_length=context_length, return_attention_mask=False
        )["input_ids"]
        return ids

    def save(self, folder: Path) -> None:
        """Write its own files."""
        self.tokenizer.save_pretrained(folder)
