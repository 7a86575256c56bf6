"""Tokenizers, from transformers or from a vocabulary file: they turn a text into token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from lamplit.errors import TowerError, first_line, require
from lamplit.towers.tokens.wordpiece import WordPiece

if TYPE_CHECKING:  # it takes seconds to import, and a search does not need it
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SENTENCEPIECE_FILE = "sentencepiece.model"
Side = Literal["left", "right"]


class Tokenizer(Protocol):
    """What a text tower asks of its tokenizer."""

    @property
    def pad_id(self) -> int:
        """The id that fills a row that is shorter than its batch; its vector is never read."""

    @property
    def unknown_id(self) -> int | None:
        """The id of whatever the vocabulary cannot write; None if it writes all."""

    def __len__(self) -> int:
        """Return the number of ids."""

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, cut at `context_length` if it is given."""

    def encode_cut(self, texts: Sequence[str], context_length: int) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text as `encode` does, and whether it was cut."""

    def save(self, folder: Path) -> None:
        """Write its own files."""

    def describe(self) -> dict[str, Any]:
        """Return, in JSON values, what `load_tokenizer` needs besides the files."""


class PretrainedTokenizer:
    """A tokenizer of transformers.

    Args:
        tokenizer: the tokenizer itself.
        fill: the side on which every row is filled up to the context length, for a tower that reads padding, as
            SigLIP's does; None if padding is never read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, fill: Side | None = None) -> None:
        self.tokenizer = tokenizer
        self.fill = fill

    @classmethod
    def load(cls, folder: Path, *, fill: Side | None = None) -> Self:
        """Read what `save` wrote.

        Raises:
            TowerError: it is not there, or damaged.
        """
        from transformers import AutoTokenizer

        from lamplit.towers.loading import READ_ERRORS

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except READ_ERRORS as error:
            raise TowerError(f"{folder} is missing or damaged: the model is not whole") from error
        if not holds_words(tokenizer):
            raise TowerError(f"{folder} holds no tokenizer, only its special tokens: the model is not whole")
        return cls(tokenizer, fill=fill)

    @property
    def pad_id(self) -> int:
        """The id that fills a row that is shorter than its batch; unless rows are filled, its vector is never read."""
        return self.tokenizer.pad_token_id or 0

    @property
    def unknown_id(self) -> int | None:
        """The id of whatever the vocabulary cannot write; None if there is none (CLIP's is its end token)."""
        unknown: int | None = self.tokenizer.unk_token_id
        return None if unknown in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) else unknown

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.tokenizer)

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, cut at `context_length` if it is given."""
        if not texts:
            return []
        if context_length is None:  # it warns of long texts, which are counted on purpose
            logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        ids: list[list[int]] = self.tokenizer(
            list(texts), truncation=context_length is not None, max_length=context_length, return_attention_mask=False
        )["input_ids"]
        return fill_rows(ids, context_length, self.pad_id, self.fill)

    def encode_cut(self, texts: Sequence[str], context_length: int) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text as `encode` does, and whether it was cut."""
        tokens = self.encode(texts, context_length)
        return tokens, are_cut(self, texts, tokens, context_length)

    def save(self, folder: Path) -> None:
        """Write its own files: the same before and after any use."""
        if self.tokenizer.is_fast:
            backend = self.tokenizer.backend_tokenizer  # which writes how it cut and padded last
            backend.no_truncation()
            backend.no_padding()
        self.tokenizer.save_pretrained(folder)

    def describe(self) -> dict[str, Any]:
        """Return what `load_tokenizer` needs besides the files."""
        return {"kind": "transformers"} | ({} if self.fill is None else {"fill": self.fill})


def fill_rows(rows: list[list[int]], length: int | None, pad_id: int, side: Side | None) -> list[list[int]]:
    """Fill rows of token ids up to `length` on one side; leave them as they are if there is no length or no side."""
    if length is None or side is None:
        return rows
    if side == "left":
        return [[pad_id] * (length - len(row)) + row for row in rows]
    return [row + [pad_id] * (length - len(row)) for row in rows]


def holds_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer has more than special tokens: without its files, transformers makes one of these alone.

    To such a tokenizer, all texts of as many words are alike.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), "▁"}
    return not special.issuperset(tokenizer.get_vocab())


class SentencePiece:
    """A model of the sentencepiece library, as the paper's own text tower reads it: the last token is always `</s>`.

    A text is its pieces and as many `</s>` as fill the context length, one at the least; what is too long loses
    pieces, never the end (the authors' "sticky" end). A tower that reads the last token so needs no mask.

    Args:
        model: the bytes of a `.model` file.
        lowercase: lower-case every text first. The authors' vision_transformer code does not; their big_vision code
            and their web demo of the S and Ti towers do, so it is the default.

    Raises:
        MissingExtraError: `sentencepiece` is not installed.
        TowerError: it is not a SentencePiece model, or has no `</s>`.
    """

    def __init__(self, model: bytes, *, lowercase: bool = True) -> None:
        self.model = model
        self.lowercase = lowercase
        self._processor = require("sentencepiece", "sentencepiece").SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise TowerError(f"this is not a SentencePiece model: {first_line(error)}") from error
        if self._processor.eos_id() < 0:
            raise TowerError("this SentencePiece model has no </s>, which the text tower reads")

    @classmethod
    def read(cls, file: Path, *, lowercase: bool = True) -> Self:
        """Read a `.model` file.

        Raises:
            TowerError: it is not there, or not a SentencePiece model.
        """
        try:
            return cls(file.read_bytes(), lowercase=lowercase)
        except (OSError, TowerError) as error:
            raise TowerError(f"{file} cannot be read as a SentencePiece model: {error}") from error

    @property
    def pad_id(self) -> int:
        """The id that rows are filled with: `</s>`."""
        return int(self._processor.eos_id())

    @property
    def unknown_id(self) -> int | None:
        """The id of whatever the vocabulary cannot write; a vocabulary with bytes never uses it."""
        unknown = int(self._processor.unk_id())
        return None if unknown < 0 else unknown

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._processor.vocab_size())

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return `context_length` token ids for each text, or, if that is None, its pieces and one `</s>`."""
        pieces = self._pieces(texts)
        if context_length is None:
            return [[*row, self.pad_id] for row in pieces]
        return self._fit(pieces, context_length)

    def encode_cut(self, texts: Sequence[str], context_length: int) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text as `encode` does, and whether it was cut."""
        pieces = self._pieces(texts)
        return self._fit(pieces, context_length), [len(row) >= context_length for row in pieces]

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        # Half of a surrogate pair has no UTF-8.
        plain = [text.encode("utf-8", "replace").decode() for text in texts]
        pieces: list[list[int]] = self._processor.encode([text.lower() for text in plain] if self.lowercase else plain)
        return pieces

    def _fit(self, pieces: list[list[int]], context_length: int) -> list[list[int]]:
        """Cut what is too long, and fill what is too short."""
        cut = [row[: context_length - 1] for row in pieces]
        return fill_rows(cut, context_length, self.pad_id, "right")

    def save(self, folder: Path) -> None:
        """Write `sentencepiece.model`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE_FILE).write_bytes(self.model)

    def describe(self) -> dict[str, Any]:
        """Return what `load_tokenizer` needs besides the files."""
        return {"kind": "sentencepiece", "lowercase": self.lowercase}


def read_vocabulary(file: Path, *, fill: bool) -> WordPiece | SentencePiece:
    """Read a vocabulary by its suffix: `.txt` is WordPiece, `.model` is SentencePiece.

    Raises:
        TowerError: it is missing, or has another suffix.
    """
    if file.suffix == ".txt":
        return WordPiece.read(file, fill=fill)
    if file.suffix == ".model":
        return SentencePiece.read(file)
    raise TowerError(f"{file} is not a vocabulary; expected FILE.txt (WordPiece) or FILE.model (SentencePiece)")


def are_cut(
    tokenizer: Tokenizer, texts: Sequence[str], tokens: Sequence[Sequence[int]], context_length: int
) -> list[bool]:
    """Tell of each text whether it was cut at a context length, given its `tokens` after the cut.

    Only texts that fill the context can have been longer, and only those are tokenised again.
    """
    full = [text for text, ids in zip(texts, tokens, strict=True) if len(ids) >= context_length]
    whole = iter(tokenizer.encode(full, None))
    return [len(ids) >= context_length and len(next(whole)) > context_length for ids in tokens]


def warn_of_cut(cut: int, total: int, context_length: int) -> None:
    """Log how many texts were cut at a context length."""
    logger.warning("texts of more than %d tokens lose their end: %d of %d", context_length, cut, total)


class TruncationLog:
    """Logs how many texts were cut at a context length, once for the same texts."""

    def __init__(self) -> None:
        self._logged: list[str] = []

    def count(
        self, tokenizer: Tokenizer, texts: Sequence[str], tokens: Sequence[Sequence[int]], context_length: int
    ) -> int:
        """Count the texts that were cut, given their `tokens` after the cut, and log it."""
        cut = list(compress(texts, are_cut(tokenizer, texts, tokens, context_length)))
        if cut and cut != self._logged:
            self._logged = cut
            warn_of_cut(len(cut), len(texts), context_length)
        return len(cut)
