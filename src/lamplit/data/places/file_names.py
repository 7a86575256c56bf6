"""Files under the names that tables give them: written on Windows, or in another normal form of Unicode."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path, PurePath
from unicodedata import normalize

from lamplit.locations.addresses import is_remote
from lamplit.locations.paths import path_of

_UNUSUAL = re.compile(r"\\|//|(^|/)\.(/|$)|/$|^$")  # what a path leaves out when it writes a name


class NameFinder:
    """Finds the files that the rows of a table name; it lists a folder at most once."""

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, str]] = {}

    def find(self, folder: Path, name: str) -> tuple[str, Path]:
        """Return the name with slashes, as it is everywhere, and the file; the file need not be there."""
        if is_remote(name):
            return name, path_of(name)
        if is_remote(folder):  # there, to ask costs a request, and a name is what was written
            return PurePath(name).as_posix() if _UNUSUAL.search(name) else name, folder / name
        if "\\" in name and os.sep == "/" and not (folder / name).exists():
            name = name.replace("\\", "/")
        file = folder / name
        if name.isascii() or file.exists():
            return PurePath(name).as_posix() if _UNUSUAL.search(name) else name, file
        found = Path(file.anchor)
        for part in file.parts[1:] if file.anchor else file.parts:
            exact = found / part
            found = exact if part.isascii() or exact.exists() else found / self._other_form(found, part)
        return PurePath(name).as_posix(), found

    def _other_form(self, folder: Path, part: str) -> str:
        """Name the file of a folder that is called `part` in the other normal form; `part` itself if there is none."""
        if folder not in self._listings:
            names = os.listdir(folder) if folder.is_dir() else []
            self._listings[folder] = {normalize("NFC", name): name for name in names if not name.isascii()}
        return self._listings[folder].get(normalize("NFC", part), part)


def place_of(name: str) -> str:
    """Return one spelling for all names of one file below a folder: slashes, no `./` or `..`, composed letters."""
    if is_remote(name):
        return name
    name = name.replace("\\", "/")
    if not name.isascii():
        name = normalize("NFC", name)
    return posixpath.normpath(name)
