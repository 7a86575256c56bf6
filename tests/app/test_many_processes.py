"""The page in several processes, as users start it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

import lamplit
from lamplit.errors import UsageError
from lamplit.store.lance_store import Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are ended by signals")


@contextmanager
def started(model: Path, store: Path, processes: int = 2) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "lamplit", "app", str(model), str(store), "--port", "0", "--json"]
    with subprocess.Popen(
        [*command, "--processes", str(processes)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()
            yield process, json.loads(line)["address"]
        finally:
            process.kill()


def workers_of(process: subprocess.Popen[str], address: str) -> set[int]:
    """Return the processes that listen."""
    port = int(address.rsplit(":", 1)[1].strip("/"))
    children = psutil.Process(process.pid).children(recursive=True)
    return {
        child.pid
        for child in children
        if any(each.laddr.port == port for each in child.net_connections() if each.laddr)
    }


@pytest.mark.slow
def test_several_processes_answer_on_one_port(model_path: Path, store_path: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(store_path, tmp_path / "a.lance"))
    images = len(Store(store))
    with started(model_path, store) as (process, address):
        assert len(workers_of(process, address)) == 2

        def ask(number: int) -> int:
            return httpx.post(f"{address}search", json={"query": f"picture {number}"}, timeout=60).status_code

        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(ask, range(200))) == {200}
        counts = re.findall(r'lamplit_requests_total\{.*route="/search".*\} (\S+)', httpx.get(f"{address}metrics").text)
        assert [float(count) for count in counts] == [200], "all processes count together"
        assert {httpx.get(f"{address}health").json()["images"] for _ in range(10)} == {images}

        Store(store).delete(Store(store).column("id")[:2])
        end = time.monotonic() + 60
        while {httpx.get(f"{address}health").json()["images"] for _ in range(10)} != {images - 2}:
            assert time.monotonic() < end
            time.sleep(0.5)

        before = workers_of(process, address)
        os.kill(min(before), signal.SIGKILL)
        while len(now := workers_of(process, address)) < 2 or now == before:
            assert time.monotonic() < end
            assert httpx.get(f"{address}health", timeout=60).status_code == 200, "the other one answers"
            time.sleep(0.2)
        process.terminate()
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert re.sub(r"\s+", " ", process.stderr.read()).strip() == (
            "WARNING a process ended with exit code -9; another begins"
        )
    assert not any(psutil.pid_exists(pid) for pid in before | now)


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(model_path: Path, store_path: Path) -> None:
    with started(model_path, store_path) as (process, address):
        workers = workers_of(process, address)
        process.send_signal(signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 30
        while any(psutil.pid_exists(pid) for pid in workers):
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.slow
def test_what_keeps_a_process_from_answering_is_said_once(model_path: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lamplit",
        "app",
        str(model_path),
        str(tmp_path / "none.lance"),
        "--processes",
        "2",
    ]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "none.lance" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_open_model_is_for_one_process(model_path: Path, store_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the model is .*several processes open their own"):
        lamplit.serve(lamplit.load(model_path), store_path, port=0, processes=2)
    with pytest.raises(UsageError, match=r"the store is .*several processes open their own"):
        lamplit.serve(model_path, Store(store_path), port=0, processes=2)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed on Linux")
def test_what_is_imported_before_the_fork_starts_no_thread() -> None:
    code = "import os, lamplit.app.shared_libraries; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
