"""Addresses in object storage, which read as paths do; fsspec reaches what is there."""

from __future__ import annotations

import io
import posixpath
import stat
from collections.abc import Iterator
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Self

from lamplit.errors import MissingExtraError, require
from lamplit.locations.object_errors import RemoteError, explained
from lamplit.locations.object_streams import ObjectStream

# What Lance and fsspec both read, with the package and the class that fsspec has for it.
_SYSTEMS = {
    "s3": ("s3fs", "S3FileSystem"),
    "gs": ("gcsfs", "GCSFileSystem"),
    "az": ("adlfs", "AzureBlobFileSystem"),
    "abfss": ("adlfs", "AzureBlobFileSystem"),
}


def is_remote(name: object) -> bool:
    """Tell whether this is an address in object storage.

    Example:
        >>> is_remote("s3://bucket/pairs.parquet"), is_remote("photos/")
        (True, False)
    """
    return str(name).partition("://")[0] in _SYSTEMS and "://" in str(name)


class _Status(NamedTuple):
    """What `stat` tells of an address, as of a path."""

    st_size: int
    st_mode: int = stat.S_IFREG


class RemotePath:
    """An address in object storage, with methods of `pathlib.Path`; two are equal if they are written alike.

    What fails, fails with an OSError: a FileNotFoundError if there is nothing, else a `RemoteError`.
    """

    def __init__(self, address: str, size: int | None = None) -> None:
        self.scheme, _, below = address.partition("://")
        self._pure = PurePosixPath(posixpath.normpath(below.strip("/")) if below.strip("/") else "")
        self._size = size  # if it is known

    # Names

    def __str__(self) -> str:
        return f"{self.scheme}://{self._pure}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: object) -> Self:
        if is_remote(name):
            return type(self)(str(name))
        if str(name).startswith("/"):  # from the bucket on
            return type(self)(f"{self.scheme}://{self._pure.parts[0]}{name}")
        return self._with(self._pure / str(name))

    @property
    def name(self) -> str:
        """The last part."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """What is behind the last dot, with it."""
        return self._pure.suffix

    @property
    def parent(self) -> Self:
        """The folder."""
        return self._with(self._pure.parent)

    def with_suffix(self, suffix: str) -> Self:
        """Return the address with another suffix."""
        return self._with(self._pure.with_suffix(suffix))

    def with_name(self, name: str) -> Self:
        """Return the address with another last part."""
        return self._with(self._pure.with_name(name))

    def as_posix(self) -> str:
        """Return the address."""
        return str(self)

    def absolute(self) -> Self:
        """Return the address; none is relative."""
        return self

    def is_relative_to(self, other: object) -> bool:
        """Tell whether it is below another one."""
        return f"{self}/".startswith(f"{other}/")

    def relative_to(self, other: object) -> PurePosixPath:
        """Return the part below another address."""
        return PurePosixPath(str(self)).relative_to(PurePosixPath(str(other)))

    def _with(self, pure: PurePosixPath) -> Self:
        return type(self)(f"{self.scheme}://{pure}")

    # Reading

    def stat(self) -> _Status:
        """Ask for the size."""
        if self._size is None:
            with explained():
                found = self.system().info(str(self._pure))
            if found["type"] == "directory":
                return _Status(0, stat.S_IFDIR)
            self._size = int(found["size"])
        return _Status(self._size)

    def is_file(self) -> bool:
        """Tell whether there is an object of this name."""
        try:
            return stat.S_ISREG(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Tell whether there are objects below this name."""
        try:
            return stat.S_ISDIR(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def exists(self) -> bool:
        """Tell whether there is an object of this name, or below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[Self]:
        """Yield what is directly below; nothing if nothing is there."""
        try:
            with explained():
                found = self.system().ls(str(self._pure), detail=True)
        except FileNotFoundError:
            return
        for each in found:
            if (name := each["name"].rstrip("/")) != str(self._pure):
                yield self._listed(name, each)

    def glob(self, pattern: str) -> list[Self]:
        """Return the files below that match a pattern; the address may be one, too."""
        with explained():
            found = self.system().glob(str(self._pure / pattern), detail=True)
        return [self._listed(name, each) for name, each in sorted(found.items()) if each["type"] == "file"]

    def below(self) -> list[PurePosixPath]:
        """List all files below, relative to this address; one request for each thousand."""
        with explained():
            found = self.system().find(str(self._pure))
        return [
            PurePosixPath(name).relative_to(self._pure)
            for name in found
            if not name.endswith("/") and name != str(self._pure)
        ]

    def open(self, mode: str = "rb") -> io.RawIOBase:
        """Open it to be read from anywhere, in growing pieces as long as it is read in one go."""
        assert mode == "rb", "addresses are read in bytes"
        with explained():
            return ObjectStream(self.system().open(str(self._pure), "rb", cache_type="none"))

    def read_bytes(self) -> bytes:
        """Read all of it."""
        with explained():
            return bytes(self.system().cat_file(str(self._pure)))

    def read_start(self, size: int) -> bytes:
        """Read the first bytes in one request: all of a smaller object."""
        try:
            with explained():
                return bytes(self.system().cat_file(str(self._pure), start=0, end=size))
        except RemoteError:  # nothing is a range of an empty object
            if self.stat().st_size:
                raise
            return b""

    def read_range(self, start: int, stop: int) -> bytes:
        """Read the bytes from `start` to `stop` in one request; fewer if the object ends before."""
        with explained():
            return bytes(self.system().cat_file(str(self._pure), start=start, end=stop))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read all of it as text."""
        return self.read_bytes().decode(encoding)

    # Writing small files

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: what is written makes its folders."""

    def write_bytes(self, content: bytes) -> None:
        """Write an object whole, in the place of one that is there."""
        with explained():
            self.system().pipe_file(str(self._pure), content)

    def write_new(self, content: bytes) -> bool:
        """Write an object unless there is one of its name, as one of several processes; tell whether it was written."""
        try:
            with explained():
                self.system().pipe_file(str(self._pure), content, mode="create")
        except FileExistsError:
            return self.read_bytes() == content  # an answer that was lost, and a second attempt
        return True

    def unlink(self, missing_ok: bool = True) -> None:
        """Delete an object, which may be missing."""
        assert missing_ok, "nobody is told"
        try:
            with explained():
                self.system().rm_file(str(self._pure))
        except FileNotFoundError:
            return

    def _listed(self, name: str, found: dict[str, Any]) -> Self:
        size = int(found["size"] or 0) if found["type"] == "file" else None
        return type(self)(f"{self.scheme}://{name}", size)

    def system(self) -> Any:
        """Return the file system of fsspec that reaches it.

        Raises:
            MissingExtraError: its package is not installed.
        """
        package, system = _SYSTEMS[self.scheme]
        if self.scheme == "s3":
            module = require("s3fs", "s3")
        else:
            try:
                module = import_module(package)
            except ModuleNotFoundError as error:
                raise MissingExtraError(package) from error
        # One for all addresses: fsspec keeps it. A listing is never kept, so that what others write is seen.
        return getattr(module, system)(use_listings_cache=False)
