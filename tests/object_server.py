"""Object storage on the loopback: moto's server in a process of its own, behind a proxy that fails as networks do."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import s3fs

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_HOP = {"connection", "transfer-encoding", "server", "date", "keep-alive"}


@dataclass
class ObjectServer:
    """A running server.

    Attributes:
        endpoint: where clients reach it, through the proxy.
        fault: says for each request, by its method and path, what is to go wrong: `slow` (503), `deny` (403), `drop`
            (the connection ends before the request is heard), `lose` (it is done, and the answer is lost), `cut` (half
            of the answer comes), or None.
        seen: method and path of each request, with what went wrong.
        bucket: of the test at hand.
    """

    endpoint: str = ""
    bucket: str = ""
    fault: Callable[[str, str], str | None] = lambda method, path: None
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)

    @property
    def root(self) -> str:
        """Return the address of the bucket."""
        return f"s3://{self.bucket}"

    @property
    def system(self) -> s3fs.S3FileSystem:
        """Return the file system to look at the bucket with."""
        return s3fs.S3FileSystem(key="ann", secret="secret", endpoint_url=self.endpoint, use_listings_cache=False)

    def begin(self) -> None:
        """Make a new bucket, and let nothing go wrong."""
        self.fault = lambda method, path: None
        self.bucket = f"test-{uuid.uuid4().hex[:12]}"
        self.system.mkdir(self.bucket)
        self.seen.clear()

    def put(self, file: Path, key: str) -> str:
        """Upload a file; return its address."""
        self.system.pipe_file(f"{self.bucket}/{key}", file.read_bytes())
        return f"{self.root}/{key}"

    def decide(self, method: str, path: str) -> str | None:
        """Note a request, and say what goes wrong with it."""
        fault = self.fault(method, path)
        self.seen.append((method, path, fault))
        return fault


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Run a server until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment) as process:
        try:
            _wait(port, process)
            server = ObjectServer()
            handler = type("Handler", (_Proxy,), {"server_of_objects": server, "port": port})
            with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
                proxy.daemon_threads = True  # a client may keep its connection
                thread = Thread(target=proxy.serve_forever)
                thread.start()
                server.endpoint = f"http://127.0.0.1:{proxy.server_port}"
                try:
                    yield server
                finally:
                    proxy.shutdown()
                    thread.join()
        finally:
            process.kill()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError("moto's server has not started; pip install 'moto[server]'")


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_objects: ObjectServer
    port: int

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _pass_on(self) -> None:
        fault = self.server_of_objects.decide(self.command, self.path)
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "drop":
            return self._hang_up()
        if fault == "deny":
            return self._answer(403, {"Content-Type": "application/xml"}, DENIED)
        if fault == "slow":
            return self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, sent, headers)
            got = connection.getresponse()
            body = got.read()
        finally:
            connection.close()
        if fault == "lose":
            return self._hang_up()
        headers = {name: value for name, value in got.getheaders() if name.lower() not in _HOP}
        if fault == "cut" and body:
            headers["Content-Length"] = str(len(body))
            self._answer(got.status, headers, body[: len(body) // 2])
            return self._hang_up()
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(body))
        return self._answer(got.status, headers, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815 (the base class's names)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and "content-length" not in map(str.lower, headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
