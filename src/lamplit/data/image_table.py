"""Tables of one or several files: which columns hold what, where the images are, and one row for each image."""

from __future__ import annotations

import os
import posixpath
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice, repeat
from pathlib import Path, PurePath
from typing import Any

from lamplit.data.groups import Groups, ImageRow
from lamplit.data.places.file_names import NameFinder, place_of
from lamplit.data.places.image_places import place_in_table
from lamplit.data.skipped import BadRows, Skipped
from lamplit.data.tables.columns import (
    TEXT_COLUMNS,
    CellError,
    Cells,
    ColumnNames,
    find_image_column,
    find_text_columns,
    image_cell,
    listed,
    metadata_cells,
    text_cells,
)
from lamplit.data.tables.readers import READ_ERRORS, TableFile, open_table
from lamplit.errors import PairsError, first_line
from lamplit.locations.addresses import is_remote
from lamplit.locations.object_errors import passes

# Rows looked at to find the columns: the first may lack one.
NUM_FIRST_ROWS = 100
# Where images are that are not beside the table that names them, relative to its folder or to the one above.
_USUAL_FOLDERS = (
    "images", "Images", "img", "imgs", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset",
)  # fmt: skip
_NUM_TRIED = 20


class Table:
    """The rows of some files, one for each image; iterating again reads them again, in the same order.

    Opening it reads the column of paths once, for a byte a row: so rows of one image are known, and few are held.

    Args:
        name: the source, for messages.
        root: the folder that ids are relative to; None for that of the first file, or the one above if the images are
            there.
        files: tables of any format, read one after the other.
        wanted: the columns that the caller names.
        split: which split to read of annotations that name one for each image.

    Attributes:
        root: the folder that ids are relative to.
        image: the column of images, of the first file if they differ; "" if there is none.
        texts: the columns of texts; empty if there are none.
        count: number of images.
        num_rows: number of rows of all files.
        has_steady_ids: whether the id of an image does not depend on the rows before its own.
        notes: what a reader should know, in plain sentences.
        problems: files and rows that cannot be read.
    """

    def __init__(
        self, name: str, root: Path | None, files: Sequence[Path], wanted: ColumnNames, split: str | None = None
    ) -> None:
        self.problems: list[Skipped] = []
        self._names = NameFinder()
        opened, first = _open(name, [BadRows(file, self.problems) for file in files], wanted, split)
        self.notes = [note for each in opened for note in each.table.notes]
        self._parts = self._find_columns(name, opened, first, wanted)
        self.image = self._parts[0].image
        self.texts = tuple(dict.fromkeys(column for part in self._parts for column in part.texts))
        kinds = {kind for part in self._parts for kind in _kinds(part, first[part.opened.names])}
        has_paths = wanted.need_images and kinds == {str}  # who needs no images counts rows
        if has_paths:
            self._parts = [replace(part, folder=self._find_folder(part)) for part in self._parts]
        self.root = root or _root_of(self._parts[0].folder_of_file, self._parts[0].folder)
        self._root_prefix = f"{self.root.as_posix()}/"
        self._groups = Groups(self._keys()) if has_paths else None
        if self._groups is None:
            for part in self._parts:
                part.num_rows = part.opened.table.count()
        self.num_rows = sum(part.num_rows for part in self._parts)
        self.count = self._groups.count if self._groups else self.num_rows
        self.has_steady_ids = has_paths or kinds <= {bytes}
        self.notes += [note for part in self._parts if (note := part.opened.bad.note())]

    @property
    def is_grouped(self) -> bool:
        """Whether rows of one image are one; not if the cells hold images, or rows are counted."""
        return self._groups is not None

    def __iter__(self) -> Iterator[ImageRow]:
        return self.read(0, None)

    def read(self, start: int, stop: int | None) -> Iterator[ImageRow]:
        """Yield the images whose last row is one of those from `start` to `stop`; of all files together."""
        if self._groups is None:
            return (row for row in self._rows(start, stop) if row is not None)
        first = start if stop is None else self._groups.first_row(start, stop)
        return self._groups.merge(
            self._rows(first, stop), lambda row: self._key(row.id) if isinstance(row.image, Path) else 0, start, stop
        )

    def files(self, start: int, stop: int) -> list[Path]:
        """List the files in which the rows from `start` to `stop` are."""
        ends = list(accumulate(part.num_rows for part in self._parts))
        return [part.opened.table.file for part in self._parts[bisect_right(ends, start) : bisect_left(ends, stop) + 1]]

    def unnamed(self, files: Sequence[PurePath]) -> list[PurePath]:
        """Return those of some files below the root that no row names."""
        if self._groups is None:
            return []
        named = self._groups.named(self._key(file.as_posix()) for file in files)
        return [file for file, is_named in zip(files, named, strict=True) if not is_named]

    def _find_columns(
        self, name: str, opened: list[_Opened], first: dict[frozenset[str], list[Cells]], wanted: ColumnNames
    ) -> list[_Part]:
        """Find the columns of each file, which may be named otherwise in another; a file without images is listed."""
        every = [row for rows in first.values() for row in rows]
        image, texts, said = find_columns(name, every, wanted)
        _require_cells(every, image, texts)
        self.notes += said
        if len(first) == 1:
            return [_Part(each, image, texts, each.table.file.parent) for each in opened]
        parts = []
        for each in opened:
            rows, file = first[each.names], each.table.file
            its_image, its_texts = image, texts
            if rows and not wanted.image:
                its_image = find_image_column(file.name, rows, None, optional=True)
            if rows and not wanted.text:
                its_texts = find_text_columns(file.name, rows, None, _text_candidates(its_image))
            if image and not its_image:
                each.bad.add_file(f"no column of images is known in it; it has {listed(rows)}")
                continue
            if texts and not its_texts:
                self.notes.append(_no_texts(file.name, rows))
            parts.append(_Part(each, its_image, its_texts, file.parent))
        return parts

    def _rows(self, start: int, stop: int | None) -> Iterator[ImageRow | None]:
        """Yield the rows; None in place of one that cannot be used, so that rows keep their numbers."""
        return islice(self._rows_from(start), None if stop is None else stop - start)

    def _rows_from(self, start: int) -> Iterator[ImageRow | None]:
        number = 0
        for part in self._parts:
            if number + part.num_rows <= start and part is not self._parts[-1]:
                number += part.num_rows
                continue
            first = max(0, start - number)
            number += first
            prefix = self._prefix(part.folder)
            for place, cells in enumerate(part.rows(first), start=first + 1):
                row = None
                try:
                    if cells is not None:
                        row = image_row(cells, part.image, part.texts, str(number), part.folder, prefix, self._names)
                        if part.image and isinstance(row.image, bytes):
                            row = row._replace(place=place_in_table(part.opened.table.file, place - 1, part.image))
                except CellError as error:
                    part.opened.bad.add(place, error.reason, unit="row")
                yield row
                number += 1

    def _keys(self) -> Iterator[int]:
        number = 0
        for part in self._parts:
            prefix = self._prefix(part.folder)
            for cell in part.cells():
                name = _path_cell(cell, part.image)
                # A cell without a path stands alone.
                yield self._key(name if is_remote(name) else posixpath.join(prefix, name)) if name else hash((number,))
                number += 1

    def _prefix(self, folder: Path) -> str:
        return PurePath(os.path.relpath(str(folder), str(self.root))).as_posix()

    def _key(self, name: str) -> int:
        """Hash the one spelling of a name that is relative to the root, or absolute; never 0."""
        return hash(place_of(name).removeprefix(self._root_prefix)) or 1

    def _find_folder(self, part: _Part) -> Path:
        """Find the folder that a table's paths are relative to: its own, or a usual one if the images are there."""
        file, parent = part.opened.table.file, part.folder
        names = [name for cell in islice(part.cells(), _NUM_TRIED) if (name := _path_cell(cell, part.image))]
        of_split = re.findall(r"(?:train|val|test)\d*", file.stem)
        below = ["", *of_split, *_USUAL_FOLDERS, *(f"images/{split}" for split in of_split)]
        folders: list[Path] = [above / name for above in (parent, parent.parent) for name in below]
        for folder in folders:
            if any(self._names.find(folder, name)[1].is_file() for name in names):
                if folder != parent:
                    self.notes.append(f"the images of {file.name} are in {os.path.relpath(str(folder), str(parent))}")
                return folder
        return parent


@dataclass(frozen=True)
class _Opened:
    """A file that can be read, the names of its columns, and where its bad rows are listed."""

    table: TableFile
    names: frozenset[str]
    bad: BadRows


@dataclass
class _Part:
    """A file of a table, with its columns, and the folder that its images are in."""

    opened: _Opened
    image: str
    texts: tuple[str, ...]
    folder: Path
    num_rows: int = 0  # that `cells` has read, or that the file is known to have

    @property
    def folder_of_file(self) -> Path:
        return self.opened.table.file.parent

    def rows(self, start: int = 0) -> Iterator[Cells | None]:
        """Yield the rows from `start` on; where the file is damaged, None for every row that is known to come."""
        count = start
        try:
            for row in self.opened.table.rows(start):
                yield row
                count += 1
        except READ_ERRORS as error:
            if passes(error):
                raise
            self.opened.bad.add_file(f"cut off or damaged ({first_line(error)}); rows read before that: {count:,}")
            yield from repeat(None, self.num_rows - count)

    def cells(self) -> Iterator[Any]:
        """Yield the cells of the column of images."""
        self.num_rows = 0
        try:
            for cell in self.opened.table.column(self.image):
                self.num_rows += 1
                yield cell
        except READ_ERRORS as error:
            if passes(error):
                raise
            reason = f"cut off or damaged ({first_line(error)}); rows read before that: {self.num_rows:,}"
            self.opened.bad.add_file(reason)


def _open(
    name: str, bad: list[BadRows], wanted: ColumnNames, split: str | None
) -> tuple[list[_Opened], dict[frozenset[str], list[Cells]]]:
    """Open files, and read the first rows of each kind; what cannot be read is listed, if another can.

    Raises:
        PairsError: none can be read.
    """
    opened: list[_Opened] = []
    first: dict[frozenset[str], list[Cells]] = {}
    errors = []
    for each in bad:
        try:
            table = open_table(each.file, image_column=wanted.image, split=split, bad=each)
            names = frozenset(table.names() if len(bad) > 1 else ())
            if names not in first:
                first[names] = list(islice(table.rows(), NUM_FIRST_ROWS))
        except READ_ERRORS as error:
            if passes(error):
                raise
            each.add_file(f"cannot be read ({first_line(error)})")
            errors.append(error)
            continue
        opened.append(_Opened(table, names, each))
    if errors and not opened:
        where = f"{name} cannot be read: {bad[0].file.name}" if len(bad) > 1 else f"{name} cannot be read"
        raise PairsError(f"{where}: {first_line(errors[0])}") from errors[0]
    return opened, first


def _require_cells(rows: list[Cells], image: str, texts: tuple[str, ...]) -> None:
    """Raise what is wrong with the first row if something is wrong with every one: the columns are others."""
    error = None
    for row in rows:
        try:
            image_cell(row.get(image), image)
            text_cells(row, texts)
        except CellError as wrong:
            error = error or wrong
        else:
            return
    if error:
        raise error


def _kinds(part: _Part, rows: list[Cells]) -> set[type]:
    """Return what the column of images holds: paths, bytes or both."""
    kinds: set[type] = set()
    for row in rows:
        with suppress(CellError):
            if row.get(part.image):
                kinds.add(type(image_cell(row[part.image], part.image)))
    return kinds


def _path_cell(cell: Any, column: str) -> str:
    """Return the path in a cell; "" if it has none."""
    try:
        name = image_cell(cell, column)
    except CellError:
        return ""
    return name if isinstance(name, str) else ""


def find_columns(name: str, rows: list[Cells], wanted: ColumnNames) -> tuple[str, tuple[str, ...], list[str]]:
    """Return the column of images, those of texts, and a note if there are none of texts.

    Raises:
        PairsError: there are no rows, or no column has a known name.
        UsageError: a wanted column does not exist.
    """
    image = find_image_column(name, rows, wanted.image, optional=not wanted.need_images)
    texts = find_text_columns(name, rows, wanted.text, _text_candidates(image))
    return image, texts, [] if texts else [_no_texts(name, rows)]


def _text_candidates(image: str) -> list[str]:
    return [column for column in TEXT_COLUMNS if column != image]


def _no_texts(name: str, rows: list[Cells]) -> str:
    return f"no column of texts is known in {name}, which has {listed(rows)}; name it with --text-column NAME"


def image_row(
    row: Cells,
    column: str,
    texts: tuple[str, ...],
    number: str,
    folder: Path = Path(),
    prefix: str = ".",
    names: NameFinder | None = None,
) -> ImageRow:
    """Read the cells of one row.

    Args:
        row: the cells by column.
        column: of the image.
        texts: the columns of texts.
        number: of the row, which is its id if the image has no path.
        folder: that paths are relative to.
        prefix: the folder's place below the root, which ids begin with.
        names: finds files under other spellings.
    """
    cell = image_cell(row.get(column), column)
    image: Path | bytes
    if isinstance(cell, bytes):
        name, image = number, cell
    else:
        spelled, image = names.find(folder, cell) if names else (cell, folder / cell)
        name = spelled if names and (prefix == "." or is_remote(spelled)) else PurePath(prefix, spelled).as_posix()
    captions = tuple(dict.fromkeys(text_cells(row, texts)))
    return ImageRow(name, image, captions, metadata_cells(row, (column, *texts)))


def _root_of(parent: Path, folder: Path) -> Path:
    return parent if folder.is_relative_to(parent) else parent.parent
