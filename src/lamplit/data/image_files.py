"""Which files are images by their names, and the one way in which folders are searched for them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from lamplit.data.skipped import Skipped

# Those from .svgz on are listed so that they are skipped with a reason, rather than overlooked; .heic and .heif are
# read where pillow-heif is installed, .svg where resvg-py is.
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpf", ".jpx", ".avif", ".ico",
    ".heic", ".heif", ".hif", ".svg", ".svgz", ".jxl", ".psd", ".psb", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw",
))  # fmt: skip

MAX_IMAGE_BYTES = 2**31  # of an encoded image; compared before it is read


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


def _entries(folder: Path, visited: set[tuple[int, int]]) -> list[os.DirEntry[str]] | None:
    """List what is in a folder, by name and without hidden ones; None if it was visited before."""
    status = os.stat(folder)
    if (place := (status.st_dev, status.st_ino)) in visited:
        return None
    visited.add(place)
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
