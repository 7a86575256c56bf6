r"""Sums of words: `"beach" - "people"`, `0.5 * "red" + "car"`.

The grammar:

    query = [sign] term { sign term }
    sign  = "+" | "-"
    term  = [number "*"] text | text "*" number
    text  = between two double quotes, where `\"` is a quote and `\\` a backslash

A query that begins neither with a quote, nor with a sign or a weight before a quote, is plain words, with all quotes
and signs inside them: `a dog - not a cat` is one text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamplit.errors import UsageError
from lamplit.retrieval.model_reader import Reader
from lamplit.unit_vectors import normalize

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_CANCELLED = 1e-4  # length of a sum of unit vectors whose parts cancel each other
_UNKNOWN = "\U00012000"  # a sign of cuneiform
_IS_SUM = re.compile(rf'\s*[+-]?\s*(?:{_NUMBER}\s*\*\s*)?"')
_TOKEN = re.compile(rf'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<number>{_NUMBER})|(?P<mark>[-+*]))', re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A text, and the weight that its unit vector is multiplied by."""

    text: str
    weight: float = 1.0


def parse_query(query: str) -> list[Term]:
    """Read a query as a sum of terms; plain words are one term.

    Raises:
        UsageError: the query begins like a sum, but cannot be read as one; the message points at the position.

    Example:
        >>> parse_query('"beach" - 0.5 * "people"')
        [Term(text='beach', weight=1.0), Term(text='people', weight=-0.5)]
    """
    if not _IS_SUM.match(query):
        return [Term(query)]
    tokens = _tokens(query)
    terms: list[Term] = []
    while tokens[0][0] != "end":
        kind, mark, position = tokens[0]
        sign = 1.0
        if kind == "mark" and mark in "+-":
            sign = -1.0 if mark == "-" else 1.0
            tokens.pop(0)
        elif terms:
            raise _error(query, position, "expected + or -")
        terms.append(_term(query, tokens, sign))
    return terms


def encode_words(reader: Reader, query: str) -> NDArray[np.float32]:
    """Encode words, or a sum of them: (D,) float32 in the joint space, not normalised.

    Raises:
        UsageError: the query is blank, cannot be read, or the text tower knows no word of it.
    """
    terms = parse_query(query)
    if not all(term.text.strip() for term in terms):
        raise UsageError("the query is blank; type words to search for")
    texts = [term.text for term in terms]
    require_known_words(reader.tokenize, texts)
    total: NDArray[np.float32] = np.asarray([term.weight for term in terms], np.float32) @ reader.encode_texts(texts)
    return total


def require_unit(total: NDArray[np.float32], query: str | None) -> NDArray[np.float32]:
    """Return the unit vector of a sum, (D,).

    Raises:
        UsageError: the parts of the query cancel each other.
    """
    if float(np.linalg.norm(total)) < _CANCELLED:
        raise UsageError(f"the parts of {query!r} cancel each other: nothing is left to search for")
    unit: NDArray[np.float32] = normalize(total[None])[0]
    return unit


def require_known_words(tokenize: Callable[[list[str]], list[list[int]]], texts: Sequence[str]) -> None:
    """Raise if a text tower knows no word of a text: any two such texts have the same vector, whatever they say.

    Args:
        tokenize: returns the token ids of each text, as `TextTower.tokenize` does.
        texts: what is searched for.

    Raises:
        UsageError: a tokenizer makes no more of a text than of a sign that no vocabulary has.
    """
    nothing = {token for tokens in tokenize(["", _UNKNOWN, f"{_UNKNOWN} {_UNKNOWN}"]) for token in tokens}
    for text, tokens in zip(texts, tokenize(list(texts)), strict=True):
        if tokens and nothing.issuperset(tokens):
            raise UsageError(
                f"the model's text tower knows no word of {text!r}, so what it would find has nothing to do with it; "
                "type other words, or take a text tower that reads this language or script"
            )


def _term(query: str, tokens: list[tuple[str, str, int]], sign: float) -> Term:
    weight = 1.0
    if tokens[0][0] == "number":
        weight = float(tokens.pop(0)[1])
        if tokens[0][1] != "*":
            raise _error(query, tokens[0][2], 'expected * and words in quotes, as in 0.5 * "red"')
        tokens.pop(0)
    kind, quoted, position = tokens[0]
    if kind != "text":
        raise _error(query, position, 'expected words in quotes, as in "beach" - "people"')
    tokens.pop(0)
    if tokens[0][1] == "*" and tokens[0][0] == "mark":
        tokens.pop(0)
        if tokens[0][0] != "number":
            raise _error(query, tokens[0][2], "expected a number")
        weight *= float(tokens.pop(0)[1])
    return Term(re.sub(r"\\(.)", r"\1", quoted[1:-1], flags=re.DOTALL), sign * weight)


def _tokens(query: str) -> list[tuple[str, str, int]]:
    """Return kind, characters and position of each token, and an end."""
    found, position = [], 0
    end = len(query.rstrip())
    while position < end:
        match = _TOKEN.match(query, position)
        if match is None:
            position += len(query[position:]) - len(query[position:].lstrip())
            unclosed = query[position] == '"'
            raise _error(
                query, position, "this quote is not closed" if unclosed else "expected words in quotes, + or -"
            )
        kind = str(match.lastgroup)
        found.append((kind, match[kind], match.start(kind)))
        position = match.end()
    return [*found, ("end", "", end)]


def _error(query: str, position: int, expected: str) -> UsageError:
    shown = "".join(character if character.isprintable() else " " for character in query)
    return UsageError(f"the query cannot be read: {expected}\n  {shown}\n  {' ' * position}^")
