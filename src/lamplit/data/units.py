"""A source that is read in parts: units of neighbouring tars, rows or files, each of which one process embeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path, PurePath

from lamplit.data.archives.tar_members import CutError, read_members
from lamplit.data.pairs import Pairs
from lamplit.errors import PairsError, UsageError

UNIT_ROWS = 250_000  # at most, if nobody asks for another number
_FEWEST_ROWS = 1024
_UNITS = 64  # of a source that is not so large


@dataclass(frozen=True)
class Unit:
    """A part of a source that one process embeds.

    Attributes:
        name: hash of what it is made of and of `salt`; a name for a file.
        start: its first place.
        stop: the place behind its last one.
    """

    name: str
    start: int
    stop: int


def plan_units(pairs: Pairs, *, salt: str = "", rows: int | None = None) -> list[Unit]:
    """Divide a source into units; whoever plans the same source with the same numbers gets the same ones.

    Args:
        pairs: what to divide.
        salt: text that the names depend on, such as the tower's fingerprint.
        rows: about how many rows a unit has; by default a 64th of all, at least 1,024 and at most 250,000.

    Raises:
        UsageError: the source cannot be read in parts.
        PairsError: it cannot be read, or the ids of a part depend on the parts before.
    """
    if pairs.parts is None:
        raise UsageError(
            f"{pairs.source} cannot be divided among processes: it is read in one stream. Embed it in one process, or "
            "give files: a folder, tars or a table whose images are all paths or all in cells"
        )
    parts = pairs.parts
    rows = rows or max(_FEWEST_ROWS, min(UNIT_ROWS, parts.num_rows // _UNITS))
    starts = [*parts.cuts(rows), parts.size]
    columns = f"{salt}\0{pairs.image_column}\0{','.join(pairs.text_columns)}"
    return [
        Unit(_digest([columns, *parts.names(start, stop)]), start, stop)
        for start, stop in pairwise(starts)
        if stop > start
    ]


def pairs_of(pairs: Pairs, unit: Unit) -> Pairs:
    """Return the pairs of one unit; notes and problems go to the same lists."""
    assert pairs.parts is not None, "it has been divided"
    return replace(pairs, count=None, read=partial(pairs.parts.read, unit.start, unit.stop), parts=None)


def even_cuts(size: int, rows: int) -> range:
    """Cut places that are rows."""
    return range(0, size, rows)


def tar_cuts(files: Sequence[Path], sample_bytes: int, rows: int) -> list[int]:
    """Cut between tars, so that those of a part have about so many samples, by the bytes of some of them.

    Raises:
        PairsError: two tars begin with samples of one key, so the second's ids depend on the first.
    """
    _require_own_keys(files)
    ends = accumulate(file.stat().st_size for file in files)
    part_bytes = rows * sample_bytes
    cuts, cut_at = [0], 0
    for place, end in enumerate(ends, start=1):
        if end - cut_at >= part_bytes and place < len(files):
            cuts.append(place)
            cut_at = end
    return cuts


def file_names(files: Iterable[Path], *more: int) -> Iterator[str]:
    """Name files with their sizes, and numbers."""
    yield from map(str, more)
    for file in files:
        yield f"{file} {file.stat().st_size}"


def _require_own_keys(files: Sequence[Path]) -> None:
    first: dict[str, Path] = {}
    for file in files:
        member = next((member for member in _members(file) if not PurePath(member).name.startswith(".")), None)
        if member is None:
            continue
        key = str(PurePath(member).parent / PurePath(member).name.partition(".")[0])
        if key in first:
            raise PairsError(
                f"{first[key].name} and {file.name} both begin with a sample {key}: its id depends on the tars before "
                "it, so these cannot be divided among processes; embed them in one, or those of each numbering apart"
            )
        first[key] = file


def _members(file: Path) -> Iterator[str]:
    try:
        yield from (member.name for member in read_members(file))
    except CutError:  # whoever reads it reports that
        return


def _digest(names: Iterable[str]) -> str:
    digest = blake2b(digest_size=12)
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
