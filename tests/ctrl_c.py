"""Ctrl-C, once, while a run is at work."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def pressed_at(log: Path, lines: int) -> Iterator[None]:
    """Press Ctrl-C once when `log` has so many lines; what is done inside must end by it."""
    if not hasattr(signal, "setitimer"):  # Windows
        pytest.skip("this system has no timers")

    pressed: list[bool] = []

    def look(*_: object) -> None:
        if not pressed and log.is_file() and log.read_bytes().count(b"\n") >= lines:
            pressed.append(True)  # another alarm may be on its way
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
