"""The tokenizer of static embeddings: a `tokenizer.json` without special tokens. It needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend

from lamplit.errors import TowerError
from lamplit.towers.tokens.tokenizers import are_cut

_FILE = "tokenizer.json"


class StaticTokenizer:
    """A tokenizer of the library tokenizers, which adds nothing to a text.

    Args:
        text: what a `tokenizer.json` holds.
        keeps_unknown: whether unknown tokens are read; model2vec leaves them out, sentence-transformers does not.

    Raises:
        TowerError: it is no tokenizer.
    """

    def __init__(self, text: str, *, keeps_unknown: bool) -> None:
        try:
            model = json.loads(text)["model"]  # the library's own error is a bare Exception
            model["type"]
            self._backend: Any = Backend.from_str(text)
        except (ValueError, LookupError, TypeError) as error:
            raise TowerError("this is no tokenizer.json") from error
        self.keeps_unknown = keeps_unknown
        self._backend.no_padding()
        self._backend.no_truncation()
        unknown = model.get("unk_token")
        if unknown is None and isinstance(model.get("unk_id"), int):  # a Unigram's
            unknown = self._backend.id_to_token(model["unk_id"])
        self.unknown_id: int | None = None if unknown is None else self._backend.token_to_id(unknown)

    @classmethod
    def read(cls, file: Path, *, keeps_unknown: bool) -> Self:
        """Read a `tokenizer.json`, or a folder that `save` wrote.

        Raises:
            TowerError: it is not there, or damaged.
        """
        try:
            path = file / _FILE if file.is_dir() else file
            return cls(path.read_text(encoding="utf-8"), keeps_unknown=keeps_unknown)
        except (OSError, ValueError, TowerError) as error:
            raise TowerError(f"{file} is missing or damaged: the model is not whole") from error

    @property
    def pad_id(self) -> int:
        """The id that an empty text gets, and that fills a row; its vector is not read there."""
        return 0

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._backend.get_vocab_size())

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return the token ids of each text, cut at `context_length` if it is given."""
        rows = [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]
        if not self.keeps_unknown:
            rows = [[token for token in row if token != self.unknown_id] for row in rows]
        return [row[:context_length] for row in rows]

    def encode_cut(self, texts: Sequence[str], context_length: int) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text as `encode` does, and whether it was cut."""
        tokens = self.encode(texts, context_length)
        return tokens, are_cut(self, texts, tokens, context_length)

    def keeping_unknown(self) -> Self:
        """Return the same tokenizer, which reads unknown tokens."""
        return type(self)(self._backend.to_str(), keeps_unknown=True)

    def save(self, folder: Path) -> None:
        """Write its file."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / _FILE))

    def describe(self) -> dict[str, Any]:
        """Return what `load_tokenizer` needs besides the file."""
        return {"kind": "static", "keeps_unknown": self.keeps_unknown}
