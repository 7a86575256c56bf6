"""How the table of a store is opened, wherever it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance

from lamplit.errors import StoreError
from lamplit.locations.addresses import is_remote
from lamplit.locations.object_errors import known_reason, reason_of
from lamplit.locations.paths import lance_options


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Make one sentence of what object storage has against a read, in the words of Lance.

    Raises:
        StoreError: it refuses, or cannot be reached.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if is_remote(path) and (reason := known_reason(error)):
            raise StoreError(f"{path} cannot be read: {reason}") from error
        raise


def open_table(path: str | Path) -> Any:
    """Open the Lance table at a path or an address; return None if there is none.

    Raises:
        StoreError: object storage refuses, or cannot be reached.
    """
    if not isinstance(path, str | Path) or (not is_remote(path) and Path(path).is_file()):
        return None  # of a file, Lance would try for seconds
    try:
        return lance.dataset(str(path), storage_options=lance_options(path))
    except (ValueError, OSError) as error:
        if is_remote(path) and "was not found" not in str(error):
            raise StoreError(f"{path} cannot be opened: {reason_of(error)}") from error
        return None
