"""Processes that decode: what is left of them if the main process is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

# It is killed as soon as there is a fork server, which starts no worker before it has imported torch.
SCRIPT = """
import os, signal, threading, time
from multiprocessing.forkserver import _forkserver
from lamplit.data.decoding.workers import worker_context

def kill():
    while _forkserver._forkserver_pid is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    threading.Thread(target=kill).start()
    worker_context().Process(target=time.sleep, args=(0,)).start()
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork server")
def test_a_process_that_is_killed_before_it_has_workers_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with tempfile.TemporaryDirectory() as name:  # `tmp_path` may be too long for a socket
        folder = Path(name)
        environment = os.environ | {"TMPDIR": name}
        done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, timeout=120)
        assert done.returncode == -signal.SIGKILL
        ends = time.monotonic() + 120
        while list(folder.glob("pymp-*")) and time.monotonic() < ends:
            time.sleep(0.1)
        assert list(folder.glob("pymp-*")) == []


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork server")
def test_a_folder_with_a_long_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    code = (
        "from lamplit.data.decoding.workers import worker_context\nfrom lamplit.errors import UsageError\n"
        "try:\n    worker_context()\nexcept UsageError as error:\n    print(error)"
    )
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, capture_output=True, text=True)
    assert done.stdout.startswith(f"processes that decode images cannot be reached: {folder} is too long a name")
    assert done.stderr == ""
    assert list(folder.iterdir()) == []
