"""Files that stand beside an image and say something about it: .txt, .json and the like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

from lamplit.data.json_text import parse_json
from lamplit.data.skipped import Skipped
from lamplit.data.tables.columns import TEXT_COLUMNS, Cells, strip, text_cells
from lamplit.data.tables.encodings import decode_text

TEXT_ENDINGS = frozenset(("txt", "text", "caption", "title", "transcript", "cls", "id"))
# A larger .json beside an image is another kind of file: outlines of objects, or an image once more as text.
MAX_JSON_BYTES = 2**18
MAX_TEXT_BYTES = 2**24


def last_ending(name: str) -> str:
    """Return what is behind the last dot of a name, in lower case; all of it if there is no dot.

    Example:
        >>> last_ending("input.JPG")
        'jpg'
    """
    return name.rpartition(".")[2].lower()


class Sidecars:
    """Reads sidecars, and fills two lists: what to know of them, each kind once, and those that cannot be read.

    Args:
        notes: plain sentences.
        problems: files that cannot be read; their images are used without them.
        folder: that `there` is relative to.
        there: all files of a folder, where it takes long to ask for each.
    """

    def __init__(
        self,
        notes: list[str],
        problems: list[Skipped],
        folder: Path | None = None,
        there: frozenset[str] | None = None,
    ) -> None:
        self._notes, self._problems, self._folder, self._there = notes, problems, folder, there

    def cells(self, name: str, content: bytes, *, file: str) -> Cells:
        """Return what a sidecar holds, as cells by name.

        The object in a `.json` gives its own keys; another value in `captions.json` gives a cell `captions`. What is
        not JSON stays the text that it is.

        Args:
            name: its ending, which is the cell's name.
            content: its bytes.
            file: its own name, for notes.
        """
        text, encoding = decode_text(content, file)
        if kind := encoding.note_of_many:
            self.note(kind, file)
        if last_ending(name) != "json":
            return {name: text}
        try:
            value = parse_json(text)
        except ValueError:  # one bad sidecar among a million ends nothing
            return {name: text}
        if isinstance(value, dict):
            return value
        return {name.rpartition(".")[0] or name: value}

    def read_beside(self, image: Path) -> tuple[tuple[str, ...], Cells]:
        """Return the texts and the further cells that stand beside an image's file.

        Texts are the lines of the same-named `.txt` (or `.TXT`, as it often lies beside `a.JPG`); without one, the
        first usual column of texts in the same-named `.json`. The rest of that object is metadata.
        """
        captions = self._read(image, ".txt", MAX_TEXT_BYTES, is_said=True)
        table = self._read(image, ".json", MAX_JSON_BYTES, is_said=False)
        texts = strip(captions["txt"].splitlines()) if captions is not None else ()
        if table is None:
            return texts, {}
        if captions is None and (name := next((name for name in TEXT_COLUMNS if _is_text(table.get(name))), None)):
            return text_cells({name: table.pop(name)}, (name,)), table
        return texts, table

    def note(self, kind: str, example: str) -> None:
        """Note something of a kind, unless that is noted already."""
        if not any(note.startswith(kind) for note in self._notes):
            self._notes.append(f"{kind}, such as {example}")

    def _is_there(self, file: Path) -> bool:
        if self._there is None or self._folder is None:
            return file.is_file()
        return str(file.relative_to(self._folder)) in self._there

    def _read(self, image: Path, suffix: str, most: int, *, is_said: bool) -> Cells | None:
        """Read a file of at most so many bytes; None if there is none. `is_said`: a larger one is a problem."""
        file = image.with_suffix(suffix)
        try:
            found = next(filter(self._is_there, _names_beside(image, suffix)), None)
            if found is None:
                return None
            file = found
            if (size := file.stat().st_size) <= most:
                return self.cells(suffix[1:], file.read_bytes(), file=file.name)
            reason = f"{size / 2**20:,.0f} MiB, more than the bound of {most / 2**20:,.0f}" if is_said else ""
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason and not any(problem.path == str(file) for problem in self._problems):
            self._problems.append(Skipped(file.name, str(file), reason))
        return None


def _names_beside(image: Path, suffix: str) -> Iterator[Path]:
    """Yield what a file beside an image may be called, where capitals or the form of Unicode may differ."""
    yield image.with_suffix(suffix)
    yield image.with_suffix(suffix.upper())
    if not image.stem.isascii():
        yield from (image.with_name(normalize(form, image.stem) + suffix) for form in ("NFC", "NFD"))


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
