"""Processes that decode images ahead of the tower: how they start, and that they end."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from typing import Any


def identity_collate(batch: Any) -> Any:
    """Return a batch as the dataset made it."""
    return batch


def worker_context() -> multiprocessing.context.BaseContext:
    """Return how workers are started: never forked from a process with threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lamplit.data.images"])  # torch is imported once, not in each worker
    return context


def start_worker(_worker: int) -> None:
    """Keep a worker quiet, and let it end with the main process."""
    # libjpeg writes about slightly damaged files to file descriptor 2, through the progress bar. Python's own
    # messages keep their way out. (Torch has set one thread already.)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    # Torch watches the process that forked this one: the fork server, which waits for its workers to end, and
    # so would outlive a killed main process together with them.
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    if main := multiprocessing.parent_process():
        main.join()
        os._exit(1)
