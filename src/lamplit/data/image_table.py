"""Tables of one or several files: which columns hold what, where the images are, and one row for each image."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path, PurePath

from lamplit.data.columns import (
    TEXT_COLUMNS,
    Cells,
    ColumnNames,
    find_image_column,
    find_text_columns,
    image_cell,
    listed,
    metadata_cells,
    text_cells,
)
from lamplit.data.file_names import NameFinder, place_of
from lamplit.data.groups import Groups, ImageRow
from lamplit.data.readers import TableFile, open_table
from lamplit.data.skipped import BadRows, Skipped

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
        image: the column of images; "" if there is none.
        texts: the columns of texts; empty if there are none.
        count: number of images.
        notes: what a reader should know, in plain sentences.
        problems: rows that cannot be read.
    """

    def __init__(
        self, name: str, root: Path | None, files: Sequence[Path], wanted: ColumnNames, split: str | None = None
    ) -> None:
        self.problems: list[Skipped] = []
        self._files = [
            open_table(file, image_column=wanted.image, split=split, bad=BadRows(file, self.problems)) for file in files
        ]
        self.notes = [note for file in self._files for note in file.notes]
        first = list(islice(chain.from_iterable(file.rows() for file in self._files), NUM_FIRST_ROWS))
        self.image, self.texts, said = find_columns(name, first, wanted)
        self.notes += said
        self._names = NameFinder()
        kinds = {type(image_cell(row.get(self.image), self.image)) for row in first if row.get(self.image)}
        has_paths = wanted.need_images and kinds == {str}  # who needs no images counts rows
        self._folders = [self._find_folder(file) if has_paths else file.file.parent for file in self._files]
        self.root = root or _root_of(self._files[0].file.parent, self._folders[0])
        self._groups = Groups(self._keys()) if has_paths else None
        self.count = self._groups.count if self._groups else sum(file.count() for file in self._files)

    @property
    def is_grouped(self) -> bool:
        """Whether rows of one image are one; not if the cells hold images, or rows are counted."""
        return self._groups is not None

    def __iter__(self) -> Iterator[ImageRow]:
        if self._groups is None:
            return self._rows()
        return self._groups.merge(
            (self._key(row.id) if isinstance(row.image, Path) else 0, row) for row in self._rows()
        )

    def unnamed(self, files: Sequence[PurePath]) -> list[PurePath]:
        """Return those of some files below the root that no row names."""
        if self._groups is None:
            return []
        named = self._groups.named(self._key(file.as_posix()) for file in files)
        return [file for file, is_named in zip(files, named, strict=True) if not is_named]

    def _rows(self) -> Iterator[ImageRow]:
        number = 0
        for file, folder in zip(self._files, self._folders, strict=True):
            prefix = self._prefix(folder)
            for row in file.rows():
                yield image_row(row, self.image, self.texts, str(number), folder, prefix, self._names)
                number += 1

    def _keys(self) -> Iterator[int]:
        number = 0
        for file, folder in zip(self._files, self._folders, strict=True):
            prefix = self._prefix(folder)
            for cell in file.column(self.image):
                name = image_cell(cell, self.image)
                # An empty cell stands alone.
                yield self._key(posixpath.join(prefix, name)) if isinstance(name, str) else hash((number,))
                number += 1

    def _prefix(self, folder: Path) -> str:
        return PurePath(os.path.relpath(folder, self.root)).as_posix()

    def _key(self, name: str) -> int:
        """Hash the one spelling of a name that is relative to the root, or absolute; never 0."""
        return hash(place_of(name).removeprefix(f"{self.root.as_posix()}/")) or 1

    def _find_folder(self, file: TableFile) -> Path:
        """Find the folder that a table's paths are relative to: its own, or a usual one if the images are there."""
        parent = file.file.parent
        cells = islice(file.column(self.image), _NUM_TRIED)
        names = [name for cell in cells if isinstance(name := image_cell(cell, self.image), str)]
        of_split = re.findall(r"(?:train|val|test)\d*", file.file.stem)
        below = ["", *of_split, *_USUAL_FOLDERS, *(f"images/{split}" for split in of_split)]
        folders: list[Path] = [above / name for above in (parent, parent.parent) for name in below]
        for folder in folders:
            if any(self._names.find(folder, name)[1].is_file() for name in names):
                if folder != parent:
                    self.notes.append(f"the images of {file.file.name} are in {os.path.relpath(folder, parent)}")
                return folder
        return parent


def find_columns(name: str, rows: list[Cells], wanted: ColumnNames) -> tuple[str, tuple[str, ...], list[str]]:
    """Return the column of images, those of texts, and a note if there are none of texts.

    Raises:
        PairsError: there are no rows, or no column has a known name.
        UsageError: a wanted column does not exist.
    """
    image = find_image_column(name, rows, wanted.image, optional=not wanted.need_images)
    texts = find_text_columns(name, rows, wanted.text, [column for column in TEXT_COLUMNS if column != image])
    note = f"no column of texts is known in {name}, which has {listed(rows)}; name it with --text-column NAME"
    return image, texts, [] if texts else [note]


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
    image: Path | bytes
    name = number
    match image_cell(row.get(column), column):
        case str() as path:
            spelled, image = names.find(folder, path) if names else (path, folder / path)
            name = PurePath(prefix, spelled).as_posix()
        case content:
            image = content
    captions = tuple(dict.fromkeys(text_cells(row, texts)))
    return ImageRow(name, image, captions, metadata_cells(row, (column, *texts)))


def _root_of(parent: Path, folder: Path) -> Path:
    return parent if folder.is_relative_to(parent) else parent.parent
