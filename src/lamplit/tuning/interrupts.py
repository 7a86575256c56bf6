"""Ctrl-C between two steps, so that what a step has done is kept."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def whole_steps(*, wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """Take Ctrl-C as a wish to stop after the step at work; a second one stops at once.

    Where nothing in Python waits for Ctrl-C, or in another thread than the main one, nothing changes.

    Args:
        wanted: whether to do so at all.

    Yields:
        A function that tells whether to stop now.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and callable(before):
            before(number, frame)
        asked.set()
        logger.info("stopping after this step, to keep it; Ctrl-C again stops at once")

    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not (wanted and is_main and callable(before)):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
