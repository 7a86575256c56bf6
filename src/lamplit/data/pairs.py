"""Pairs of images and texts, read from anywhere, one at a time; nothing is decoded here."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from lamplit.data.columns import (
    TEXT_COLUMNS,
    Cells,
    ColumnNames,
    find_image_column,
    find_text_columns,
    image_cell,
    listed,
    metadata_cells,
    strip,
    text_cells,
)
from lamplit.data.hub import HubRows
from lamplit.data.readers import TABLE_SUFFIXES, count_rows, table_rows, tar_samples
from lamplit.errors import PairsError, UsageError, first_line, kind_of

# SVG and HEIC are listed so that they are reported as skipped, rather than overlooked.
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".ico", ".svg", ".heic", ".heif",
))  # fmt: skip
READ_ERRORS = (OSError, ValueError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException)
# Rows looked at to find the columns: the first may lack one.
NUM_FIRST_ROWS = 100


@dataclass(frozen=True)
class Pair:
    """One image and its texts.

    Attributes:
        id: stable between runs: the path as the source writes it, the tar's key, or the row's number.
        image: the file to read, or the encoded image itself.
        texts: empty for an image that is only to be searched.
        metadata: every other column by its name, as values that JSON can hold.
    """

    id: str
    image: Path | bytes
    texts: tuple[str, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one source; iterating again reads them again, in the same order.

    Attributes:
        source: what `lamplit.read_pairs` was given.
        count: number of pairs; None if it cannot be known without reading everything.
        image_column: the column of images or their paths; None if images are files of their own.
        text_columns: the columns of texts; empty if texts are files of their own, or there are none.
        read: begins to read the pairs; iterating calls it.
        root: the folder that ids and files are under; None for archives and the hub.

    Example:
        >>> pairs = lamplit.read_pairs("photos/")
        >>> [pair.texts for pair in pairs]
    """

    source: str
    count: int | None
    image_column: str | None
    text_columns: tuple[str, ...]
    read: Callable[[], Iterator[Pair]] = field(repr=False, compare=False)
    root: Path | None = None

    def __iter__(self) -> Iterator[Pair]:
        try:
            yield from self.read()
        except READ_ERRORS as error:
            raise unreadable(self.source, error) from error


def read_pairs(
    source: str | Path,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    split: str = "train",
    need_images: bool = True,
) -> Pairs:
    """Open images with their texts, reading no more than the first rows.

    Args:
        source: a CSV, TSV, JSONL or Parquet file; a folder of images, with same-named `.txt` files (one
            caption a line), a `metadata.csv|jsonl|parquet` with a `file_name` column, or no text at all; a
            webdataset tar, or a folder of them; a glob or brace form of files (`shards/a-{000..099}.tar`);
            or the id of a data set on the Hugging Face hub (`owner/name`).
        image_column: the column of images or their paths; by default found by its name.
        text_column: the column of texts, or several with commas between; by default found by its name. If there is
            none, no texts are read.
        split: of a data set on the hub; files have none.
        need_images: refuse a table without a column of images; else its pairs have `b""` for theirs.

    Raises:
        PairsError: there is nothing, or it cannot be read.
        UsageError: a named column does not exist.
    """
    if not isinstance(source, str | Path):
        raise UsageError(f"source is {kind_of(source)}; give a folder or a file of pairs")
    name = str(source)
    path = Path(name).expanduser()
    wanted = ColumnNames(image_column, text_column, need_images)
    try:
        if path.is_dir():
            return _open_folder(name, path.absolute(), wanted)
        if files := _expand(str(path)):
            return _open_files(name, files, wanted)
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix.lower() not in (
            *TABLE_SUFFIXES,
            ".tar",
        ):
            return _open_hub(name, wanted, split)
    except READ_ERRORS as error:
        raise unreadable(name, error) from error
    raise PairsError(
        f"{name} does not exist; give a folder of images, a {', '.join(TABLE_SUFFIXES)} or .tar file, "
        "or the id of a data set on the Hugging Face hub (owner/name)"
    )


def _open_folder(name: str, folder: Path, wanted: ColumnNames) -> Pairs:
    files = _walk(folder)
    tables = [file for file in files if file.name in ("metadata.csv", "metadata.jsonl", "metadata.parquet")]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    shards = [file for file in files if file.suffix.lower() in (".tar", ".parquet")]
    if tables:
        return _open_tables(name, folder, [folder / table for table in tables], wanted)
    if shards and not images:
        return _open_files(name, [folder / shard for shard in shards], wanted)
    if not images:
        raise PairsError(
            f"{name} holds no images; expected JPEG, PNG, WEBP and so on, with same-named .txt files for "
            "their captions or a metadata.csv with a file_name column, or webdataset tars"
        )
    if wanted.image or wanted.text:
        raise UsageError(
            f"{name} has no table, so it has no columns: texts come from .txt files beside the images; "
            "leave out --image-column and --text-column, or add a metadata.csv with a file_name column"
        )
    return Pairs(name, len(images), None, (), lambda: (_image(folder, file) for file in images), folder)


def _open_files(name: str, files: list[Path], wanted: ColumnNames) -> Pairs:
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".tar"}:
        return _open_tars(name, files, wanted)
    if len(suffixes) == 1 and suffixes <= set(TABLE_SUFFIXES):
        return _open_tables(name, files[0].parent, files, wanted)
    raise PairsError(
        f"{name} ends in {' and '.join(sorted(suffixes)) or 'nothing'}; expected files of one kind out of "
        f"{', '.join(TABLE_SUFFIXES)} and .tar, or a folder of images"
    )


def _open_tables(name: str, root: Path, files: list[Path], wanted: ColumnNames) -> Pairs:
    first = list(islice(chain.from_iterable(map(table_rows, files)), NUM_FIRST_ROWS))
    image, texts = _find_columns(name, first, wanted)
    counts = [count_rows(file) for file in files]

    def read() -> Iterator[Pair]:
        # Ids are relative to the source; a table deeper in it names paths relative to itself.
        rows = ((row, file.parent) for file in files for row in table_rows(file))
        seen: dict[str, int] = {}
        for number, (row, folder) in enumerate(rows):
            prefix = PurePath(os.path.relpath(folder, root))
            yield _pair(row, image, texts, folder, prefix, str(number), seen)

    count = None if None in counts else sum(count or 0 for count in counts)
    return Pairs(name, count, image or None, texts, read, root)


def _open_hub(name: str, wanted: ColumnNames, split: str) -> Pairs:
    try:
        rows = HubRows(name, split)
        first = list(islice(rows, 1))
    except READ_ERRORS as error:
        raise PairsError(
            f"{name} is not a file or folder here, and the Hugging Face hub does not have it: {first_line(error)}; "
            "check the name, the split and the network, or `hf auth login` for a private data set"
        ) from error
    image, texts = _find_columns(name, first, wanted)

    def read() -> Iterator[Pair]:
        seen: dict[str, int] = {}
        for number, row in enumerate(rows):
            yield _pair(row, image, texts, Path(), PurePath(), str(number), seen)

    return Pairs(name, rows.count, image or None, texts, read)


def _open_tars(name: str, files: list[Path], wanted: ColumnNames) -> Pairs:
    def samples() -> Iterator[tuple[str, Cells]]:
        return chain.from_iterable(map(tar_samples, files))

    first = [fields for _, fields in islice(samples(), NUM_FIRST_ROWS)]
    if not any(_image_field(fields, wanted.image) for fields in first):
        raise PairsError(
            f"{name} holds no images in its first samples; it has {listed(first)}; expected files such as "
            "000.jpg with 000.txt or 000.json (--image-column NAME names another ending)"
        )
    # By webdataset's own custom the caption is the .txt; a .json often repeats it.
    texts = find_text_columns(name, first, wanted.text, ("txt", *TEXT_COLUMNS))

    def read() -> Iterator[Pair]:
        seen: dict[str, int] = {}
        for key, fields in samples():
            ending = _image_field(fields, wanted.image)
            image = fields.pop(ending) if ending else b""
            yield Pair(_unique(key, seen), image, text_cells(fields, texts), metadata_cells(fields, texts))

    return Pairs(name, None, wanted.image, texts, read)


def _find_columns(name: str, rows: list[Cells], wanted: ColumnNames) -> tuple[str, tuple[str, ...]]:
    image = find_image_column(name, rows, wanted.image, optional=not wanted.need_images)
    return image, find_text_columns(name, rows, wanted.text, [c for c in TEXT_COLUMNS if c != image])


def _pair(
    row: Cells,
    column: str,
    texts: tuple[str, ...],
    folder: Path,
    prefix: PurePath,
    name: str,
    seen: dict[str, int],
) -> Pair:
    image: Path | bytes
    match image_cell(row.get(column), column):
        case str() as path:
            name, image = (prefix / path).as_posix(), folder / path
        case content:
            image = content
    return Pair(_unique(name, seen), image, text_cells(row, texts), metadata_cells(row, (column, *texts)))


def _image(folder: Path, file: PurePath) -> Pair:
    captions = (folder / file).with_suffix(".txt")
    texts = captions.read_text("utf-8-sig", "replace").splitlines() if captions.is_file() else []
    metadata = {} if file.parent == PurePath() else {"folder": file.parent.as_posix()}
    return Pair(file.as_posix(), folder / file, strip(texts), metadata)


def _image_field(fields: Cells, image_column: str | None) -> str | None:
    for name, value in fields.items():
        wanted = name == image_column if image_column else f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES
        if wanted and isinstance(value, bytes):
            return name
    return None


def _walk(folder: Path) -> list[PurePath]:
    """List every file below a folder, hidden ones left out, sorted, relative to it."""
    files: list[PurePath] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [PurePath(parent, name).relative_to(folder) for name in names if not name.startswith(".")]
    return sorted(files)


def _expand(path: str) -> list[Path]:
    """List the files that a path, a glob or a brace form such as `a-{000..003}.tar` stands for."""
    if os.path.isfile(path):
        return [Path(path).absolute()]
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        start, stop = braces.groups()
        numbers = [f"{number:0{len(start)}}" for number in range(int(start), int(stop) + 1)]
        found = {number: _expand(path.replace(braces.group(), number, 1)) for number in numbers}
        missing = [number for number, files in found.items() if not files]
        if missing and len(missing) < len(numbers):
            raise FileNotFoundError(f"there is no file for {', '.join(missing[:10])}")
        return [file for files in found.values() for file in files]
    return [Path(file).absolute() for file in sorted(glob.glob(path)) if os.path.isfile(file)]


def _unique(name: str, seen: dict[str, int]) -> str:
    """Return the name the first time, then `name#2`, `name#3`."""
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else _unique(f"{name}#{seen[name]}", seen)


def unreadable(name: str, error: Exception) -> PairsError:
    """Make the error of a source that raised one of `READ_ERRORS`."""
    return PairsError(f"{name} cannot be read: {first_line(error)}")
