"""Processes that decode images ahead of the tower: how they start, and that they end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver, resource_tracker
from typing import Any

from lamplit.data.decoding.fork_server import FOLDER
from lamplit.errors import UsageError


def identity_collate(batch: Any) -> Any:
    """Return a batch as the dataset made it."""
    return batch


def worker_context(*modules: str) -> multiprocessing.context.BaseContext:
    """Return how workers are started: never forked from a process with threads.

    Args:
        modules: what they all import, whose memory they share; it starts no thread that they need.

    Raises:
        UsageError: the folder for temporary files has a name too long for the sockets that workers are reached by.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # First what takes the sockets away if this process is killed; then torch, once and not in each worker.
    context.set_forkserver_preload(["lamplit.data.decoding.fork_server", "lamplit.data.decoding.images", *modules])
    resource_tracker.ensure_running()  # takes a moment, in which a folder would lie there that nobody removes
    os.environ[FOLDER] = multiprocessing.util.get_temp_dir()
    try:
        forkserver.ensure_running()
    except OSError as error:
        if "path too long" not in str(error):
            raise
        raise UsageError(
            f"processes that decode images cannot be reached: {tempfile.gettempdir()} is too long a name for a socket; "
            "set TMPDIR to a folder with a short name, such as /tmp, or decode without processes: --workers 0"
        ) from error
    finally:
        os.environ.pop(FOLDER)
    return context


def worker_start() -> Callable[[int], None]:
    """Return what each worker calls first: `start_worker`, which is told where this process has its sockets."""
    return partial(start_worker, multiprocessing.util.get_temp_dir())


def start_worker(main_folder: str, _worker: int) -> None:
    """Keep a worker quiet, and let it end with the main process."""
    # libjpeg writes about slightly damaged files to file descriptor 2, through the progress bar. Python's own
    # messages keep their way out. (Torch has set one thread already.)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process ends the others
    # Torch watches the process that forked this one: the fork server, which waits for its workers to end, and
    # so would outlive a killed main process together with them.
    threading.Thread(target=_end_with_main_process, args=(main_folder,), daemon=True).start()


def _end_with_main_process(main_folder: str) -> None:
    if main := multiprocessing.parent_process():
        main.join()
        for folder in (main_folder, multiprocessing.util.get_temp_dir()) * 2:  # a socket may have been made meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
