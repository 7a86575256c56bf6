"""Where the bytes of an image lie inside a tar or a table, written behind the name of that file.

    /data/shard-000.tar#bytes=1536-22015,name=owl.jpg    the first byte and the last one, as HTTP counts them
    /data/pairs.parquet#row=1234,column=image            the row, counted from 0

The last `#` ends the name of the file: what follows it holds no further one, and no slash. What is a `#`, a slash, a
backslash, a percent sign or a control character there is written as %23 and so on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import quote, unquote

from lamplit.errors import ImageError
from lamplit.locations.addresses import is_remote

# What ends a path that leads into a file.
INSIDE = r"#(?:bytes=([0-9]{1,18})-([0-9]{1,18})(?:,name=([^#/\\]*))?|row=([0-9]{1,18}),column=([^#/\\]+))"
_PLACE = re.compile(f"(.+){INSIDE}", re.DOTALL)
_ESCAPED = re.compile(r"[%#/\\\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class TarPlace:
    """A file in an uncompressed tar.

    Attributes:
        file: the tar.
        first: its first byte there.
        last: its last byte there.
        name: the last part of its name, for people; the bytes are found without it.
    """

    file: str
    first: int
    last: int
    name: str = ""

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.file}#bytes={self.first}-{self.last}" + (f",name={_escape(self.name)}" if self.name else "")


@dataclass(frozen=True, slots=True)
class RowPlace:
    """A cell of a table.

    Attributes:
        file: the table, in a format whose rows can be read at random.
        row: its number in the file, from 0 on.
        column: of the images.
    """

    file: str
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}#row={self.row},column={_escape(self.column)}"


def parse_place(path: str) -> TarPlace | RowPlace | None:
    """Read the place that a path names; None if it names a file alone. Nothing is opened.

    Example:
        >>> parse_place("/data/shard-000.tar#bytes=1536-22015,name=owl.jpg")
        TarPlace(file='/data/shard-000.tar', first=1536, last=22015, name='owl.jpg')
        >>> parse_place("/data/owl #2.jpg")
    """
    found = _PLACE.fullmatch(path) if "#" in path else None
    if found is None:
        return None
    file, first, last, name, row, column = found.groups()
    if row is not None:
        return RowPlace(file, int(row), unquote(column))
    return TarPlace(file, int(first), int(last), unquote(name or ""))


def place_in_table(file: Path, row: int, column: str) -> str:
    """Write where the image of a row lies; "" if rows of such a file cannot be read at random.

    Example:
        >>> place_in_table(Path("/data/pairs.parquet"), 7, "image"), place_in_table(Path("/data/pairs.csv"), 7, "image")
        ('/data/pairs.parquet#row=7,column=image', '')
    """
    is_known = file.suffix.lower() == ".parquet" or (file.suffix.lower() == ".arrow" and not is_remote(file))
    return str(RowPlace(str(file), row, column)) if is_known else ""


def image_name(path: str) -> str:
    """Name an image for people, without its folder.

    Example:
        >>> image_name("/data/owl.jpg"), image_name("/data/pairs.parquet#row=7,column=image")
        ('owl.jpg', 'row 7 of pairs.parquet')
    """
    match parse_place(path):
        case TarPlace(file, first, last, name):
            inside = f"{name} in" if name else f"bytes {first}-{last} of"
            return f"{inside} {PurePath(file).name}"
        case RowPlace(file, row):
            return f"row {row} of {PurePath(file).name}"
    return PurePath(path).name


def require_few_bytes(size: int, most: int) -> None:
    """Refuse an image that is larger than a bound, before it is read.

    Raises:
        ImageError: it is.
    """
    if size > most:
        raise ImageError(f"{size / 2**20:,.0f} MiB, more than the bound of {most / 2**20:,.0f}")


def _escape(name: str) -> str:
    return _ESCAPED.sub(lambda found: quote(found[0], safe=""), name)
