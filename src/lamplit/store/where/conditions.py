r"""Conditions on the columns of a store, such as `year > 2019 AND (kind IN ('bird', 'fish') OR NOT 'a hat' IN texts)`.

A condition is read by this grammar and written anew from what was understood, so nothing else reaches the database: no
function, no arithmetic, no comment. Keywords may be of either case.

    condition  = all { OR all }                all = one { AND one }
    one        = NOT one | "(" condition ")" | comparison
    comparison = operand ("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") operand
               | column [NOT] IN "(" literal { "," literal } ")" | column [NOT] BETWEEN literal AND literal
               | column [NOT] (LIKE | ILIKE) text | column IS [NOT] (NULL | TRUE | FALSE)
               | literal [NOT] IN column            for a column of lists, such as texts
               | column                             for a column of booleans, or of text that says true or false
    operand    = column | literal              column = name { "." name }, for a field of a structure
    literal    = text | [sign] number | TRUE | FALSE | DATE text | TIMESTAMP text
    name       = letters, digits and underscores, or anything between two backticks
    text       = between two single quotes, where '' is a quote; or between two double quotes, where "" is one
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import NamedTuple, NoReturn

import pyarrow as pa

from lamplit.errors import UsageError, nearest_names
from lamplit.store.where.comparisons import Column, Literal, as_date, compared, in_list, like, one_of

MAX_LENGTH = 20_000  # characters
MAX_PARTS = 2_000  # comparisons and literals
MAX_DEPTH = 20  # of brackets; Lance reads 40
_KEYWORDS = frozenset(["AND", "OR", "NOT", "IN", "LIKE", "ILIKE", "BETWEEN", "IS", "NULL", "TRUE", "FALSE"])
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")|(?P<quoted>`[^`]+`)"""
    r"""|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w))|(?P<word>[^\W\d]\w*)"""
    r"""|(?P<mark><=|>=|<>|!=|==|[=<>(),.+-])|(?P<end>\Z))""",
)
_FLIPPED = {"=": "=", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_SAME = {"==": "=", "<>": "!="}
_GRAMMAR = "a condition compares columns with values, by =, !=, <, <=, >, >=, IN, LIKE, BETWEEN, IS NULL, AND, OR, NOT"


class _Token(NamedTuple):
    kind: str  # text, quoted, number, word, mark, end
    written: str
    position: int


def parse_condition(text: str, columns: pa.Schema) -> str:
    """Read a condition and write it anew in Lance's SQL.

    Args:
        text: the condition.
        columns: names and types of the columns; `vector` is none of them.

    Raises:
        UsageError: it is no condition of the grammar, names a column that is not there, compares what cannot be
            compared, or is too long, too deep or of too many parts. The message says what is allowed.

    Example:
        >>> parse_condition("year > 2019.5 and not 'a' in texts", store_schema)
        "(`year` > 2019 AND NOT (array_has(`texts`, 'a')))"
    """
    if len(text) > MAX_LENGTH:
        raise UsageError(f"the condition has {len(text)} characters; {MAX_LENGTH} are allowed")
    return _Parser(text, columns).read()


class _Parser:
    """Reads one condition. NOT is carried down to the comparisons: a nest of NOTs takes Lance exponential time."""

    def __init__(self, text: str, columns: pa.Schema) -> None:
        self.text = text
        self.columns = columns
        self.tokens = list(self._tokens())
        self.next = 0
        self.parts = 0

    def read(self) -> str:
        sql = self._any(False, 0)
        if self._token.kind != "end":
            self._fail("expected AND, OR or the end")
        return sql

    def _any(self, negated: bool, depth: int) -> str:
        parts = [self._all(negated, depth)]
        while self._takes("OR"):
            parts.append(self._all(negated, depth))
        return _joined(parts, "AND" if negated else "OR")

    def _all(self, negated: bool, depth: int) -> str:
        parts = [self._one(negated, depth)]
        while self._takes("AND"):
            parts.append(self._one(negated, depth))
        return _joined(parts, "OR" if negated else "AND")

    def _one(self, negated: bool, depth: int) -> str:
        while self._takes("NOT"):
            negated = not negated
        if depth > MAX_DEPTH:
            self._fail(f"brackets may be {MAX_DEPTH} deep")
        if self._takes("("):
            inner = self._any(negated, depth + 1)
            self._require(")")
            return inner
        return self._comparison(negated)

    def _comparison(self, negated: bool) -> str:
        left = self._operand()
        if self._takes("IS"):
            column, negation = self._column(left), "NOT " if self._takes("NOT") else ""
            flag = column.read_as(True)
            for word, asked in (("NULL", column), ("TRUE", flag), ("FALSE", flag)):
                if (word == "NULL" or flag.kind == "boolean") and self._takes(word):
                    return _turned(f"{asked.sql} IS {negation}{word}", negated)
            self._fail("expected NULL" + (", TRUE or FALSE" if flag.kind == "boolean" else ""))
        is_negated = self._takes("NOT")
        sql = self._ranged(left, negated != is_negated)
        if sql is not None:
            return sql
        if is_negated:
            self._fail("expected IN, LIKE or BETWEEN")
        operator = self._token.written
        if self._token.kind == "mark" and _SAME.get(operator, operator) in _FLIPPED:
            self.next += 1
            return _turned(self._compared(left, _SAME.get(operator, operator), self._operand()), negated)
        if isinstance(left, Column) and left.read_as(True).kind == "boolean":
            return _turned(left.read_as(True).sql, negated)
        self._fail("expected a comparison, such as = or LIKE")

    def _ranged(self, left: Column | Literal, negated: bool) -> str | None:
        """Read what follows the left side of IN, LIKE and BETWEEN; None if it is none of them."""
        if self._takes("IN"):
            if isinstance(left, Literal):
                return _turned(in_list(left, self._column(self._operand())), negated)
            self._require("(")
            values = [self._literal()]
            while self._takes(","):
                values.append(self._literal())
            self._require(")")
            return one_of(self._column(left), values, negated=negated)
        for word in ("LIKE", "ILIKE"):
            if self._takes(word):
                return _turned(like(self._column(left), self._literal(), word), negated)
        if self._takes("BETWEEN"):
            column, low = self._column(left), self._literal()
            self._require("AND")
            between = _joined([compared(column, ">=", low), compared(column, "<=", self._literal())], "AND")
            return _turned(between, negated)
        return None

    def _compared(self, left: Column | Literal, operator: str, right: Column | Literal) -> str:
        if isinstance(left, Column):
            return compared(left, operator, right)
        if isinstance(right, Column):
            return compared(right, _FLIPPED[operator], left)
        self._fail("one side must be a column; text stands in quotes, a column's name in none or in `backticks`")

    # Operands

    def _operand(self) -> Column | Literal:
        token = self._token
        is_name = token.kind == "quoted" or (token.kind == "word" and token.written.upper() not in _KEYWORDS)
        after = self.tokens[min(self.next + 1, len(self.tokens) - 1)]
        if not is_name or (token.written.upper() in ("DATE", "TIMESTAMP") and after.kind == "text"):
            return self._literal()
        if after.written == "(":
            self._fail("a condition takes no functions")
        self._count()
        names = [self._name()]
        while self._takes("."):
            names.append(self._name())
        return self._find(names)

    def _literal(self) -> Literal:
        self._count()
        begin, token = self._token.position, self._token
        sign = "-" if self._takes("-") else "" if not self._takes("+") else "+"
        kind, written, _ = token = self._token
        self.next += 1
        if kind == "number":
            if math.isinf(float(written)):
                self._fail("this number is too large", token)
            return Literal(Decimal(sign + written), self.text[begin : token.position + len(written)])
        if sign:
            self._fail("expected a number", token)
        if kind == "text":
            return Literal(_content(written), written)
        word = written.upper() if kind == "word" else ""
        if word in ("TRUE", "FALSE"):
            return Literal(word == "TRUE", written)
        if word in ("DATE", "TIMESTAMP") and self._token.kind == "text":
            quoted = self._token.written
            date = as_date(_content(quoted), only_day=word == "DATE")
            if date is None:
                self._fail("this is no date; expected DATE '2020-12-31' or TIMESTAMP '2020-12-31 23:59:00'")
            self.next += 1
            return Literal(date, f"{written} {quoted}")
        if word == "NULL":
            self._fail("nothing is equal to NULL; ask with IS NULL or IS NOT NULL", token)
        self._fail("expected a value: a number, a text in quotes, TRUE, FALSE or a date", token)

    def _name(self) -> str:
        token = self._token
        if token.kind not in ("word", "quoted"):
            self._fail("expected the name of a column")
        self.next += 1
        return token.written.strip("`")

    def _find(self, names: list[str]) -> Column:
        """Find a column, or a field of a structure; by a name of other case if there is only one."""
        fields = [field for field in self.columns if field.name != "vector"]
        found: list[str] = []
        kind = None
        for name in names:
            same = [f for f in fields if f.name == name] or [f for f in fields if f.name.lower() == name.lower()]
            if len(same) != 1 or "`" in same[0].name:
                inside = f"nothing, for {'.'.join(found)} has no fields"
                there = nearest_names(name, (field.name for field in fields)) or inside
                raise UsageError(f"the condition names {'.'.join(names)!r}, which is not there; there are: {there}")
            found.append(same[0].name)
            kind = same[0].type
            fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        assert kind is not None, "a column has a name"
        return Column(".".join(found), ".".join(f"`{name}`" for name in found), kind)

    # Tokens

    def _column(self, operand: Column | Literal) -> Column:
        if isinstance(operand, Column):
            return operand
        self._fail("expected a column's name, without quotes or in `backticks`")

    def _tokens(self) -> list[_Token]:
        found: list[_Token] = []
        position = 0
        while not found or found[-1].kind != "end":
            match = _TOKEN.match(self.text, position)
            if match is None:
                position += len(self.text[position:]) - len(self.text[position:].lstrip())
                is_open = self.text[position] in "'\"`"
                self._fail("this quote is not closed" if is_open else _GRAMMAR, _Token("", "", position))
            kind = str(match.lastgroup)
            found.append(_Token(kind, match[kind], match.start(kind)))
            position = match.end()
        return found

    @property
    def _token(self) -> _Token:
        return self.tokens[min(self.next, len(self.tokens) - 1)]

    def _takes(self, word: str) -> bool:
        takes = self._token.kind in ("word", "mark") and self._token.written.upper() == word
        self.next += takes
        return takes

    def _require(self, word: str) -> None:
        if not self._takes(word):
            self._fail(f"expected {word}")

    def _count(self) -> None:
        self.parts += 1
        if self.parts > MAX_PARTS:
            self._fail(f"it may have {MAX_PARTS} columns and values")

    def _fail(self, reason: str, token: _Token | None = None) -> NoReturn:
        position = (token or self._token).position
        shown = self.text[max(0, position - 30) : position] + "▸" + self.text[position : position + 30]
        there = nearest_names("", (name for name in self.columns.names if name != "vector"))
        raise UsageError(f"the condition cannot be read at {shown!r}: {reason}; there are: {there}")


def _turned(comparison: str, negated: bool) -> str:
    return f"NOT ({comparison})" if negated else comparison


def _joined(parts: list[str], word: str) -> str:
    """Join as a balanced tree: a chain would be as deep as it is long."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return f"({_joined(parts[:middle], word)} {word} {_joined(parts[middle:], word)})"


def _content(quoted: str) -> str:
    return quoted[1:-1].replace(quoted[0] * 2, quoted[0])
