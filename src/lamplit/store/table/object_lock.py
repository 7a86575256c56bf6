"""A lock in object storage, where no file can be locked: a lease, which its holder renews.

The newest of the numbered objects says who holds it. The next number is written only if it is not there yet, so of
several processes one gets it. A holder that has not renewed its object for a while is taken to be dead, as seen on the
clock of who waits. The newest object is never deleted, so no number is given twice.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEASE = 40.0  # seconds without a sign of life after which a holder is taken to be dead
_POLL = 0.5
_PREFIX = "lock-"


class LockHeldError(Exception):
    """Another process holds the lock; the text is what it has said of itself."""


@contextmanager
def object_lock(folder: Path, said: dict[str, object], patience: float) -> Iterator[None]:
    """Hold the lock that lies in a folder of object storage.

    Args:
        folder: where its objects are.
        said: what the holder says of itself, for others.
        patience: seconds to wait for another holder.

    Raises:
        LockHeldError: another process holds it for longer.
        OSError: object storage refuses, or cannot be reached.
    """
    token = uuid.uuid4().hex
    file = _acquire(folder, lambda: _content(said, token), patience)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(file, said, token, stop), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        with suppress(OSError):  # then the lease runs out
            file.write_bytes(b"{}")


def _acquire(folder: Path, content: Callable[[], bytes], patience: float) -> Path:
    deadline = time.monotonic() + patience
    seen, seen_at = b"", time.monotonic()
    while True:
        number, told = _newest(folder)
        now = time.monotonic()
        if told != seen:
            seen, seen_at = told, now
        if not json.loads(told) or now - seen_at >= LEASE:
            file = _numbered(folder, number + 1)
            # What stands for a path here has it.
            if file.write_new(content()):  # type: ignore[attr-defined]
                for older in _listed(folder):
                    if older <= number:
                        _numbered(folder, older).unlink(missing_ok=True)
                return file
            continue
        if now >= deadline:
            raise LockHeldError(told.decode("utf-8", "replace"))
        time.sleep(min(_POLL, max(0.0, deadline - now)))


def _newest(folder: Path) -> tuple[int, bytes]:
    """Return the number and the content of the newest object; 0 and the content of a free lock if there is none."""
    while numbers := _listed(folder):
        with suppress(FileNotFoundError):  # a newer one has taken its place meanwhile
            return max(numbers), _numbered(folder, max(numbers)).read_bytes()
    return 0, b"{}"


def _listed(folder: Path) -> list[int]:
    names = [file.name.removeprefix(_PREFIX) for file in folder.iterdir() if file.name.startswith(_PREFIX)]
    return [int(name) for name in names if name.isdecimal()]


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"{_PREFIX}{number:012d}"


def _renew(file: Path, said: dict[str, object], token: str, stop: threading.Event) -> None:
    while not stop.wait(LEASE / 4):
        with suppress(OSError):  # the next one may come through
            file.write_bytes(_content(said, token))


def _content(said: dict[str, object], token: str) -> bytes:
    """Return what is written; each time another text, the sign of life."""
    return json.dumps({**said, "token": token, "renewed": time.time_ns()}).encode()
