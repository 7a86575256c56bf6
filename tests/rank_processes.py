"""Start the processes of a run as torchrun does, without its own: each knows its number and where to meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

LIMIT = 240  # seconds that any of them may take
_INTERFACE = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
LOOPBACK = {"OMP_NUM_THREADS": "1"} | ({} if _INTERFACE is None else {"GLOO_SOCKET_IFNAME": _INTERFACE})
TORCHRUN = [
    "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
    "--local-addr", "127.0.0.1",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def start(size: int, *command: object, **environment: object) -> list[subprocess.Popen[str]]:
    """Start `python COMMAND` so many times, with more variables."""
    common = {
        "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "TORCHELASTIC_RUN_ID": "test", **environment,
    }  # fmt: skip
    return [launch(*command, **common, RANK=rank, LOCAL_RANK=rank) for rank in range(size)]


def launch(*command: object, **environment: object) -> subprocess.Popen[str]:
    """Start `python COMMAND`, which talks to others on this machine alone."""
    values = LOOPBACK | {"PYTHONWARNINGS": "default"} | {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | values,
    )  # fmt: skip


def finish(processes: Sequence[subprocess.Popen[str]], code: int = 0, limit: float = LIMIT) -> list[tuple[str, str]]:
    """Wait for all, so many seconds for each; return what each wrote to stdout and stderr."""
    try:
        said = [process.communicate(timeout=limit) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said
