"""Files: the user's cache, and writing whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil

TIMEOUT = 60.0  # seconds without a byte


def cache_folder() -> Path:
    """Return the folder of files that can be fetched or made again: $LAMPLIT_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("LAMPLIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lamplit"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file or a folder whole or not at all.

    Yields a path beside `target` to write to. When the block ends, it takes the place of `target`; when the block
    fails, it is removed and `target` stays as it was. A file is on the disk before it is renamed, and has the
    permissions of the user's umask, whatever library wrote it.

    Example:
        >>> with replacing(Path("report.json")) as partial:
        ...     partial.write_text("{}")
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        if not psutil.pid_exists(int(left.suffixes[-2][1:])):  # its process was killed
            _remove(left)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        if partial.is_file():
            _finish(partial)
        elif target.is_dir():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        _remove(partial)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def download(url: str, file: Path) -> None:
    """Fetch `url` into `file`, whole or not at all.

    Raises:
        OSError: it cannot be fetched, or the transfer broke off.
        http.client.HTTPException: the server breaks the protocol.
    """
    with replacing(file) as partial:
        with urlopen(url, timeout=TIMEOUT) as response, partial.open("wb") as out:  # noqa: S310 (only our own addresses)
            expected = response.length
            shutil.copyfileobj(response, out, 1 << 20)
        if expected is not None and partial.stat().st_size != expected:
            raise OSError(f"it broke off after {partial.stat().st_size} of {expected} bytes")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _finish(file: Path) -> None:
    probe = file.with_name(f"{file.name}.mode")
    probe.touch()  # with the permissions that new files of this user have
    shutil.copymode(probe, file)
    probe.unlink()
    with file.open("r+b") as written:  # Windows flushes only what is open for writing
        os.fsync(written.fileno())
