"""The command, started again as several processes of this machine that work together."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from lamplit.cli.terminal import stderr


def run_in_processes(count: int) -> None:
    """Run this very command in `count` processes, as torchrun does, and print what the first one prints.

    Each is told by torch that it is one of several, so it starts no others.

    Raises:
        typer.Exit: one of them failed; with its exit code.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):  # the latter of Ctrl-C
        logging.getLogger(name).setLevel(logging.ERROR)  # what failed is said below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback is not None:  # else gloo listens on an address that others may reach
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    with TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id="lamplit", max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "lamplit", *sys.argv[1:])
        except ChildFailedError as error:
            # One that was killed is why others failed, though they may have said so first; torch itself ends the rest.
            # What was typed is wrong for all alike: then the first one, which is heard, has said so itself.
            rank, failure = min(
                error.failures.items(),
                key=lambda each: (
                    each[1].exitcode in (1, 2, -signal.SIGTERM),
                    (each[0], each[1].exitcode) != (0, 2),
                    each[1].timestamp,
                ),
            )
            was_killed = failure.exitcode not in (1, 2, -signal.SIGTERM)
            if rank > 0 and (was_killed or 0 not in error.failures):  # else the first one has said it, too
                _tell(rank, count, failure.exitcode, Path(folder))
            raise typer.Exit(failure.exitcode if failure.exitcode > 0 else 1) from error
        except SignalException as error:  # Ctrl-C, which the others got, too
            raise KeyboardInterrupt from error


def _tell(rank: int, count: int, code: int, folder: Path) -> None:
    """Print the end of what a process wrote, which nobody saw."""
    said = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in folder.rglob(f"{rank}/stderr.log"))
    last = said.strip().rpartition("\n")[2].removeprefix("error: ") or "it said nothing: was it killed?"
    text = (
        f"error: process {rank} of {count} ended with exit code {code} ({last}). The same command goes on from the last"
    )
    stderr.print(f"{text} checkpoint", markup=False, highlight=False, soft_wrap=True)
