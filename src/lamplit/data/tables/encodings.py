"""In which encoding a text file is written, and how it is opened, compressed or not."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import numpy as np

_BLOCK_BYTES = 2**20
# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_SAID = {"utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32": "UTF-32"}
_SAID |= {"latin-1": "Latin-1", "cp1252": "Windows-1252 (Latin-1)"}
_NO_CP1252 = bytes((0x81, 0x8D, 0x8F, 0x90, 0x9D))  # bytes that stand for nothing there


@dataclass(frozen=True)
class Encoding:
    """How to decode a file.

    Attributes:
        name: as Python knows it.
        errors: what becomes of bytes that cannot be decoded: `strict` or `replace`.
        note: what a reader should know; empty for plain UTF-8.
    """

    name: str = "utf-8-sig"
    errors: str = "strict"
    note: str = ""

    @property
    def note_of_many(self) -> str:
        """What a reader should know of many small texts that are decoded so; empty for what is certain."""
        if self.errors == "replace":
            return "bytes of texts that are not UTF-8 become U+FFFD"
        is_guess = self.name in ("latin-1", "cp1252")
        return f"texts that are not UTF-8 are read as {_SAID[self.name]}" if is_guess else ""


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes; one that ends in `.gz` is unpacked on the way."""
    with file.open("rb") as raw:
        if file.suffix.lower() != ".gz":
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield cast(BinaryIO, unpacked)


@contextmanager
def open_text(file: Path, encoding: Encoding) -> Iterator[TextIO]:
    """Open a file to read its text, with its line ends as they are."""
    with open_bytes(file) as raw, io.TextIOWrapper(raw, encoding.name, encoding.errors, newline="") as text:
        yield text


def find_encoding(file: Path) -> Encoding:
    """Find how a file of text is encoded, reading it to its end in blocks.

    A byte order mark decides; then zeros where UTF-16 has them. What is not UTF-8 is read as Windows-1252 or Latin-1,
    as Excel writes it in Western Europe; but if most characters beyond ASCII are UTF-8, the file is UTF-8 with damage.
    """
    with open_bytes(file) as raw:
        return _find(raw, file.name)


def decode_text(content: bytes, name: str) -> tuple[str, Encoding]:
    """Decode a text that is in memory, encoded as `find_encoding` finds it; the name is for the note.

    Example:
        >>> decode_text("Käse".encode("latin-1"), "a.txt")[0]
        'Käse'
    """
    if b"\0" not in content:
        with suppress(UnicodeDecodeError):
            return content.decode("utf-8-sig"), Encoding()
    encoding = _find(io.BytesIO(content), name)
    # A text that was cut in the middle of a character of two bytes is read up to there.
    errors = "replace" if encoding.name.startswith("utf") else encoding.errors
    return content.decode(encoding.name, errors), encoding


def _find(raw: BinaryIO, name: str) -> Encoding:
    start = raw.read(_BLOCK_BYTES)
    found = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "") or _without_mark(start)
    if found != "utf-8-sig" and found:
        return Encoding(found, "strict", f"{name} is read as {_SAID[found]}")
    num_wrong, num_beyond, has_undefined = _count_wrong(start, raw)
    if not num_wrong:
        return Encoding()
    if num_beyond - num_wrong > 2 * num_wrong:
        said = f"{num_wrong:,} bytes of {name} are not UTF-8 and become U+FFFD"
        if num_wrong == 1:
            said = f"1 byte of {name} is not UTF-8 and becomes U+FFFD"
        return Encoding("utf-8-sig", "replace", said)
    latin = "latin-1" if has_undefined else "cp1252"
    said = f"{name} is not UTF-8 and is read as {_SAID[latin]}; save it as UTF-8 if that is wrong"
    return Encoding(latin, "strict", said)


def _without_mark(start: bytes) -> str:
    """Tell UTF-16 without a mark: of text in Latin script, every second byte is zero."""
    units = np.frombuffer(start[: len(start) // 2 * 2][:4096], np.uint8).reshape(-1, 2)
    if len(units) < 2:
        return ""
    first, second = (units == 0).mean(axis=0)
    if second > 0.5 and first < 0.1:
        return "utf-16-le"
    return "utf-16-be" if first > 0.5 and second < 0.1 else ""


def _count_wrong(block: bytes, rest: BinaryIO) -> tuple[int, int, bool]:
    """Count the places that are not UTF-8 and the bytes beyond ASCII; tell whether some byte is not Windows-1252."""
    num_wrong = num_beyond = 0
    has_undefined = False
    left = b""
    while block or left:
        is_last = not block
        if block.isascii() and not left:
            block = rest.read(_BLOCK_BYTES)
            continue
        num_beyond += int((np.frombuffer(block, np.uint8) >= 0x80).sum())
        has_undefined = has_undefined or any(byte in block for byte in _NO_CP1252)
        data, left = left + block, b""
        if not is_last:
            data, left = _cut(data)
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            num_wrong += data.decode("utf-8", "replace").count("\ufffd") - data.count("\ufffd".encode())
        block = b"" if is_last else rest.read(_BLOCK_BYTES)
    return num_wrong, num_beyond, has_undefined


def _cut(data: bytes) -> tuple[bytes, bytes]:
    """Cut a character that goes on in the next block off the end of this one."""
    for length in (1, 2, 3):
        byte = data[-length] if length <= len(data) else 0
        if byte >= 0xC0:  # the first byte of a character
            return data[:-length], data[-length:]
        if byte < 0x80:
            break
    return data, b""
