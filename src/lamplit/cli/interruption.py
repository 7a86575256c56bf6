"""Ctrl-C: what each command has kept, and how to go on."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from lamplit.cli.terminal import stderr

INTERRUPTED = 130  # exit code, as shells have it
_AGAIN = "type the same command again"
_KEPT = {
    "app": "the page is closed",
    "classify": f"nothing was written; {_AGAIN}",
    "compare": f"finished runs are in the folder, and the one at work has its checkpoint; to go on, {_AGAIN}",
    "data": f"what was fetched whole is kept; to go on, {_AGAIN}",
    "duplicates": f"the store is as it was; {_AGAIN}",
    "embed": f"the blocks of images that were embedded are in the store; to go on with the others, {_AGAIN}",
    "evaluate": f"results that are in the folder of --out are whole; to measure the others, {_AGAIN}",
    "export": f"nothing was written; {_AGAIN}",
    "import": f"the vectors of this import are in the store all or not at all; {_AGAIN}",
    "index": f"the store is as it was; {_AGAIN}",
    "push": f"the repository is as it was; {_AGAIN}",
    "search": f"the store is as it was; {_AGAIN}",
    "tune": f"the run's folder has its last checkpoint, if there was a step; to go on to the same model, {_AGAIN}",
}


class Commands(TyperGroup):
    """The commands of lamplit, each of which ends in one line if it is interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Raises:
            typer.Exit: with code 130, after Ctrl-C.
        """
        with _Interruptible(ctx):
            return super().invoke(ctx)


class _Interruptible:
    """Listens for Ctrl-C, and makes one line and an exit code of whatever error comes of it.

    That need not be KeyboardInterrupt: libraries that are interrupted while they are imported make other errors of it.
    """

    def __init__(self, context: Any) -> None:
        self._context, self._is_pressed = context, False

    def __enter__(self) -> None:
        self._listens = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._listens:
            signal.signal(signal.SIGINT, self._press)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._is_pressed = True
        signal.default_int_handler(number, frame)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None or not (self._is_pressed or kind is KeyboardInterrupt):
            return
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # else the process that started this one says it
            text = _KEPT.get(self._context.invoked_subcommand or "", f"nothing was written; {_AGAIN}")
            stderr.print(f"stopped: {text}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
