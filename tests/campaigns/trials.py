"""What the campaigns have in common: trials at random moments, and processes that are killed."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Campaign(Protocol):
    """What is tried; `killed` counts the processes that were killed at work."""

    killed: int

    def trial(self, number: int) -> bool:
        """Start, kill, look, go on, compare; tell whether all was right."""


def run_trials(
    make: Callable[[Path, random.Random], Campaign], trials: int, left: Callable[[], list[str]] = list
) -> None:
    """Run the trials of the command line, and exit with 1 if one of them fails.

    Args:
        make: makes the campaign in a folder.
        trials: how many, if `--trials` does not say so.
        left: lists what the processes have left behind after the last trial, which is nothing if all is right.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        campaign = make(Path(folder), random.Random(options.seed))
        failed = sum(not campaign.trial(number) for number in range(options.trials))
        found = left()
    print(f"{failed} of {options.trials} trials failed; {campaign.killed} processes were killed at work")
    if found:
        print(f"left behind: {found}")
    sys.exit(failed > 0 or len(found) > 0)


def child(action: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a process of its own, which never returns from here; return its id."""
    process = os.fork()
    if process:
        return process
    try:
        action(*arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def finished(process: int) -> bool:
    """Wait for a process; tell whether it ended well."""
    return os.waitpid(process, 0)[1] == 0


def end(process: int) -> bool:
    """Kill a process."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def require(holds: bool, reason: str = "the first run failed") -> None:
    """Raise if something is not so."""
    if not holds:
        raise RuntimeError(reason)
