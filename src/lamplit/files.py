"""Files: the user's cache, and writing whole or not at all."""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from pathlib import Path
from urllib.request import urlopen

import psutil

from lamplit.errors import UsageError

_ADDRESS = re.compile(r"[a-z][a-z0-9]+:$")  # a drive of Windows has one letter
TIMEOUT = 60.0  # seconds without a byte
_LEFT_ALONE = 86_400  # seconds, after which nobody writes any more to what lies there


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
    partial = _beside(target)
    try:
        yield partial
        _settle(partial)
        if partial.is_dir() and target.is_dir():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        _remove(partial)


@contextmanager
def replacing_parts(folder: Path, last: str, remove: Sequence[str] = ()) -> Iterator[Path]:
    """Write several files or folders of a folder, of which `last` says that they belong together.

    Yields an empty folder to write them to. When the block ends, each takes its place in `folder`: `last` is removed
    first and comes back last. So a process that is killed meanwhile leaves no `last`, and never a mixture of old and
    new under it. When the block fails, `folder` stays as it was.

    Args:
        folder: the folder; it may be new.
        last: the file that says that they belong together.
        remove: names of files and folders that do not belong to the new ones; they go while `last` is away.

    Example:
        >>> with replacing_parts(Path("model"), "config.json") as partial:
        ...     (partial / "weights").write_bytes(b"...")
        ...     (partial / "config.json").write_text("{}")
    """
    partial = _beside(folder / last)
    try:
        partial.mkdir()
        yield partial
        _settle(partial)
        (folder / last).unlink(missing_ok=True)
        for name in remove:
            _remove(folder / name)
        for part in sorted(partial.iterdir(), key=lambda part: part.name == last):
            target = folder / part.name
            if part.is_dir() and target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
    finally:
        _remove(partial)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def link_or_copy(file: Path, target: Path) -> None:
    """Give a file a second name, which takes no space; copy it if the disk is another, or knows no such links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


@contextmanager
def safetensors_errors(file: str | Path) -> Iterator[None]:
    """Turn what safetensors raises when the system refuses to write `file` into the system's own error.

    Raises:
        OSError: the disk is full, or the file may not be written.
    """
    from safetensors import SafetensorError  # a search writes none

    try:
        yield
    except SafetensorError as error:  # its text is all that says which error of the system it was
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(file)) from error


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


def give_permissions(file: Path) -> None:
    """Give a file the permissions that new files of this user have, whatever library wrote it."""
    probe = file.with_name(f".{os.urandom(8).hex()}.mode")  # short, for the file may be a draft with a long name
    probe.touch()
    shutil.copymode(probe, file)
    probe.unlink()


def _beside(target: Path) -> Path:
    """Return a path beside `target` to write to, and remove what processes that were killed left there.

    Raises:
        UsageError: the path was made of an address such as `s3://bucket/key`.
    """
    if _ADDRESS.match(target.parts[0] if target.parts else ""):
        raise UsageError(f"{target} is an address, and this is written on the disk of this machine; give a path")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        if _is_left(left):
            _remove(left)
    return _draft_of(target)


def _draft_of(target: Path) -> Path:
    """Return a path beside `target` that no other process takes, on whatever machine it runs."""
    return target.with_name(f".{target.name}.{_machine()}.{os.getpid()}.{os.urandom(4).hex()}.partial")


def _is_left(draft: Path) -> bool:
    """Tell whether nobody writes to a draft any more: its process has ended, or it is of yesterday."""
    *_, machine, process, _, _ = draft.name.rsplit(".", 4)
    if machine == _machine() and process.isdigit():
        return not psutil.pid_exists(int(process))
    try:
        return time.time() - draft.stat().st_mtime > _LEFT_ALONE
    except FileNotFoundError:  # it was finished meanwhile
        return False


@cache
def _machine() -> str:
    """Name what numbers of processes belong to: this machine, or a container on it."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        space = 0
    return blake2b(f"{platform.node()} {space}".encode(), digest_size=4).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Give a file, or all files of a folder, the user's permissions, and wait until they are on the disk."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        give_permissions(file)
        with file.open("r+b") as written:  # Windows flushes only what is open for writing
            os.fsync(written.fileno())
