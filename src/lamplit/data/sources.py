"""Sources of pairs: tables, folders, tars, the hub, all opened by one function; nothing is decoded here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePath

from lamplit.data.archives.tar_members import TAR_SUFFIXES, is_tar
from lamplit.data.archives.tars import TarSample, TarSamples, text_names
from lamplit.data.groups import ImageRow
from lamplit.data.image_table import NUM_FIRST_ROWS, Table, find_columns, image_row
from lamplit.data.pairs import Pair, Pairs, Parts, unreadable
from lamplit.data.places.image_files import is_image, is_lance, walk
from lamplit.data.places.sidecars import Sidecars, last_ending
from lamplit.data.skipped import BadRows, Skipped
from lamplit.data.tables.columns import (
    TEXT_COLUMNS,
    CellError,
    ColumnNames,
    find_text_columns,
    listed,
    metadata_cells,
    text_cells,
)
from lamplit.data.tables.folders import choose_files, find_tables, loose_tables, named, tables_beside
from lamplit.data.tables.hub import HubRows
from lamplit.data.tables.readers import READ_ERRORS, TABLE_SUFFIXES, suffix_of
from lamplit.data.tables.splits import refuse_split, split_of
from lamplit.data.units import even_cuts, file_names, tar_cuts
from lamplit.errors import PairsError, UsageError, first_line, kind_of
from lamplit.locations.addresses import is_remote
from lamplit.locations.paths import find_files, path_of

_SAMPLE_BYTES = 2048  # of a tar: two headers, and a text


def read_pairs(
    source: str | Path,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    split: str | None = None,
    need_images: bool = True,
) -> Pairs:
    """Open images with their texts. Of a table the first rows and the column of paths are read, of others less.

    Rows that name one image are one pair, with the texts of all of them and the metadata of the first. What a reader
    should know, such as an encoding that was guessed or images that no row names, is in `notes`.

    Args:
        source: one of these:

            - a table: CSV or TSV (also with semicolons or bars, in UTF-8, UTF-16 or Latin-1), JSONL, JSON, Parquet, or
              an `.arrow` file of `datasets`; text may end in `.gz`;
            - captions in one JSON: COCO's `captions_*.json`, Karpathy's `dataset_*.json`, LLaVA's conversations, or
              captions by file name; the images are beside it or in the usual folders, such as `train2017/`;
            - a folder of images, with same-named `.txt` files (one caption a line), a `metadata.csv|jsonl|parquet` with
              a `file_name` column, COCO's `annotations/`, or no text at all;
            - a folder that `datasets` saved to disk, or of Parquet files;
            - a webdataset tar, or a folder of them;
            - a glob or brace form of files (`shards/a-{000..099}.tar`);
            - any of these in object storage (`s3://bucket/shards/`);
            - the id of a data set on the Hugging Face hub (`owner/name`).
        image_column: the column of images or their paths; by default found by its name.
        text_column: the column of texts, or several with commas between; by default found by its name. If there is
            none, no texts are read.
        split: which one to read, where files, folders or annotations are named after several; `all` for every one;
            by default `train`, with a note.
        need_images: refuse a table without a column of images; else its pairs have `b""` for theirs, and every row is
            a pair of its own.

    Raises:
        PairsError: there is nothing, or it cannot be read.
        UsageError: a named column or split does not exist.
    """
    if not isinstance(source, str | Path):
        raise UsageError(f"source is {kind_of(source)}; give a folder or a file of pairs")
    name = str(source)
    path = path_of(os.path.expanduser(name))
    wanted = ColumnNames(image_column, text_column, need_images)
    try:
        if is_lance(path):
            raise PairsError(
                f"{name} is a table of Lance, such as a store is, and holds no image files. A store need not be "
                f"embedded; vectors of other software become one with: lamplit import {name} --image-tower NAME --out "
                "ANOTHER.lance"
            )
        if path.is_dir():
            return _open_folder(name, path.absolute(), wanted, split)
        if files := find_files(str(path)):
            return _open_files(name, files, wanted, split)
        is_file = suffix_of(path) in TABLE_SUFFIXES or name.lower().endswith(TAR_SUFFIXES)
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not is_file:
            return _open_hub(name, wanted, split or "train")
    except READ_ERRORS as error:
        raise unreadable(name, error) from error
    raise PairsError(
        f"{name} does not exist; give a folder of images, a {', '.join(TABLE_SUFFIXES)} or .tar file, "
        "or the id of a data set on the Hugging Face hub (owner/name)"
    )


def _open_folder(name: str, folder: Path, wanted: ColumnNames, split: str | None) -> Pairs:
    found = walk(folder)
    pairs = _open_found(name, folder, found.files, wanted, split)
    pairs.notes[:0], pairs.problems[:0] = found.notes, found.problems
    return pairs


def _open_found(name: str, folder: Path, files: list[PurePath], wanted: ColumnNames, split: str | None) -> Pairs:
    images = [file for file in files if is_image(file.name)]
    there = frozenset(map(str, files)) if is_remote(folder) else None
    tars = [file for file in files if is_tar(file)]
    loose = loose_tables(files)
    tables, note = find_tables(name, files, split, has_images=bool(images or tars))
    if tables:
        left = None if any(map(split_of, tables)) else split  # else the rows may tell theirs
        pairs = _open_tables(name, folder, [folder / table for table in tables], wanted, left, images)
        pairs.notes[:0] = [note] if note else []
        return _left_out(pairs, f"by {named(tables)}", [*tars, *tables_beside(tables, loose)])
    if tars and len(tars) >= len(images):
        chosen, note = choose_files(name, tars, split)
        pairs = _open_tars(name, [folder / tar for tar in chosen], wanted)
        pairs.notes[:0] = [note] if note else []
        return _left_out(pairs, "as a folder of tars", [*images, *loose])
    if not images:
        raise PairsError(
            f"{name} holds no images; expected JPEG, PNG, WEBP and so on, with same-named .txt files for "
            "their captions or a metadata.csv with a file_name column, or webdataset tars"
            + (f"; it has {named(loose)}: give such a file itself" if loose else "")
        )
    if wanted.image or wanted.text:
        raise UsageError(
            f"{name} has no table, so it has no columns: texts come from .txt files beside the images; "
            "leave out --image-column and --text-column, or add a metadata.csv with a file_name column"
        )
    refuse_split(name, split)
    notes: list[str] = []
    problems: list[Skipped] = []
    read = partial(_images, folder, Sidecars(notes, problems, folder, there))
    parts = Parts(
        len(images), len(images), partial(even_cuts, len(images)),
        lambda start, stop: [str(folder), *map(str, images[start:stop])],
        lambda start, stop: read(images[start:stop]),
    )  # fmt: skip
    pairs = Pairs(name, len(images), None, (), partial(read, images), folder, notes, problems, parts)
    return _left_out(pairs, "as a folder of images", [*tars, *loose])


def _left_out(pairs: Pairs, how: str, others: list[PurePath]) -> Pairs:
    """Say which files are not read, because of how a folder is read."""
    if others:
        files = f"{others[0]} is" if len(others) == 1 else f"{len(others):,} files such as {others[0]} are"
        pairs.notes.append(f"{pairs.source} is read {how}; {files} left out")
    return pairs


def _open_files(name: str, files: list[Path], wanted: ColumnNames, split: str | None) -> Pairs:
    if files and all(map(is_tar, files)):
        refuse_split(name, split)
        return _open_tars(name, files, wanted)
    suffixes = {suffix_of(file) for file in files}
    if len(suffixes) == 1 and suffixes <= set(TABLE_SUFFIXES):
        return _open_tables(name, None, files, wanted, split)
    raise PairsError(
        f"{name} ends in {' and '.join(sorted(suffixes)) or 'nothing'}; expected files of one kind out of "
        f"{', '.join(TABLE_SUFFIXES)} and .tar, or a folder of images"
    )


def _open_tables(
    name: str,
    root: Path | None,
    files: list[Path],
    wanted: ColumnNames,
    split: str | None,
    images: Sequence[PurePath] = (),
) -> Pairs:
    if any(suffix_of(file) != ".json" for file in files):
        refuse_split(name, split)
    table = Table(name, root, files, wanted, split)
    if unnamed := table.unnamed(images):
        tables = named([file.relative_to(table.root) for file in files])
        subject, verb = ("1 image", "is") if len(unnamed) == 1 else (f"{len(unnamed):,} images", "are")
        said = f"{subject} below {name} {verb} not named by {tables} and {verb} left out: {named(unnamed)}"
        table.notes.append(said)
    parts = Parts(
        table.num_rows, table.num_rows, partial(even_cuts, table.num_rows),
        lambda start, stop: file_names(table.files(start, stop), start, stop),
        lambda start, stop: _pairs(table.read(start, stop), unique=table.is_grouped),
    )  # fmt: skip
    return Pairs(
        name, table.count, table.image or None, table.texts,
        lambda: _pairs(table, unique=table.is_grouped), table.root, table.notes, table.problems,
        parts if table.has_steady_ids else None,
    )  # fmt: skip


def _open_hub(name: str, wanted: ColumnNames, split: str) -> Pairs:
    try:
        rows = HubRows(name, split)
        first = list(islice(rows, 1))
    except READ_ERRORS as error:
        raise PairsError(
            f"{name} is not a file or folder here, and the Hugging Face hub does not have it: {first_line(error)}; "
            "check the name, the split and the network, or `hf auth login` for a private data set"
        ) from error
    image, texts, notes = find_columns(name, first, wanted)

    bad = BadRows(Path(name))

    def usable() -> Iterator[ImageRow]:
        for number, cells in enumerate(rows):
            try:
                row = image_row(cells, image, texts, str(number))
            except CellError as error:
                bad.add(number + 1, error.reason, unit="row")
            else:
                yield row

    return Pairs(
        name, rows.count, image or None, texts, lambda: _pairs(usable()), notes=notes, problems=bad.problems
    )  # fmt: skip


def _pairs(rows: Iterable[ImageRow], *, unique: bool = False) -> Iterator[Pair]:
    """Make pairs of rows, with ids of their own unless they are unique already."""
    seen: dict[str, int] = {}
    for row in rows:  # a row's number is no other's
        is_new = unique or isinstance(row.image, bytes)
        name = row.id if is_new else _unique(row.id, seen)
        yield Pair(name, row.image, row.texts, row.metadata, row.not_kept, row.place)


def _open_tars(name: str, files: list[Path], wanted: ColumnNames) -> Pairs:
    notes: list[str] = []
    problems: list[Skipped] = []
    samples = TarSamples(
        files, wanted.image, wanted.text.split(",") if wanted.text else (), notes=notes, problems=problems
    )
    first = list(islice(samples, NUM_FIRST_ROWS))
    if not any(sample.image for sample in first) and problems:
        raise PairsError(f"{name} cannot be read: {problems[0].id}: {problems[0].reason}")
    if not any(sample.ending for sample in first):
        raise PairsError(
            f"{name} holds no images in its first samples; it has {listed([sample.cells for sample in first])}; "
            "expected files such as 000.jpg with 000.txt or 000.json (--image-column NAME names another ending)"
        )
    # By webdataset's own custom the caption is the .txt; a .json often repeats it. A column may be the last part of
    # an ending (txt of outputs.txt).
    rows = [{last_ending(name): cell for name, cell in sample.cells.items()} | sample.cells for sample in first]
    texts = find_text_columns(name, rows, wanted.text, ("txt", *TEXT_COLUMNS))

    def read(samples: Iterable[TarSample]) -> Iterator[Pair]:
        seen: dict[str, int] = {}
        for sample in samples:
            names = text_names(sample, texts)
            name = _unique(sample.key, seen)
            try:
                captions = text_cells(sample.cells, names)
            except CellError as error:
                if (problem := Skipped(name, name, error.reason)) not in problems:
                    problems.append(problem)
                continue
            yield Pair(name, sample.image, captions, metadata_cells(sample.cells, names), place=sample.place)

    sample_bytes = sum(len(sample.image) + _SAMPLE_BYTES for sample in first) // len(first)
    parts = Parts(
        len(files), sum(file.stat().st_size for file in files) // sample_bytes, partial(tar_cuts, files, sample_bytes),
        lambda start, stop: file_names(files[start:stop]), lambda start, stop: read(samples.of(files[start:stop])),
    )  # fmt: skip
    return Pairs(
        name, None, wanted.image, texts, partial(read, samples), notes=notes, problems=problems, parts=parts
    )  # fmt: skip


def _images(folder: Path, sidecars: Sidecars, files: Sequence[PurePath]) -> Iterator[Pair]:
    return (_image(folder, file, sidecars) for file in files)


def _image(folder: Path, file: PurePath, sidecars: Sidecars) -> Pair:
    texts, cells = sidecars.read_beside(folder / file)
    metadata = {} if file.parent == PurePath() else {"folder": file.parent.as_posix()}
    return Pair(file.as_posix(), folder / file, texts, metadata | metadata_cells(cells, ()))


def _unique(name: str, seen: dict[str, int]) -> str:
    """Return the name the first time, then `name#2`, `name#3`."""
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else _unique(f"{name}#{seen[name]}", seen)
