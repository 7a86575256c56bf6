"""The user's cache: files that can be fetched or made again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.request import urlopen

TIMEOUT = 60.0  # seconds without a byte


def cache_folder() -> Path:
    """Where they are kept: $LAMPLIT_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("LAMPLIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lamplit"


def download(url: str, file: Path) -> None:
    """Fetch `url` into `file`, whole or not at all.

    Raises:
        OSError: it cannot be fetched, or broke off.
        http.client.HTTPException: the server makes no sense.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with urlopen(url, timeout=TIMEOUT) as response, partial.open("wb") as out:  # noqa: S310 (addresses of ours)
            expected = response.length
            shutil.copyfileobj(response, out, 1 << 20)
        if expected is not None and partial.stat().st_size != expected:
            raise OSError(f"it broke off after {partial.stat().st_size} of {expected} bytes")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
