"""Images inside a tar or a table, each read by itself: a piece of the tar, or a column of one row group.

Nothing is left open, so any number of threads may read at once. What is kept are the footers of eight Parquet files.
"""

from __future__ import annotations

import os
import stat
import tarfile
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from lamplit.data.places.image_places import RowPlace, TarPlace, require_few_bytes
from lamplit.data.tables.columns import CellError, image_cell
from lamplit.data.tables.readers import READ_ERRORS, open_parquet, record_batches, suffix_of
from lamplit.data.valid_text import file_named
from lamplit.errors import ImageError, first_line
from lamplit.locations.addresses import RemotePath, is_remote
from lamplit.locations.object_errors import RemoteError
from lamplit.locations.paths import path_of

MOST_GROUP_BYTES = 2**30  # of a row group, unpacked; half of its images are read for one
_BATCH_BYTES = 2**24  # of the images that are in memory at once, about, beside the page that they lie in
_BATCH_ROWS = 1024
_KEPT_FOOTERS = 8
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


def read_placed(place: TarPlace | RowPlace, most: int) -> bytes:
    """Read an image of at most `most` bytes from where it lies.

    Raises:
        ImageError: it does not lie there any more, or is too large; the text is the reason.
        FileNotFoundError: there is no such tar or table.
        OSError: it cannot be read.
    """
    file = path_of(file_named(place.file))
    if not is_remote(file) and not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would be waited for
        raise ImageError(f"{file.name} is not a regular file")
    try:
        return _read_member(file, place, most) if isinstance(place, TarPlace) else _read_cell(file, place, most)
    except (FileNotFoundError, RemoteError):
        raise
    except PermissionError as error:  # pyarrow's says in which folder it is
        raise ImageError(f"{file.name} may not be read") from error
    except READ_ERRORS as error:
        said = first_line(error).replace(str(file), file.name)
        raise ImageError(f"{file.name} is damaged, or another file than it was ({said[:120]})") from error


def _read_member(file: Path, place: TarPlace, most: int) -> bytes:
    """Read a file of a tar, if the block before it still says that it is there, and as long."""
    require_few_bytes(place.size, most)
    start = place.first - tarfile.BLOCKSIZE
    if start < 0 or place.size < 0:
        raise _no_such_member(file)
    remote: object = file
    if isinstance(remote, RemotePath):
        both = remote.read_range(start, place.last + 1)
        header, content = both[: tarfile.BLOCKSIZE], both[tarfile.BLOCKSIZE :]
    else:
        header = content = b""
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size > place.last:
                opened.seek(start)
                header = opened.read(tarfile.BLOCKSIZE)
                content = opened.read(place.size) if _is_header(header, place.size) else b""
    if not _is_header(header, place.size) or len(content) < place.size:
        raise _no_such_member(file)
    return content


def _is_header(block: bytes, size: int) -> bool:
    """Tell whether a block is the header of a file of this size."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return header.type in _FILES and header.size == size


def _no_such_member(file: Path) -> ImageError:
    return ImageError(f"no file of {file.name} lies there: the tar is not as it was; embed it again")


def _read_cell(file: Path, place: RowPlace, most: int) -> bytes:
    suffix = suffix_of(file)
    if suffix == ".parquet":
        cell = _parquet_cell(file, place)
    elif suffix == ".arrow" and not is_remote(file):
        cell = _arrow_cell(file, place)
    else:
        raise ImageError(f"rows of {file.name} cannot be opened, only those of .parquet, and of .arrow on this machine")
    cell.validate(full=True)  # of this one cell, or what it says of itself might lead out of the file
    require_few_bytes(cell.nbytes, most)
    try:
        image = image_cell(cell[0].as_py(), place.column)
    except CellError as error:
        raise ImageError(error.reason) from error
    if isinstance(image, str):
        raise ImageError(f"row {place.row} of {file.name} has a path in column {place.column}, not an image")
    return image


def _parquet_cell(file: Path, place: RowPlace) -> pa.Array:
    """Return the cell as an array of one; the row group is read up to it, in pieces."""
    footer = None if is_remote(file) else _footer(str(file), *_version(file))
    with open_parquet(file, footer) as opened:
        _require_column(opened.schema_arrow, file, place)
        group, row = _find_row(opened.metadata, file, place)
        described = opened.metadata.row_group(group)
        # Of a single column pyarrow tells the size, too, but ends the process if what the file says of it is damaged.
        size, read = described.total_byte_size, 0
        _require_small_group(size, file)
        batch_rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES * described.num_rows // max(1, size)))
        for batch in opened.iter_batches(batch_rows, row_groups=[group], columns=[place.column], use_threads=False):
            if row < batch.num_rows:
                return batch.column(place.column).slice(row, 1)
            row -= batch.num_rows
            read += batch.nbytes
            _require_small_group(read, file)  # whatever it has said
    raise _no_such_row(file, place)


@lru_cache(_KEPT_FOOTERS)
def _footer(file: str, *version: int) -> parquet.FileMetaData:
    """Read where the row groups of a Parquet file lie; `version` tells it from one of the same name."""
    return parquet.read_metadata(file)


def _version(file: Path) -> tuple[int, ...]:
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _find_row(footer: parquet.FileMetaData, file: Path, place: RowPlace) -> tuple[int, int]:
    """Return the row group of a row, and its number there."""
    row = place.row
    if row < footer.num_rows:
        for group in range(footer.num_row_groups):
            if row < (num_rows := footer.row_group(group).num_rows):
                return group, row
            row -= num_rows
    raise _no_such_row(file, place)


def _require_small_group(size: int, file: Path) -> None:
    if size > MOST_GROUP_BYTES:
        raise ImageError(
            f"a row group of {file.name} has {size / 2**20:,.0f} MiB, more than the bound of "
            f"{MOST_GROUP_BYTES / 2**20:,.0f}; write the table with fewer rows in each"
        )


def _arrow_cell(file: Path, place: RowPlace) -> pa.Array:
    """Return the cell as an array of one; of the mapped file, little more than the cell is read."""
    row = place.row
    with pa.memory_map(str(file)) as mapped:
        for batch in record_batches(mapped):
            _require_column(batch.schema, file, place)
            if row < batch.num_rows:
                return batch.column(place.column).slice(row, 1)
            row -= batch.num_rows
    raise _no_such_row(file, place)


def _require_column(schema: pa.Schema, file: Path, place: RowPlace) -> None:
    if schema.get_field_index(place.column) < 0:
        raise ImageError(f"{file.name} has no column {place.column}, or several; embed it again")


def _no_such_row(file: Path, place: RowPlace) -> ImageError:
    return ImageError(f"{file.name} has no row {place.row}: the table is not as it was; embed it again")
