"""Objects that are read as files, in pieces."""

from __future__ import annotations

import io
import os
from typing import Any

from lamplit.locations.object_errors import RemoteError, explained

_FIRST_BYTES, _MOST_BYTES = 2**17, 2**24  # that are asked for at once


class ObjectStream(io.RawIOBase):
    """An object that is read as a file: each read is whole, as a buffered file's is.

    Each piece that is asked for is twice as long as the one before while the reader goes straight on.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._size = file, int(file.size)
        self._position = self._begin = 0
        self._block = b""
        self._ahead = _FIRST_BYTES

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read from anywhere."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; return it."""
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence, self._size))
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as there are bytes; return how many these are."""
        view = memoryview(buffer).cast("B")
        wanted, done = min(len(view), max(0, self._size - self._position)), 0
        while done < wanted:
            at = self._position - self._begin
            if not 0 <= at < len(self._block):
                self._fetch(wanted - done)
                at = 0
            part = self._block[at : at + wanted - done]
            view[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def _fetch(self, size: int) -> None:
        goes_on = self._position == self._begin + len(self._block)
        self._ahead = min(2 * self._ahead, _MOST_BYTES) if goes_on else _FIRST_BYTES
        self._begin, self._block = self._position, b""
        with explained():
            self._file.seek(self._position)
            asked = min(max(size, self._ahead), self._size - self._position)
            self._block = self._file.read(asked)
        if len(self._block) < asked:
            raise RemoteError(f"{asked:,} bytes were asked for, and {len(self._block):,} came")
