"""Which files of a folder are its tables: metadata files, data sets that were saved to disk, annotations of images."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from lamplit.data.tables.readers import TABLE_SUFFIXES, suffix_of
from lamplit.data.tables.splits import choose_split, split_of

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ANNOTATIONS = ("captions_*.json", "dataset_flickr*.json", "dataset_coco*.json")
# What `datasets` keeps beside its data.
_DERIVED = ("cache-*.arrow", "indices-*.arrow")
_NUM_NAMED = 5


def find_tables(
    name: str, files: Sequence[PurePath], split: str | None, *, has_images: bool
) -> tuple[list[PurePath], str]:
    """Find the tables of a folder, those of one split if they are named after several.

    Args:
        name: the folder, for messages.
        files: all files below it, sorted.
        split: the wanted one, or `all`; by default `train`.
        has_images: whether some are images; then Parquet beside them is no table of images.

    Returns:
        The tables, and a note about what is not read, empty if there is nothing to say.

    Raises:
        UsageError: there is no such split.
    """
    if tables := [file for file in files if file.name in _METADATA]:
        return choose_files(name, tables, split) if split else (tables, "")
    arrow = [file for file in files if file.suffix.lower() == ".arrow" and not _matches(file, _DERIVED)]
    annotations = [file for file in files if _matches(file, _ANNOTATIONS)] if has_images else []
    parquets = [] if has_images else [file for file in files if file.suffix.lower() == ".parquet"]
    found = next(filter(None, (arrow, annotations, parquets)), [])
    if found is annotations:  # Karpathy's files tell the split of each image themselves
        of_one_kind = [pattern for pattern in _ANNOTATIONS if _matches(found[0], (pattern,))] if found else []
        found = [file for file in found if _matches(file, of_one_kind)]
        if of_one_kind and of_one_kind[0] != _ANNOTATIONS[0]:
            return found, ""
    return choose_files(name, found, split)


def choose_files(name: str, files: Sequence[PurePath], split: str | None) -> tuple[list[PurePath], str]:
    """Choose the files of one split, if files are named after several; and say what is not read.

    Raises:
        UsageError: there is no such split.
    """
    splits = {file: split_of(file) for file in files}
    sizes = Counter(found for found in splits.values() if found)
    if not sizes:
        return list(files), ""
    chosen, note = choose_split(name, sizes, split)
    return [file for file in files if chosen is None or splits[file] is None or splits[file] in chosen], note


def loose_tables(files: Sequence[PurePath]) -> list[PurePath]:
    """Return the files that look like tables, though a folder of images is not read by them.

    JSON beside a file of the same name is about that file, and img2dataset's statistics are no table.
    """
    names = Counter(file.with_suffix("") for file in files)
    return [
        file
        for file in files
        if suffix_of(file) in TABLE_SUFFIXES
        and len(file.parts) <= 2
        and not (file.suffix.lower() == ".json" and (names[file.with_suffix("")] > 1 or file.stem.endswith("_stats")))
    ]


def tables_beside(tables: Sequence[PurePath], loose: Sequence[PurePath]) -> list[PurePath]:
    """Return those of some files that are no part of the tables that a folder is read by, but look like others.

    JSON is left aside: `datasets`, COCO and others keep descriptions in it. So are files of another split, which
    `find_tables` tells of.
    """
    suffix = None if tables[0].name in _METADATA else suffix_of(tables[0])
    return [
        file
        for file in loose
        if file not in tables and file.name not in _METADATA and suffix_of(file) not in (".json", suffix)
    ]


def named(files: Sequence[PurePath]) -> str:
    """Name the first few of some files.

    Example:
        >>> named([PurePath("a.jpg"), PurePath("b.jpg")])
        'a.jpg, b.jpg'
    """
    more = f" and {len(files) - _NUM_NAMED:,} more" if len(files) > _NUM_NAMED else ""
    return ", ".join(file.as_posix() for file in files[:_NUM_NAMED]) + more


def _matches(file: PurePath, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)
