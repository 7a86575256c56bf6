"""A lock that a process holds for the short time in which it deletes from a store, or changes its columns."""

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

_FOLDER = "_writers"  # in the store, where Lance leaves it alone
PATIENCE = 60.0  # seconds; what is done under the lock takes less, but for very large stores


class StoreBusyError(StoreError):
    """Another process holds the lock."""


@contextmanager
def store_lock(path: str | Path, doing: str, patience: float | None = None) -> Iterator[None]:
    """Let one process of those that see a store's folder go on at a time; on object storage, all.

    Embedding needs no lock: its commits merge.

    Args:
        path: the store.
        doing: what the holder does, for the message to others.
        patience: seconds to wait for the holder; by default a minute.

    Raises:
        StoreBusyError: another process holds it for longer; the message names it.
    """
    folder = Path(path) / _FOLDER
    if not folder.parent.is_dir():
        yield
        return
    folder.mkdir(exist_ok=True)
    holder = folder / "holder.json"
    try:
        lock = FileLock(folder / "lock").acquire(timeout=PATIENCE if patience is None else patience)
    except Timeout:
        raise StoreBusyError(f"{path} is in use: {_described(holder)}; wait for it, or end that process") from None
    with lock:
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        holder.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since, "doing": doing}))
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _described(holder: Path) -> str:
    try:
        told = json.loads(holder.read_text())
        return f"process {told['pid']} on {told['host']} {told['doing']} since {told['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # it has just begun or ended
        return "another process changes it"
