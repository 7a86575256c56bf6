"""Parts of a large store: what is derived from a part stays as it is when the store grows.

Lance never merges a fragment that is full. The full ones, in the order of the table, make parts of as many as the
binary digits of their number say (eleven: eight, two and one), so a store that grows makes few parts anew, and there
are few. All other fragments are one more part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

FULL = 1 << 20  # rows; Lance merges fragments with fewer


@dataclass(frozen=True)
class Part:
    """Some fragments of a table.

    Attributes:
        fragments: Lance's.
        digest: of these: any change to their rows changes it.
        size: number of rows.
    """

    fragments: Sequence[Any]
    digest: str
    size: int

    def __len__(self) -> int:
        """Count the rows."""
        return self.size

    @classmethod
    def of(cls, fragments: Sequence[Any]) -> Part:
        """Describe some fragments."""
        said = [
            (each.fragment_id, [file.path for file in each.data_files()], str(each.deletion_file()))
            for each in fragments
        ]
        return cls(
            fragments, blake2b(repr(sorted(said)).encode(), digest_size=8).hexdigest(), sum(map(_size, fragments))
        )


def split(fragments: Sequence[Any]) -> list[Part]:
    """Divide the fragments of a table into parts; a table without rows is one."""
    some = [each for each in fragments if _size(each)]
    full = [each for each in some if each.physical_rows >= FULL]
    parts, start = [], 0
    for power in reversed(range(len(full).bit_length())):
        if len(full) >> power & 1:
            parts.append(Part.of(full[start : start + (1 << power)]))
            start += 1 << power
    rest = [each for each in some if each.physical_rows < FULL]
    return [*parts, Part.of(rest)] if rest or not parts else parts


def positions(fragments: Sequence[Any], part: Part) -> list[range]:
    """Return where in a table of `fragments` the rows of a part are, in the order of the part's fragments."""
    begins, begin = {}, 0
    for each in fragments:
        begins[each.fragment_id] = range(begin, begin := begin + _size(each))
    return [begins[each.fragment_id] for each in part.fragments]


def _size(fragment: Any) -> int:
    return int(fragment.physical_rows - fragment.num_deletions)
