"""Stores on the Hugging Face hub: one table in a data set's repository, beside its card."""

from __future__ import annotations

import os
from pathlib import Path

from lamplit.data.named.repositories import fetch_repository
from lamplit.errors import StoreError, UsageError
from lamplit.locations.addresses import RemotePath, is_remote
from lamplit.store.table.table_opening import open_table

FOLDER = "store.lance"
_PREFIX = "hf:"


def is_published(path: object) -> bool:
    """Tell whether this is the name of a store on the hub, `hf:NAME`."""
    return str(path).startswith(_PREFIX) and str(path) != _PREFIX


def require_writable(path: str | Path) -> None:
    """Refuse to write into a store on the hub, among other files, and where what is needed to write is missing.

    Raises:
        UsageError: it is one on the hub, a file, or a folder that holds something else.
        MissingExtraError: it is in object storage, and the package that writes there is not installed.
    """
    if is_remote(path):  # the lock, and the list of what was skipped
        RemotePath(str(path)).system()
    if is_published(path):
        raise UsageError(f"{path} is a store on the hub; give a path as --out, and put it there with: lamplit push")
    if not is_remote(path):
        _require_own_folder(Path(path))


def _require_own_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, and a store is a folder; give another --out")
    # A first commit that is under way, or was stopped, has files in `data` under any name, and no table yet.
    names = os.listdir(path) if path.is_dir() else []
    others = [name for name in names if name != "data" and not name.startswith(("_", "."))]
    if others and open_table(path) is None:
        raise UsageError(
            f"{path} holds no store, but other files ({sorted(others)[0]}); give another --out, so that they do not mix"
        )


def fetch(path: str | Path) -> str | Path:
    """Return the path of a store, also of one below `~`; of `hf:NAME` that of the folder that is fetched from the hub.

    Raises:
        StoreError: the repository cannot be fetched, or has no store.
    """
    if not is_published(path):
        return path if is_remote(path) else os.path.expanduser(path)
    name = str(path).removeprefix(_PREFIX)
    folder = (Path(name) if Path(name).is_dir() else fetch_repository(name, "dataset")) / FOLDER
    if not folder.is_dir():
        raise StoreError(f"{path} has no {FOLDER}; expected a repository that lamplit push made of a store")
    return folder
