"""The page under load, on the quickstart's model and store: one client, 200 clients, and clients that mean no good.

Three parts, each with its goals:
1. one client on one connection: `/about`, a search by words (a new one each time), by an image;
2. 200 clients at once, ten requests each, drawn evenly from nine kinds;
3. clients without a bound on their rate beside 200 slow ones, 1,100 half-open connections (the server may have 1,024
   descriptors), uploads of 100 MB, and a JPEG of 2,000 scans; the memory of the server is read ten times a second.

The server is a process of its own, and so are those who mean no good. All share the machine. The clients speak HTTP
over plain asyncio, so that their own time is small beside the server's. Takes two minutes.

    python benchmarks/page.py [MODEL] [STORE] [--quick] [--processes 1 2] [--parts one,many,hostile] [--json FILE]

With several numbers of `--processes`, each has a server of its own, one after the other. Memory is the sum over the
server's processes, and what they share counts in each.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

console = Console(width=120)
WORDS = ["red", "old", "small", "horse", "boat", "fruit", "bird", "hat", "drum", "car", "tree", "star", "fish", "house"]
PAGES = {"page", "map", "thumbnail"}  # answered by none of the model's threads
CLIENTS, EACH = 200, 10
SLOW, HALF_OPEN, SECONDS = 200, 1100, 30
LIMIT = 1024  # descriptors of the server
MiB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/quickstart/model")
    parser.add_argument("store", nargs="?", default="runs/quickstart/stamps.lance")
    parser.add_argument("--quick", action="store_true", help="few requests: shows the shape, not the speed")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="numbers of processes that answer")
    parser.add_argument("--parts", default="one,many,hostile", help="some of them, by commas")
    parser.add_argument("--attack", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    raise_own_limit()
    if options.attack:
        asyncio.run(attack(options.attack[0], float(options.attack[1])))
        return
    parts: dict[str, Callable[[str, Kinds], Any]] = {
        "one": partial(one_client, count=5 if options.quick else 60),
        "many": partial(many_clients, clients=20 if options.quick else CLIENTS),
        "hostile": partial(hostile, seconds=3 if options.quick else SECONDS),
    }
    figures: list[dict[str, Any]] = []
    for count in options.processes:
        console.print(f"[bold]{count} process{'es' if count > 1 else ''}")
        with server(options.model, options.store, count) as (address, process, memory):
            kinds = Kinds(address)
            found = [asyncio.run(parts[part](address, kinds)) for part in options.parts.split(",")]
            found += [report("memory", {"peak of the server, MB": (memory.peak / MiB, 2048.0 * count)})]
            assert process.poll() is None, "the server ended"
        figures += [each | {"processes": count} for each in found]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


class Kinds:
    """Nine kinds of requests, each with its own words, images and ids of the store."""

    def __init__(self, address: str) -> None:
        described = httpx.get(f"{address}map", timeout=120).json()
        asked = {"tag": described["tag"], "rows": list(range(min(described["images"], 200)))}
        items = httpx.post(f"{address}map/items", json=asked, timeout=120).json()["items"]
        self.ids = [item["id"] for item in items]
        columns = httpx.get(f"{address}about").json()["columns"]
        chosen = next(((column["name"], column["values"]) for column in columns if column["values"]), None)
        self.conditions = [f"`{chosen[0]}` = '{value}'" for value in chosen[1]] if chosen else ["id > 'a'"]
        self.client = httpx.Client(base_url=address)
        self.random = random.Random(0)
        self.images = [photograph(number) for number in range(20)]
        self.names = ["words", "like", "like, condition", "image", "classify", "embed", "map", "thumbnail", "page"]

    def request(self, kind: str) -> dict[str, Any]:
        """Make the arguments of one request."""
        choose = self.random.choice
        words = " ".join(self.random.sample(WORDS, 3)) + f" {self.random.randrange(10**6)}"
        image, some = {"image": ("a.jpg", choose(self.images))}, [("images", ("a.jpg", choose(self.images)))]
        like, where = {"like": choose(self.ids), "k": 24}, choose(self.conditions)
        asked: dict[str, tuple[str, str, dict[str, Any]]] = {
            "words": ("POST", "search", {"json": {"query": words, "k": 24}}),
            "like": ("POST", "search", {"json": like}),
            "like, condition": ("POST", "search", {"json": like | {"where": where}}),
            "image": ("POST", "search", {"files": image, "data": {"k": 24}}),
            "classify": ("POST", "classify", {"files": some, "data": {"classes": ["an animal", "a fruit", "a car"]}}),
            "embed": ("POST", "embed", {"files": some}),
            "map": ("GET", choose(["map", "map/points", "map/colours"]), {}),
            "thumbnail": ("GET", "thumbnail", {"params": {"id": choose(self.ids)}}),
            "about": ("GET", "about", {}),
            "page": ("GET", choose(["", "static/app.js", "static/app.css", "about", "docs"]), {}),
        }
        method, path, arguments = asked[kind]
        return {"method": method, "url": path, **arguments}

    def encoded(self, kind: str) -> bytes:
        """Make one request as bytes."""
        request = self.client.build_request(**self.request(kind))
        head = [f"{request.method} {request.url.raw_path.decode()} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in request.headers.items()]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + request.read()


async def one_client(address: str, kinds: Kinds, count: int) -> dict[str, Any]:
    """Median milliseconds of one client on one connection."""
    goals = {"about": 3.0, "words": 10.0, "image": 30.0}
    found: dict[str, tuple[float, float]] = {}
    client = Client(address)
    for kind, goal in goals.items():
        asked = [kinds.encoded(kind) for _ in range(count + 3)]
        seconds = []
        for request in asked:
            began = time.perf_counter()
            status, _ = await client.ask(request)
            seconds.append(time.perf_counter() - began)
            assert status == 200, kind
        found[f"{kind}, ms"] = (1000 * statistics.median(seconds[3:]), goal)  # the first ones warm up
    client.close()
    return report("one client", found)


async def many_clients(address: str, kinds: Kinds, clients: int) -> dict[str, Any]:
    """All requests of many clients at once: errors, rate, and how long the slowest hundredth waits."""
    drawn = (kinds.names * (clients * EACH // len(kinds.names) + 1))[: clients * EACH]
    kinds.random.shuffle(drawn)
    counted = Counted()

    async def client(mine: list[tuple[str, bytes]]) -> None:
        connection = Client(address)
        for kind, request in mine:
            await counted.ask(connection, kind, request)
        connection.close()

    requests = [(kind, kinds.encoded(kind)) for kind in drawn]
    began = time.perf_counter()
    await asyncio.gather(*(client(requests[number::clients]) for number in range(clients)))
    rate = len(drawn) / (time.perf_counter() - began)
    found = {
        "errors": (float(sum(counted.errors.values())), 0.0),
        "requests/s": (rate, -100.0),
        "p99 of all, s": (percentile(counted.all(), 99), 4.0),
        "p99 of pages and static files, s": (percentile(counted.seconds["page"], 99), 0.5),
        "p99 of these, maps and thumbnails, s": (percentile(counted.all(PAGES), 99), 4.0),
    }
    return report(f"{clients} clients, {len(drawn):,} requests", found, counted)


async def hostile(address: str, kinds: Kinds, seconds: float) -> dict[str, Any]:
    """Good requests without a bound on their rate, beside those who mean no good, in a process of their own."""
    counted = Counted()
    attack = subprocess.Popen([sys.executable, __file__, "--attack", address, str(seconds + 2)])
    await asyncio.sleep(2)
    end = time.perf_counter() + seconds

    async def good() -> None:
        connection = Client(address)
        while time.perf_counter() < end:
            kind = kinds.random.choice(kinds.names)
            await counted.ask(connection, kind, kinds.encoded(kind))
        connection.close()

    await asyncio.gather(*(good() for _ in range(50)))
    attack.wait()
    found = {
        "errors": (float(sum(counted.errors.values())), 0.0),
        "good requests/s": (len(counted.all()) / seconds, -1.0),
        "longest wait of a good request, s": (max(counted.all(), default=float("inf")), 10.0),
    }
    return report(f"{SLOW} slow and {HALF_OPEN:,} half-open clients, uploads, a JPEG of 2,000 scans", found, counted)


async def attack(address: str, seconds: float) -> None:
    """Be all clients that mean no good."""
    end, port = time.perf_counter() + seconds, int(address.rstrip("/").rpartition(":")[2])

    async def half_open() -> None:
        while (left := end - time.perf_counter()) > 0:
            with suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\n")
                await asyncio.wait_for(reader.read(), left)  # until the server ends it, and then again
                writer.close()
            await asyncio.sleep(1)

    async def slow() -> None:
        head = b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        while time.perf_counter() < end:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head + b"Content-Length: 9999\r\n\r\n")
                while time.perf_counter() < end:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(1)
            await asyncio.sleep(1)

    async def send(make: Callable[[], dict[str, Any]]) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            while time.perf_counter() < end:
                with suppress(httpx.HTTPError):
                    await http.post("search", **make())

    async def stream() -> AsyncIterator[bytes]:  # it does not say how much comes
        for _ in range(100):
            yield bytes(MiB)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    head, scans = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n', many_scans()
    form = head + bytes(31 * MiB) + b"\r\n--b--\r\n"
    senders = [lambda: {"content": stream(), "headers": kind}] * 4 + [lambda: {"content": form, "headers": kind}] * 8
    senders += [lambda: {"files": {"image": ("a.jpg", scans)}}] * 4
    jobs = [half_open() for _ in range(HALF_OPEN)] + [slow() for _ in range(SLOW)] + [send(each) for each in senders]
    await asyncio.gather(*jobs)


class Client:
    """One client, whose connection is kept, and opened again if the server has ended it while it was idle."""

    def __init__(self, address: str) -> None:
        self.port = int(address.rstrip("/").rpartition(":")[2])
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send an encoded request; return the status and the body of the answer."""
        was_kept = self.streams is not None
        try:
            return await self._ask(request)
        except (OSError, EOFError):
            self.close()
            if not was_kept:
                raise
            return await self._ask(request)

    async def _ask(self, request: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        return int(head.split(b" ")[1]), await reader.readexactly(length)

    def close(self) -> None:
        """End the connection."""
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


class Counted:
    """Seconds and errors of requests, by their kind."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()

    async def ask(self, client: Client, kind: str, request: bytes) -> None:
        """Send a request, and note how it went."""
        began = time.perf_counter()
        try:
            status, body = await asyncio.wait_for(client.ask(request), 120)
            if status != 200:
                self.errors[f"{kind}: {status} {body[:80]!r}"] += 1
        except (OSError, EOFError, TimeoutError) as error:
            client.close()
            self.errors[f"{kind}: {type(error).__name__}"] += 1
        self.seconds[kind].append(time.perf_counter() - began)

    def all(self, kinds: set[str] | None = None) -> list[float]:
        """List the seconds of all kinds, or of some."""
        return [each for kind, some in self.seconds.items() if kinds is None or kind in kinds for each in some]


def report(title: str, found: dict[str, tuple[float, float]], counted: Counted | None = None) -> dict[str, Any]:
    """Print figures beside their goals (a negative one: at least that much); return them."""
    table = Table("", "found", "goal", title=title)
    for name, (value, goal) in found.items():
        reached = value >= -goal if goal < 0 else value <= goal
        table.add_row(
            name, f"{value:.4g}", f"{'>=' if goal < 0 else '<='} {abs(goal):g} {'' if reached else '(missed)'}"
        )
    for kind, some in sorted(counted.seconds.items()) if counted else ():
        shown = f"median {statistics.median(some):.3f} s, p99 {percentile(some, 99):.3f}, longest {max(some):.3f}"
        table.add_row(f"  {kind}", shown, f"{len(some)} requests")
    console.print(table)
    for error, count in counted.errors.most_common(5) if counted else ():
        console.print(f"{count} x {error}")
    return {"title": title, "figures": {name: value for name, (value, _) in found.items()}}


def percentile(values: list[float], percent: float) -> float:
    """Return the percentile of values; 0 if there are none."""
    return float(np.percentile(values, percent)) if values else 0.0


def photograph(number: int) -> bytes:
    """Make a JPEG of 800 x 600 that no other number gives."""
    coarse = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((800, 600), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def many_scans(scans: int = 2000, side: int = 8000) -> bytes:
    """Make a progressive JPEG of 64 megapixels whose last scan comes 2,000 times."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


class Memory(threading.Thread):
    """Reads the resident memory of a process and of those that it has started ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        process = psutil.Process(pid)
        self.processes, self.peak = [process, *process.children(recursive=True)], 0

    def run(self) -> None:
        """Read until one of them ends."""
        with suppress(psutil.Error):
            while True:
                self.peak = max(self.peak, sum(process.memory_info().rss for process in self.processes))
                time.sleep(0.1)


@contextmanager
def server(model: str, store: str, processes: int) -> Iterator[tuple[str, subprocess.Popen[str], Memory]]:
    """Run `lamplit app` with 1,024 descriptors for each process; yield its address."""
    app = [sys.executable, "-m", "lamplit", "app", model, store, "--port", "0", "--json", "--processes", str(processes)]
    command = ["sh", "-c", f'ulimit -n {LIMIT} && exec "$@"', "sh", *app]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        memory = Memory(process.pid)
        memory.start()
        try:
            yield address, process, memory
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def raise_own_limit() -> None:
    """Let this process have as many descriptors as the clients need."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, most) if most > 0 else 8192, most))


if __name__ == "__main__":
    main()
