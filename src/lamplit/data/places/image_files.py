"""Files of images: which they are by their names, how folders are searched for them, and how they are read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lamplit.data.places.image_places import RowPlace, TarPlace, parse_place, require_few_bytes
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


def read_image(name: str, most: int = MAX_IMAGE_BYTES) -> bytes:
    """Read an encoded image by its path in a store: a file, an object, or a place in a tar or a table.

    A name that is that of a file is a file, whatever is in it. A store names a file whose name is not UTF-8 in another
    way.

    Args:
        name: a path, an address, or what `image_places` writes.
        most: bytes of the largest image that is read.

    Raises:
        ImageError: it cannot be read, or is larger.

    Example:
        >>> len(read_image("/data/shard-000.tar#bytes=1536-22015,name=owl.jpg"))
        20480
    """
    try:
        if place := _place_of(name):
            # Here, because it needs pyarrow, and workers that read files do without.
            from lamplit.data.places.placed_images import read_placed

            try:
                return read_placed(place, most)
            except FileNotFoundError:
                if not is_remote(name):
                    raise  # else all of it may be the name of an object
        return _read_object(RemotePath(name), most) if is_remote(name) else _read_file(file_named(name), most)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("file not found") from error
    except OSError as error:
        raise ImageError(f"file cannot be read ({error.strerror})") from error
    except ValueError as error:  # a path that no system call takes
        raise ImageError("file not found") from error


def file_holding(path: str) -> str:
    """Return the file of an image: the tar or the table in which it lies, else what the path names.

    Example:
        >>> file_holding("/data/pairs.parquet#row=7,column=image"), file_holding("/data/owl.jpg")
        ('/data/pairs.parquet', '/data/owl.jpg')
    """
    place = _place_of(path)
    return path if place is None else place.file


def _place_of(path: str) -> TarPlace | RowPlace | None:
    """Return the place that a path names, unless all of it is the name of a file."""
    place = parse_place(path)
    if place is None or is_remote(path):  # there, to ask costs a request
        return place
    return None if os.path.lexists(file_named(path)) else place


def _read_file(name: str, most: int) -> bytes:
    status = os.stat(name)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ImageError("not a regular file")  # a pipe would be waited for
    require_few_bytes(status.st_size, most)
    with open(name, "rb", buffering=0) as file:
        return file.read()


def _read_object(address: RemotePath, most: int) -> bytes:
    start = address.read_start(_USUAL_BYTES)
    if len(start) < _USUAL_BYTES:
        require_few_bytes(len(start), most)
        return start
    require_few_bytes(address.stat().st_size, most)
    return address.read_bytes()


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
