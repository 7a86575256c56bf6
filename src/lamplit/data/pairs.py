"""Pairs of images and texts, one at a time: what every source gives, and how it is read in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamplit.data.skipped import Skipped
from lamplit.data.tables.readers import READ_ERRORS
from lamplit.data.valid_text import valid_id, valid_text, valid_value
from lamplit.errors import PairsError, first_line


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its texts.

    Two are equal if all is equal but where their images lie.

    Attributes:
        id: stable between runs: the path as the source writes it, the tar's key, or the row's number.
        image: the file to read, or the encoded image itself.
        texts: empty for an image that is only to be searched.
        metadata: every other column by its name, as values that JSON can hold.
        not_kept: the columns in which a further row of the same image has another value, once for every lost value.
        place: where the bytes of an encoded image lie in a tar or a table that can be read at random, as
            `image_places` writes it; else empty.
    """

    id: str
    image: Path | bytes
    texts: tuple[str, ...]
    metadata: dict[str, Any]
    not_kept: tuple[str, ...] = ()
    place: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        """What a store calls the place of the image: its file, or where it lies in one; else the id."""
        if isinstance(self.image, bytes):
            return valid_id(self.place) if self.place else self.id
        return valid_id(str(self.image))


@dataclass(frozen=True)
class Parts:
    """How to read a source in parts, from one of its places to another: places of files, of rows or of tars.

    Attributes:
        size: number of places.
        num_rows: number of rows, about.
        cuts: gives for a number of rows the places at which parts of about so many begin, ascending, from 0 on.
        names: gives what a part is made of, as text: another part of any source has other names.
        read: begins to read a part; the ids are those that its pairs have in the whole source.
    """

    size: int
    num_rows: int
    cuts: Callable[[int], Sequence[int]]
    names: Callable[[int, int], Iterable[str]]
    read: Callable[[int, int], Iterator[Pair]]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one source; iterating again reads them again, in the same order.

    Attributes:
        source: what `lamplit.read_pairs` was given.
        count: number of pairs; None if it cannot be known without reading everything.
        image_column: the column of images or their paths; None if images are files of their own.
        text_columns: the columns of texts; empty if texts are files of their own, or there are none.
        read: begins to read the pairs; iterating calls it.
        root: the folder that ids and files are under; None for archives and the hub.
        notes: what a reader of the source should know, in plain sentences, each once; more may come while it is read.
        problems: parts that could not be used, such as a shard that was cut off; they come while it is read.
        parts: how to read it in parts; None if it is one stream.

    Example:
        >>> pairs = lamplit.read_pairs("photos/")
        >>> [pair.texts for pair in pairs]
    """

    source: str
    count: int | None
    image_column: str | None
    text_columns: tuple[str, ...]
    read: Callable[[], Iterator[Pair]] = field(repr=False, compare=False)
    root: Path | None = None
    notes: list[str] = field(default_factory=list, compare=False)
    problems: list[Skipped] = field(default_factory=list, compare=False)
    parts: Parts | None = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[Pair]:
        try:
            yield from map(_valid, self.read())
        except READ_ERRORS as error:
            raise unreadable(self.source, error) from error


def _valid(pair: Pair) -> Pair:
    """Make the id, the texts and the metadata valid Unicode; the image's file keeps its name and opens."""
    if pair.id.isascii() and not pair.metadata and all(map(str.isascii, pair.texts)):
        return pair  # nothing to do, most often
    return Pair(
        valid_id(pair.id),
        pair.image,
        tuple(map(valid_text, pair.texts)),
        {valid_text(name): valid_value(value) for name, value in pair.metadata.items()},
        pair.not_kept,
        pair.place,
    )


def unreadable(name: str, error: Exception) -> PairsError:
    """Make the error of a source that raised one of `READ_ERRORS`."""
    return PairsError(f"{name} cannot be read: {first_line(error)}")
