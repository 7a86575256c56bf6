"""Tokenizers as open_clip uses them: texts are mended before they are read (curly quotes, entities, runs of spaces)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lamplit.errors import require
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer, Side, are_cut, fill_rows

EXTRA = "export"  # the extra of lamplit that brings open_clip

if TYPE_CHECKING:  # it takes seconds to import, and a search does not need it
    from transformers import PreTrainedTokenizerBase


class OpenClipTokenizer(PretrainedTokenizer):
    """A tokenizer of transformers behind open_clip's mending of texts.

    Args:
        tokenizer: the tokenizer itself.
        clean: how texts are mended, by open_clip's name of it.
        strip_separator: whether the separator's id becomes 0.
        fill: as in `PretrainedTokenizer`.

    Raises:
        MissingExtraError: open_clip is not installed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        clean: str = "whitespace",
        strip_separator: bool = False,
        fill: Side | None = None,
    ) -> None:
        super().__init__(tokenizer, fill=fill)
        self.clean, self.strip_separator = clean, strip_separator
        self._mend = require("open_clip.tokenizer", EXTRA).get_clean_fn(clean)

    @classmethod
    def load(cls, folder: Path, **options: Any) -> Self:
        """Read what `save` wrote.

        Raises:
            TowerError: it is not there, or damaged.
            MissingExtraError: open_clip is not installed.
        """
        return cls(PretrainedTokenizer.load(folder).tokenizer, **options)

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, cut at `context_length` if it is given."""
        rows = super().encode([self._mend(text) for text in texts], context_length)
        if not self.strip_separator:
            return rows
        separator = self.tokenizer.sep_token_id
        return [[0 if token == separator else token for token in row] for row in rows]

    def describe(self) -> dict[str, Any]:
        """Return what `load_tokenizer` needs besides the files."""
        fill = {} if self.fill is None else {"fill": self.fill}
        return {"kind": "open_clip", "clean": self.clean, "strip_separator": self.strip_separator} | fill


class OpenClipPairs:
    """CLIP's own byte pairs, by open_clip's class, whose vocabulary comes with open_clip.

    Args:
        clean: how texts are mended, by open_clip's name of it.
        fill: whether rows are filled with 0 up to the context length.

    Raises:
        MissingExtraError: open_clip is not installed.
    """

    def __init__(self, *, clean: str = "lower", fill: Side | None = None) -> None:
        self.clean, self.fill = clean, fill
        self._pairs = require("open_clip.tokenizer", EXTRA).SimpleTokenizer(clean=clean)

    @property
    def pad_id(self) -> int:
        """The id that rows are filled with."""
        return 0

    @property
    def unknown_id(self) -> int | None:
        """None: it writes all, by bytes."""
        return None

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._pairs.vocab_size)

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return the token ids of each text, begin and end included; what is too long loses pieces, never the end."""
        begin, end = self._pairs.sot_token_id, self._pairs.eot_token_id
        cut = None if context_length is None else context_length - 2
        rows = [[begin, *self._pairs.encode(text)[:cut], end] for text in texts]
        return fill_rows(rows, context_length, self.pad_id, self.fill)

    def encode_cut(self, texts: Sequence[str], context_length: int) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text as `encode` does, and whether it was cut."""
        tokens = self.encode(texts, context_length)
        return tokens, are_cut(self, texts, tokens, context_length)

    def save(self, folder: Path) -> None:
        """Write nothing: open_clip brings the vocabulary."""

    def describe(self) -> dict[str, Any]:
        """Return what `load_tokenizer` needs."""
        return {"kind": "open_clip_pairs", "clean": self.clean} | ({} if self.fill is None else {"fill": self.fill})
