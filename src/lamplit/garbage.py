"""Garbage collection, told to leave alone what will stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen() -> Iterator[None]:
    """Spare the objects that are there now from garbage collection, which takes long to look at all of them.

    The libraries that embedding imports make about a million. Inside another `frozen` it does nothing.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
