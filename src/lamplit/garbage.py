"""Garbage collection, told to leave alone what will stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def collect_rarely() -> None:
    """Look for garbage seldom, in a process that is lamplit's own.

    What torch, timm and transformers import stays. Looking through all of it again and again is a third of the time of
    a short command.
    """
    gc.set_threshold(20_000, 20, 100)


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
