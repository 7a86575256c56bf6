"""A lock that a process holds while it makes a store, deletes from one, or changes its columns."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lamplit.errors import StoreError
from lamplit.locations.addresses import is_remote
from lamplit.locations.paths import path_of
from lamplit.store.table.object_lock import LockHeldError, object_lock

_FOLDER = "_writers"  # in the store, where Lance leaves it alone
PATIENCE = 60.0  # seconds; what is done under the lock takes less, but for very large stores


class StoreBusyError(StoreError):
    """Another process holds the lock."""


@contextmanager
def store_lock(path: str | Path, doing: str, patience: float | None = None) -> Iterator[None]:
    """Let one process go on at a time, of all that see the store.

    Embedding needs no lock: its commits merge.

    Args:
        path: the store.
        doing: what the holder does, for the message to others.
        patience: seconds to wait for the holder; by default a minute.

    Raises:
        StoreBusyError: another process holds it for longer; the message names it.
    """
    seconds = PATIENCE if patience is None else patience
    if is_remote(path):
        try:
            with object_lock(path_of(path) / _FOLDER, _said(doing), seconds):
                yield
        except LockHeldError as held:
            raise StoreBusyError(_busy(path, str(held))) from None
        return
    folder = Path(path) / _FOLDER
    if not folder.parent.is_dir():
        yield
        return
    folder.mkdir(exist_ok=True)
    holder = folder / "holder.json"
    try:
        lock = FileLock(folder / "lock").acquire(timeout=seconds)
    except Timeout:
        raise StoreBusyError(_busy(path, _read(holder))) from None
    with lock:
        holder.write_text(json.dumps(_said(doing)))
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _read(holder: Path) -> str:
    try:
        return holder.read_text()
    except OSError:
        return ""


def _said(doing: str) -> dict[str, object]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": since, "doing": doing}


def _busy(path: str | Path, told: str) -> str:
    try:
        holder = json.loads(told)
        described = f"process {holder['pid']} on {holder['host']} {holder['doing']} since {holder['since']}"
    except (ValueError, LookupError, TypeError):  # it has just begun or ended
        described = "another process changes it"
    return f"{path} is in use: {described}; wait for it, or end that process"
