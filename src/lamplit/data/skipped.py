"""What a source holds and cannot be used: one record with its reason, never an exception."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Skipped:
    """An image, or a part of a source, that cannot be used, as listed in `skipped.jsonl`.

    Attributes:
        id: of the image in its source; the name of a shard or of a member that could not be read.
        path: of the image's file; the id again if the image has no file of its own.
        reason: why it cannot be used, as one sentence.
    """

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class BadRows:
    """Rows of a table that cannot be read: each is listed once, however often its file is read.

    Attributes:
        file: the table.
        problems: where they are listed.
    """

    file: Path
    problems: list[Skipped] = field(default_factory=list)
    _lines: set[int] = field(default_factory=set)

    def add(self, line: int, reason: str) -> None:
        """List the row that begins or ends in a line of the file."""
        if line not in self._lines:
            self._lines.add(line)
            self.problems.append(Skipped(f"{self.file.name}, line {line}", str(self.file), reason))
