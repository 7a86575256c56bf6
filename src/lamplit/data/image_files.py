"""Files of images: which they are by their names, how folders are searched for them, and how they are read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lamplit.data.skipped import Skipped
from lamplit.data.valid_text import file_named
from lamplit.errors import ImageError
from lamplit.locations.addresses import RemotePath, is_remote

# Those from .svgz on are listed so that they are skipped with a reason, rather than overlooked; .heic and .heif are
# read where pillow-heif is installed, .svg where resvg-py is.
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpf", ".jpx", ".avif", ".ico",
    ".heic", ".heif", ".hif", ".svg", ".svgz", ".jxl", ".psd", ".psb", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw",
))  # fmt: skip

MAX_IMAGE_BYTES = 2**31  # of an encoded image; compared before it is read
_USUAL_BYTES = 2**22  # of one; so many are asked for at once


@dataclass
class Walk:
    """The files below a folder.

    Attributes:
        files: relative to the folder, sorted, without hidden ones.
        problems: folders that cannot be read, and links that lead nowhere.
        notes: what was not searched twice, in plain sentences.
    """

    files: list[PurePath] = field(default_factory=list)
    problems: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[PurePath]:
        """Those of the files whose names are names of images."""
        return [file for file in self.files if is_image(file.name)]


def is_image(name: str) -> bool:
    """Tell whether a file's name is that of an image.

    Example:
        >>> is_image("a.JPG"), is_image("a.mp4")
        (True, False)
    """
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_lance(folder: Path) -> bool:
    """Tell whether a folder is a table that Lance wrote, such as a store: nothing in it is a file of its own."""
    versions = folder / "_versions"
    return versions.is_dir() and any(file.suffix == ".manifest" for file in versions.iterdir())


def walk(folder: Path, *, most: int | None = None) -> Walk:
    """Search a folder and all below it; links to folders are followed, and no folder is read twice.

    Stores and other tables of Lance are left alone: Lance keeps `.arrow` and `.json` files in them.

    With `most`, no further folder is read as soon as so many files are found.

    Folders come before links, so that a file has the name of its own folder wherever that is below `folder` too.

    Example:
        >>> [str(file) for file in walk(Path("photos")).images]
        ['2023/cat.jpg', 'dog.png']
    """
    if is_remote(folder):
        return _walk_objects(folder)
    found = Walk()
    visited: set[tuple[int, int]] = set()
    waiting = [PurePath()]
    links: list[PurePath] = []
    while (waiting or links) and (most is None or len(found.files) < most):
        if not waiting:
            waiting.append(links.pop(0))
        below = waiting.pop()
        try:
            entries = [] if is_lance(folder / below) else _entries(folder / below, visited)
        except OSError as error:
            reason = f"folder cannot be read ({error.strerror})"
            found.problems.append(Skipped(below.as_posix(), str(folder / below), reason))
            continue
        if entries is None:
            found.notes.append(f"{below.as_posix()} is a link to a folder that is read already")
            continue
        for entry in entries:
            file = below / entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else waiting).append(file)
            elif is_image(entry.name) or not entry.is_symlink() or os.path.exists(entry.path):
                found.files.append(file)  # a broken link that is named as an image is skipped when it is its turn
            else:
                reason = "a link that leads nowhere"
                found.problems.append(Skipped(file.as_posix(), str(folder / file), reason))
    found.files.sort()
    return found


def read_image_file(name: str) -> bytes:
    """Read the file or the object of an encoded image; a store names a file whose name is not UTF-8 in another way.

    Raises:
        ImageError: it cannot be read, or is larger than any image.
    """
    try:
        if is_remote(name):
            return _read_object(RemotePath(name))
        name = file_named(name)
        status = os.stat(name)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ImageError("not a regular file")  # a pipe would be waited for
        _require_few_bytes(status.st_size)
        with open(name, "rb", buffering=0) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("file not found") from error
    except OSError as error:
        raise ImageError(f"file cannot be read ({error.strerror})") from error
    except ValueError as error:  # a path that no system call takes
        raise ImageError("file not found") from error


def _read_object(address: RemotePath) -> bytes:
    start = address.read_start(_USUAL_BYTES)
    if len(start) < _USUAL_BYTES:
        return start
    _require_few_bytes(address.stat().st_size)
    return address.read_bytes()


def _require_few_bytes(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ImageError(f"{size / 2**20:,.0f} MiB, more than the bound of {MAX_IMAGE_BYTES / 2**20:,.0f}")


def _walk_objects(folder: Any) -> Walk:
    """List what is below a prefix: names of objects, among which are no links."""
    files = [file for file in folder.below() if not any(part.startswith(".") for part in file.parts)]
    tables = {file.parent.parent for file in files if file.suffix == ".manifest" and file.parent.name == "_versions"}
    kept = [file for file in files if tables.isdisjoint(file.parents)] if tables else files
    return Walk(sorted(map(PurePath, kept)))


def _entries(folder: Path, visited: set[tuple[int, int]]) -> list[os.DirEntry[str]] | None:
    """List what is in a folder, by name and without hidden ones; None if it was visited before."""
    status = os.stat(folder)
    if (place := (status.st_dev, status.st_ino)) in visited:
        return None
    visited.add(place)
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
