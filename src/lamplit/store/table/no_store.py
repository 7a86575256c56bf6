"""Why there is no store at a path, or why it cannot be read, for the error that says so."""

from __future__ import annotations

from pathlib import Path

from lamplit.locations.addresses import is_remote

_LOOKED_AT = 1000  # files of a folder
_OF_FOLDERS = (".parquet", ".arrow")  # tables that a folder is read by, whatever they are called


def why_no_store(path: str | Path) -> str:
    """Say why there is no store at a path, and what to type: a model, pairs that are not embedded yet, or nothing."""
    # A search reads no pairs, and their readers take longer to import than all it does.
    from lamplit.data.archives.tar_members import is_tar
    from lamplit.data.places.image_files import is_image, walk
    from lamplit.data.tables.readers import TABLE_SUFFIXES, suffix_of

    if is_remote(path):
        return f"no store at {path}; make one with: lamplit embed SOURCE --image-tower TOWER --out {path}"
    folder = Path(path)
    if (folder / "config.json").is_file() or str(path).startswith("lit:"):
        return f"{path} is a model, not a store; the order is MODEL STORE"
    is_table = folder.is_file() and (suffix_of(folder) in TABLE_SUFFIXES or is_tar(folder))
    below = walk(folder, most=_LOOKED_AT).files if folder.is_dir() else []
    if is_table or any(is_image(file.name) or is_tar(file) or suffix_of(file) in _OF_FOLDERS for file in below):
        command = f"lamplit embed {path} --image-tower TOWER --out pairs.lance"
        return f"{path} holds pairs, not a store; embed it first: {command}"
    return f"no store at {path}; make one with: lamplit embed SOURCE --image-tower TOWER --out {path}"


def why_no_vectors(path: str) -> str:
    """Say what to do about rows without a vector."""
    return (
        f"{path} has rows without a vector, written by other software; the next lamplit embed deletes them, and so "
        f"does pylance: lance.dataset({path!r}).delete('vector IS NULL')"
    )
