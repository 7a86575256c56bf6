"""Drawings with captions inside tars and tables, for tests of images that lie in a file."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

ROWS_OF_A_GROUP = 7
PACKED = ("shard.tar", "cells.parquet", "stream.arrow", "file.arrow")  # what `pack` writes


def drawings(image_folder: Path, count: int | None = None) -> list[tuple[str, bytes, str]]:
    """Return name, encoded image and caption of the first drawings of `conftest.image_folder`."""
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        rows = [(row["path"], row["caption"]) for row in csv.DictReader(file)][:count]
    return [(name, (image_folder / name).read_bytes(), caption) for name, caption in rows]


def write_tar(file: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar, compressed if its name says so."""
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w", format=kind) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file


def samples(rows: Sequence[tuple[str, bytes, str]]) -> list[tuple[str, bytes]]:
    """Return the files of webdataset samples: an image and a text each."""
    return [
        file
        for number, (name, image, caption) in enumerate(rows)
        for file in ((f"{number:04}{Path(name).suffix}", image), (f"{number:04}.txt", caption.encode()))
    ]


def as_table(rows: Sequence[tuple[str, bytes, str]]) -> pa.Table:
    """Make a table of encoded images and captions."""
    return pa.table({"image": [image for _, image, _ in rows], "text": [caption for *_, caption in rows]})


def write_arrow(file: Path, table: pa.Table) -> Path:
    """Write batches of Arrow: a stream as `datasets` does, or a file if that is its name."""
    make = pa.ipc.new_file if file.stem == "file" else pa.ipc.new_stream
    with pa.OSFile(str(file), "wb") as opened, make(opened, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_OF_A_GROUP)
    return file


def pack(folder: Path, rows: Sequence[tuple[str, bytes, str]]) -> Path:
    """Write the same drawings into a tar, a Parquet file of several row groups, and both kinds of Arrow's files."""
    write_tar(folder / "shard.tar", samples(rows))
    parquet.write_table(as_table(rows), folder / "cells.parquet", row_group_size=ROWS_OF_A_GROUP)
    for name in ("stream.arrow", "file.arrow"):
        write_arrow(folder / name, as_table(rows))
    return folder
