"""The files in a tar, read in one pass and in bounded memory; a tar that is damaged says where."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import IO, Any, Self, cast

from lamplit.errors import first_line
from lamplit.locations.object_errors import passes

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_DAMAGE = (OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError, tarfile.TarError)
# Headers before the one of a file: a long name, or further values.
_EXTRAS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_MAX_EXTRA_BYTES = 2**20


def is_tar(file: PurePath) -> bool:
    """Tell whether a file's name is that of a tar, compressed or not.

    Example:
        >>> is_tar(Path("shards/000.tar.gz"))
        True
    """
    return file.name.lower().endswith(TAR_SUFFIXES)


class CutError(Exception):
    """A tar cannot be read from here on; the text is the reason.

    Attributes:
        member: the name of the file that the damage goes through; "" if it is between two.
    """

    def __init__(self, reason: str, member: str = "") -> None:
        super().__init__(reason)
        self.member = member


class TarMember:
    """A file in a tar, to be read before the next one is asked for.

    Attributes:
        name: its path in the tar.
        size: in bytes, as it will be read.
        is_link: it has no content of its own.
        start: its first byte in the tar; None if it does not lie there in one piece, because the tar is compressed.
    """

    def __init__(self, archive: tarfile.TarFile, header: tarfile.TarInfo, *, is_packed: bool) -> None:
        self.name = header.name.removeprefix("./")
        self.size = header.size
        self.start = None if is_packed or header.issparse() else header.offset_data
        self.is_link = not header.isfile()
        self._archive, self._header = archive, header

    def read(self) -> bytes:
        """Read all of it.

        Raises:
            CutError: the tar ends in it, or is damaged there.
        """
        try:
            return cast("IO[bytes]", self._archive.extractfile(self._header)).read()
        except _DAMAGE as error:
            if passes(error):
                raise
            raise CutError(_reason(error), self.name) from error


def read_members(file: Path) -> Iterator[TarMember]:
    """Yield the files of a tar, without folders; links too.

    Raises:
        CutError: while iterating, where the tar is damaged, or at its end if that is not marked as tars mark it.
        RemoteError: it lies in object storage, which cannot be reached any more.
    """
    try:
        with (
            _open_stream(file) as (stream, is_packed),
            tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as archive,
        ):
            while (header := archive.next()) is not None:
                cast("Any", archive).members.clear()  # tarfile would keep every header
                if not header.isdir():
                    yield TarMember(archive, header, is_packed=is_packed)
            while rest := stream.read(2**16):
                if rest.count(0) < len(rest):
                    raise CutError("more data is behind the tar's end, as if several were one file")
    except _DAMAGE as error:
        if passes(error):
            raise
        raise CutError(_reason(error)) from error


class _Header(tarfile.TarInfo):
    """A header that tarfile refuses where it would take damage for the end, or read without a bound."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if not buf:
            raise CutError("its end is not marked: it was cut off, or its writer was not closed")
        if buf.count(0) == tarfile.BLOCKSIZE:
            return super().frombuf(buf, encoding, errors)  # raises what tarfile takes for the end
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0 or (header.type in _EXTRAS and header.size > _MAX_EXTRA_BYTES):
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes")
        return header


@contextmanager
def _open_stream(file: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """Open a file to be read as it was before it was compressed, whatever its name says; tell whether it was."""
    with file.open("rb") as opened:
        start = opened.read(6)
        opened.seek(0)
        with _unpacked(opened, start, file) as stream:
            yield stream, stream is not opened


def _unpacked(opened: IO[bytes], start: bytes, file: Path) -> IO[bytes]:
    if start.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.open(opened))
    if start.startswith(b"BZh"):
        return cast("IO[bytes]", bz2.open(opened))
    if start.startswith(b"\xfd7zXZ"):
        return cast("IO[bytes]", lzma.open(opened))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        if find_spec("compression") is None:  # new in Python 3.14
            raise CutError(f"compressed by Zstandard, which this Python does not read; type: zstd -d {file}")
        zstd: Any = import_module("compression.zstd")
        return cast("IO[bytes]", zstd.open(opened))
    return opened


def _reason(error: Exception) -> str:
    return f"cut off or damaged ({first_line(error)})"
