"""The page in several processes of this machine, which listen on one port and map the same files into memory."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from tempfile import TemporaryDirectory
from typing import Any

from lamplit.data.decoding.workers import worker_context
from lamplit.errors import LamplitError, UsageError

logger = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds that a process has to answer what it has begun


def serve_in_processes(
    count: int, listener: socket.socket, started: Callable[[], None], arguments: dict[str, Any]
) -> None:
    """Answer in `count` processes until interrupted; one that dies is started again.

    Args:
        count: number of processes.
        listener: the socket that all of them listen on.
        started: called as soon as all of them answer.
        arguments: of `serve_on`.

    Raises:
        LamplitError: a process could not open the model or the store.
    """
    from lamplit.app.measures import COUNTS  # of an extra

    workers: list[_Worker] = []
    is_over = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: is_over.set()) if _is_main() else None
    try:
        with TemporaryDirectory() as folder:
            os.environ[COUNTS] = folder
            context = worker_context("lamplit.app.shared_libraries")
            for _ in range(count):  # one after the other: the first makes the files that all of them map
                workers.append(_Worker(context, listener, arguments))
                workers[-1].wait_until_ready()
            started()
            while not is_over.is_set():
                wait([worker.process.sentinel for worker in workers], timeout=0.5)
                for place, worker in enumerate(workers):
                    if worker.process.exitcode is not None and not is_over.is_set():
                        logger.warning("a process ended with exit code %s; another begins", worker.process.exitcode)
                        workers[place] = _Worker(context, listener, arguments)
                        workers[place].wait_until_ready()
    finally:
        os.environ.pop(COUNTS, None)
        for worker in workers:
            worker.end()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Worker:
    """A process that answers."""

    def __init__(self, context: BaseContext, listener: socket.socket, arguments: dict[str, Any]) -> None:
        self._said, saying = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(listener, saying, arguments), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        saying.close()  # so that the end of the process ends the pipe, too

    def wait_until_ready(self) -> None:
        """Wait until it answers; raise what kept it from opening the model or the store."""
        try:
            error = self._said.recv()
        except EOFError:
            self.process.join()
            raise UsageError(
                f"a process ended with exit code {self.process.exitcode} before it answered; is there memory for "
                "another one?"
            ) from None
        if error is not None:
            raise error

    def end(self) -> None:
        """Let it answer what it has begun."""
        self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _work(listener: socket.socket, saying: Connection, arguments: dict[str, Any]) -> None:
    """Serve in this process."""
    from lamplit.app.answering import serve_on

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        try:
            serve_on(listener, ready=lambda: saying.send(None), **arguments)
        except LamplitError as error:
            saying.send(error)
            sys.exit(1)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it ended."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
