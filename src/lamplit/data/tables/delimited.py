"""Rows of CSV and TSV, whatever separates their cells: commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from lamplit.data.skipped import BadRows
from lamplit.data.tables.columns import IMAGE_COLUMNS, Cells
from lamplit.data.tables.encodings import Encoding, find_encoding, open_text

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_USUAL = {".csv": ",", ".tsv": "\t"}
# A quote that opens a cell of tabs or bars and is not closed within so many lines is a plain character.
_MAX_CELL_LINES = 100
_UNNAMED = "Unnamed: "
_MAX_CELL = 2**24  # characters; Python's own limit is 131,072, which a long caption exceeds


@dataclass(frozen=True)
class DelimitedFile:
    """A file of delimited cells, its first row the names of the columns.

    Attributes:
        file: where it is; `.gz` is unpacked.
        encoding: how its text is encoded.
        delimiter: the character between two cells.
        skips_space: cells begin after the spaces that follow a delimiter, as in the header.
        start: number of lines before the header.
        notes: what a reader should know of it, in plain sentences.
        bad: where rows are listed that cannot be read, and counted that are short; all others are yielded.
    """

    file: Path
    encoding: Encoding
    delimiter: str
    skips_space: bool
    start: int
    notes: tuple[str, ...]
    bad: BadRows

    @classmethod
    def open(
        cls, file: Path, suffix: str, image_column: str | None = None, bad: BadRows | None = None
    ) -> DelimitedFile:
        """Find the encoding of a file, and from its header what separates its cells.

        Args:
            file: where it is.
            suffix: `.csv` or `.tsv`, which says what usually does.
            image_column: name of a column that the header has.
            bad: where to list rows that cannot be read.
        """
        encoding = find_encoding(file)
        with open_text(file, encoding) as lines:
            start, header = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))
            if match := re.fullmatch(r'"?sep=(.)"?', header.strip("\r\n")):  # Excel's own word about it
                delimiter, start = match[1], start + 1
                header = next(lines, "")
            else:
                delimiter = _find_delimiter(header, _USUAL[suffix], image_column)
        notes = [encoding.note] if encoding.note else []
        if delimiter != _USUAL[suffix]:
            notes.append(f"{file.name} is separated by {_DELIMITERS.get(delimiter, delimiter)}")
        names = _split(header, delimiter)
        skips_space = len(names) > 1 and all(name.startswith(" ") for name in names[1:])
        return cls(file, encoding, delimiter, skips_space, start, tuple(notes), bad or BadRows(file))

    def names(self) -> list[str]:
        """List the columns.

        Raises:
            ValueError: they have no distinct names.
        """
        names, _ = next(self._cells(), ([], []))
        return names

    def rows(self, start: int = 0) -> Iterator[Cells]:
        """Yield the rows from `start` on. Every cell stays the text that it is: "007" is not 7, and "NA" is not None.

        Raises:
            ValueError: the columns have no distinct names.
        """
        for names, cells in islice(self._cells(), start, None):
            yield dict.fromkeys(names, "") | dict(zip(names, cells, strict=False))

    def column(self, name: str) -> Iterator[str]:
        """Yield the cells of one column.

        Raises:
            ValueError: as `rows`.
        """
        place = -1
        for names, cells in self._cells():
            place = names.index(name) if place < 0 and name in names else place
            yield cells[place] if 0 <= place < len(cells) else ""

    def count(self) -> int:
        """Count the rows."""
        return sum(1 for _ in self._cells())

    def _cells(self) -> Iterator[tuple[list[str], list[str]]]:
        with open_text(self.file, self.encoding) as opened:
            lines = self._lenient(opened) if self.delimiter in "\t|" else self._strict(opened)
            _, header = next(lines, (0, []))
            # As pandas names them.
            names = [column.strip() or f"{_UNNAMED}{index}" for index, column in enumerate(header)]
            require_distinct(names)
            for number, cells in lines:
                if len(cells) > len(names):
                    self.bad.add(number, f"expected {len(names)} cells, as in the header, and found {len(cells)}")
                    continue
                if any(not name.startswith(_UNNAMED) for name in names[len(cells) :]):
                    self.bad.add_short(number)
                yield names, cells

    def _strict(self, opened: TextIO) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of the line on which a row ends, and its cells; blank lines are left out."""
        has_ended = False

        def until_end(lines: Iterable[str]) -> Iterator[str]:
            nonlocal has_ended
            yield from lines
            has_ended = True

        csv.field_size_limit(_MAX_CELL)  # of the process
        lines = until_end(islice(opened, self.start, None))
        reader = csv.reader(lines, delimiter=self.delimiter, skipinitialspace=self.skips_space)
        start = self.start + 1
        try:
            for cells in reader:
                if has_ended:  # the reader wanted another line to complete this row
                    self.bad.add(start, "a quote in the row that begins here is never closed; the rest is not read")
                    return
                if cells and not (len(cells) == 1 and cells[0].isspace()):
                    yield self.start + reader.line_num, cells
                start = self.start + reader.line_num + 1
        except csv.Error as error:
            self.bad.add(self.start + reader.line_num, f"this is not a row ({error}); the rest is not read")

    def _lenient(self, opened: TextIO) -> Iterator[tuple[int, list[str]]]:
        """Yield what `_strict` does of cells between tabs or bars, where a quote is mostly a plain character.

        It quotes a cell only if it opens one and is closed at the end of one.
        """
        waiting: deque[str] = deque()
        number = self.start
        width = 0
        rest = islice(opened, self.start, None)
        while line := waiting.popleft() if waiting else next(rest, ""):
            number += 1
            if line.isspace() and self.delimiter not in line:  # else it is a row of empty cells
                continue
            cells = None
            if '"' in line:
                waiting.extend(islice(rest, _MAX_CELL_LINES - len(waiting)))
                cells, num_lines = self._quoted(line, waiting, width)
                for _ in range(num_lines - 1):
                    waiting.popleft()
                number += num_lines - 1
            cells = self._plain(line) if cells is None else cells
            width = width or len(cells)
            yield number, cells

    def _plain(self, line: str) -> list[str]:
        cells = line.rstrip("\r\n").split(self.delimiter)
        return [cell.lstrip(" ") for cell in cells] if self.skips_space else cells

    def _quoted(self, line: str, following: Iterable[str], width: int) -> tuple[list[str] | None, int]:
        """Read a row whose cells may be quoted, and count its lines; None and 1 if its quotes are not such."""
        used: list[str] = []

        def taken() -> Iterator[str]:
            for each in chain([line], following):
                used.append(each)
                yield each

        csv.field_size_limit(_MAX_CELL)
        reader = csv.reader(taken(), delimiter=self.delimiter, skipinitialspace=self.skips_space, strict=True)
        try:
            cells = next(reader)
        except csv.Error:
            return None, 1
        fits = not width or len(cells) == width
        # Lines that are rows by themselves are no lines of one cell.
        if len(used) > 1 and (not fits or all(len(self._plain(each)) == width for each in used)):
            return None, 1
        return cells, len(used)


def require_distinct(names: list[str]) -> None:
    """Refuse columns of one name.

    Raises:
        ValueError: two have one.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")


def _find_delimiter(header: str, usual: str, image_column: str | None) -> str:
    known = {*IMAGE_COLUMNS, (image_column or IMAGE_COLUMNS[0]).casefold()}
    found = {delimiter: _split(header, delimiter) for delimiter in (usual, *_DELIMITERS)}
    several = {delimiter: names for delimiter, names in found.items() if len(names) > 1}
    for delimiter, names in several.items():
        if any(name.strip().casefold() in known for name in names):
            return delimiter
    return next(iter(several), usual)


def _split(header: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([header.rstrip("\r\n")], delimiter=delimiter), [])
    except csv.Error:
        return []
