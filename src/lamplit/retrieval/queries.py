r"""Sums of words: `"beach" - "people"`, `0.5 * "red" + "car"`.

The grammar:

    query = [sign] term { sign term }
    sign  = "+" | "-"
    term  = [number "*"] text | text "*" number
    text  = between two double quotes, where `\"` is a quote and `\\` a backslash

A query that neither begins with a quote, nor with a sign or a weight before a quote, is words as they are, quotes and
signs inside them too: `a dog - not a cat` is one text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lamplit.errors import UsageError

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_IS_SUM = re.compile(rf'\s*[+-]?\s*(?:{_NUMBER}\s*\*\s*)?"')
_TOKEN = re.compile(rf'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<number>{_NUMBER})|(?P<mark>[-+*]))', re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A text and what its unit vector is multiplied by."""

    text: str
    weight: float = 1.0


def parse_query(query: str) -> list[Term]:
    """Read a query as the sum it is; one term where it is plain words.

    Raises:
        UsageError: it begins like a sum, but cannot be read as one; the message points at the place.
    """
    if not _IS_SUM.match(query):
        return [Term(query)]
    tokens = _tokens(query)
    terms: list[Term] = []
    while tokens[0][0] != "end":
        kind, mark, place = tokens[0]
        sign = 1.0
        if kind == "mark" and mark in "+-":
            sign = -1.0 if mark == "-" else 1.0
            tokens.pop(0)
        elif terms:
            raise _error(query, place, "expected + or -")
        terms.append(_term(query, tokens, sign))
    return terms


def _term(query: str, tokens: list[tuple[str, str, int]], sign: float) -> Term:
    weight = 1.0
    if tokens[0][0] == "number":
        weight = float(tokens.pop(0)[1])
        if tokens[0][1] != "*":
            raise _error(query, tokens[0][2], 'expected * and words in quotes, as in 0.5 * "red"')
        tokens.pop(0)
    kind, quoted, place = tokens[0]
    if kind != "text":
        raise _error(query, place, 'expected words in quotes, as in "beach" - "people"')
    tokens.pop(0)
    if tokens[0][1] == "*" and tokens[0][0] == "mark":
        tokens.pop(0)
        if tokens[0][0] != "number":
            raise _error(query, tokens[0][2], "expected a number")
        weight *= float(tokens.pop(0)[1])
    return Term(re.sub(r"\\(.)", r"\1", quoted[1:-1], flags=re.DOTALL), sign * weight)


def _tokens(query: str) -> list[tuple[str, str, int]]:
    """Kind, characters and place of each token, and an end."""
    found, place = [], 0
    end = len(query.rstrip())
    while place < end:
        match = _TOKEN.match(query, place)
        if match is None:
            place += len(query[place:]) - len(query[place:].lstrip())
            unclosed = query[place] == '"'
            raise _error(query, place, "this quote is not closed" if unclosed else "expected words in quotes, + or -")
        kind = str(match.lastgroup)
        found.append((kind, match[kind], match.start(kind)))
        place = match.end()
    return [*found, ("end", "", end)]


def _error(query: str, place: int, expected: str) -> UsageError:
    shown = "".join(character if character.isprintable() else " " for character in query)
    return UsageError(f"the query cannot be read: {expected}\n  {shown}\n  {' ' * place}^")
