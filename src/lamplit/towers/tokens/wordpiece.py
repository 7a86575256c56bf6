"""WordPiece by tensorflow-text's rule, which the paper's BERT towers were tuned with.

It is not transformers' rule: text is case-folded and taken apart by compatibility (ß is ss, ½ is 1⁄2), what cannot be
seen is dropped, and a word counts as too long by its bytes. The tables are those of Python's `unicodedata`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from lamplit.errors import TowerError

PAD, UNKNOWN, CLASS = "[PAD]", "[UNK]", "[CLS]"
VOCABULARY_FILE = "vocab.txt"
MAX_BYTES = 100  # a longer word is unknown
# Unicode's Default_Ignorable_Code_Point, which `unicodedata` lacks.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Each of these characters is a word of its own.
_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def normalize(text: str) -> str:
    """Fold case and compatibility, drop accents and what cannot be seen, and make controls spaces."""
    if text.isascii():
        folded = text.lower()
    else:
        decomposed = unicodedata.normalize("NFD", _fold(text))
        folded = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf") else c for c in folded)


def split_words(text: str) -> list[str]:
    """Cut a text, as it comes, into normalised words; punctuation and ideographs stand alone."""
    spaced = "".join(f" {c} " if _stands_alone(c) else c for c in normalize(text))
    return [word for word in spaced.split(" ") if word]  # any other white space is part of a word


class WordPiece:
    """A vocabulary of words and word ends (`##ing`), matched greedily from the left.

    A text is `[CLS]` and its pieces, cut at the context length; there is no `[SEP]`, and "[CLS]" in a text is three
    words like any other (paper section 4; the authors' `BertTokenizer`).

    Args:
        tokens: the vocabulary, by id.
        fill: fill every row up to the context length with `[PAD]`, for a tower that has no masks.

    Raises:
        TowerError: a token occurs twice, or a special one is missing.
    """

    def __init__(self, tokens: Sequence[str], *, fill: bool = False) -> None:
        self.tokens = list(tokens)
        self.fill = fill
        self._ids = {token: number for number, token in enumerate(tokens)}
        missing = [token for token in (PAD, UNKNOWN, CLASS) if token not in self._ids]
        if missing or len(self._ids) < len(self.tokens):
            wrong = f"lacks {', '.join(missing)}" if missing else "has a token twice"
            raise TowerError(f"this is not the vocabulary of a WordPiece tokenizer: it {wrong}")
        self._longest = max(map(len, self.tokens))

    @classmethod
    def read(cls, file: Path, *, fill: bool = False) -> Self:
        """Read a vocabulary file, one token a line.

        Raises:
            TowerError: it is not there, or not such a file.
        """
        try:
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            return cls(lines, fill=fill)
        except (OSError, UnicodeDecodeError, TowerError) as error:
            raise TowerError(f"{file} cannot be read as a vocabulary, one token a line: {error}") from error

    @property
    def pad_id(self) -> int:
        """The id that fills a row that is shorter than its batch."""
        return self._ids[PAD]

    @property
    def unknown_id(self) -> int | None:
        """The id of a word that the vocabulary cannot write."""
        return self._ids[UNKNOWN]

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.tokens)

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return the token ids of each text, `[CLS]` first, cut at `context_length` if it is given."""
        rows = []
        for text in texts:
            pieces = (piece for word in split_words(text) for piece in self._pieces(word))
            row = [self._ids[CLASS], *pieces][:context_length]
            filled = context_length - len(row) if self.fill and context_length is not None else 0
            rows.append(row + [self.pad_id] * filled)
        return rows

    def encode_cut(self, texts: Sequence[str], context_length: int) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text as `encode` does, and whether it was cut."""
        whole = self.encode(texts, None)
        fill = [self.pad_id] * context_length if self.fill else []
        tokens = [row[:context_length] + fill[len(row) :] for row in whole]
        return tokens, [len(row) > context_length for row in whole]

    def _pieces(self, word: str) -> list[int]:
        unknown = [self._ids[UNKNOWN]]
        if len(word.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            return unknown
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                number = self._ids.get(prefix + word[start:end])
                if number is not None:
                    ids.append(number)
                    start = end
                    break
            else:
                return unknown
        return ids

    def save(self, folder: Path) -> None:
        """Write `vocab.txt`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCABULARY_FILE).write_bytes("".join(f"{token}\n" for token in self.tokens).encode())

    def describe(self) -> dict[str, Any]:
        """Return what `load_tokenizer` needs besides the files."""
        return {"kind": "wordpiece", "fill": self.fill}


def _fold(text: str) -> str:
    """Unicode's NFKC_Casefold: fold, decompose by compatibility and drop, until nothing changes."""
    while True:
        folded = unicodedata.normalize("NFKC", _IGNORABLE.sub("", text).casefold())
        if folded == text:
            return folded
        text = folded


def _stands_alone(character: str) -> bool:
    if character.isascii():
        return character in string.punctuation
    return unicodedata.category(character).startswith("P") or _IDEOGRAPH.match(character) is not None
