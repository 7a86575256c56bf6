"""What a source holds and cannot be used: one record with its reason, never an exception."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lamplit.data.valid_text import valid_id


@dataclass(frozen=True)
class Skipped:
    """An image, or a part of a source, that cannot be used, as listed in `skipped.jsonl`.

    All three are valid Unicode: bytes of a name that are not UTF-8 have a backslash form.

    Attributes:
        id: of the image in its source; the name of a shard or of a member that could not be read.
        path: of the image's file, or where it lies in one; the id again if that is not known.
        reason: why it cannot be used, as one sentence.
    """

    id: str
    path: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("id", "path", "reason"):
            object.__setattr__(self, name, valid_id(getattr(self, name)))


@dataclass
class BadRows:
    """Rows of a table that cannot be read, or not in full: each counts once, however often its file is read.

    Attributes:
        file: the table.
        problems: where rows that cannot be read are listed.
        num_short: number of rows with fewer cells than the header.
    """

    file: Path
    problems: list[Skipped] = field(default_factory=list)
    num_short: int = 0
    _listed: set[tuple[str, int]] = field(default_factory=set)
    _last_short: int = 0  # lines come in their order

    def add(self, number: int, reason: str, *, unit: str = "line") -> None:
        """List the row that begins or ends in a line of the file; or the one of that number, if the unit is `row`."""
        if (unit, number) not in self._listed:
            self._listed.add((unit, number))
            self.problems.append(Skipped(f"{self.file.name}, {unit} {number}", str(self.file), reason))

    def add_file(self, reason: str) -> None:
        """List the file, which cannot be read, or not to its end."""
        if ("file", 0) not in self._listed:
            self._listed.add(("file", 0))
            self.problems.append(Skipped(self.file.name, str(self.file), reason))

    def add_short(self, line: int) -> None:
        """Count the row that begins or ends in a line of the file, and whose last cells are missing."""
        if line > self._last_short:
            self._last_short = line
            self.num_short += 1

    def note(self) -> str:
        """Say how many rows are short; empty if none is."""
        if not self.num_short:
            return ""
        subject = "1 row" if self.num_short == 1 else f"{self.num_short:,} rows"
        verb = "has" if self.num_short == 1 else "have"
        return f"{subject} of {self.file.name} {verb} fewer cells than the header; the missing ones are empty"
