"""What no client can use up: connections, memory, the threads of others."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
from conftest import write_store
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load_file, save_file
from test_server import bomb, png, said

import lamplit
from lamplit.app import answering, bodies, connections, encoding
from lamplit.app.kept_rows import KeptRows
from lamplit.app.launch import listen
from lamplit.app.server import make_app
from lamplit.app.service import Service
from lamplit.errors import ImageError
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.towers.model_folder import TEXT_GRAPH, TEXT_TOWER


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


@contextmanager
def served(model: LiT, store: Store, monkeypatch: pytest.MonkeyPatch, **settings: float) -> Iterator[int]:
    """Run the server in a thread, with settings of `connections` for impatient tests; yield its port."""
    for name, value in settings.items():
        monkeypatch.setattr(connections, name, value)
    with listen("127.0.0.1", 0) as listener:
        server = connections.server_of(make_app(model, store))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def ended(connection: socket.socket, seconds: float) -> bool:
    """Tell whether the server ends a connection within some seconds."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


HALF = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\n"
BODY = HALF + b"Content-Type: application/json\r\nContent-Length: 9999\r\n\r\n"


def test_slow_clients_are_ended(model: LiT, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(model, store, monkeypatch, HEAD_SECONDS=0.5) as port:
        for sent in (b"", HALF, BODY + b"{"):
            with socket.create_connection(("127.0.0.1", port)) as slow:
                slow.sendall(sent)
                assert ended(slow, 5), sent
        with socket.create_connection(("127.0.0.1", port)) as second:  # half a request after a whole one
            second.sendall(b"GET /docs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert second.recv(15) == b"HTTP/1.1 200 OK"
            time.sleep(1)
            second.sendall(b"GET /docs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")  # who is idle is not slow
            time.sleep(0.1)
            second.sendall(HALF)
            second.settimeout(5)
            with suppress(ConnectionResetError):
                while second.recv(2**16):
                    pass


def test_old_and_odd_requests_are_answered(
    model: LiT, store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(model, store, monkeypatch) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for path in ("/", "/about", "/static/app.js", "/search", "/none"):
            shown, told = client.get(path), client.head(path)
            assert (told.status_code, told.content) == (shown.status_code, b"")
            assert told.headers["content-length"] == str(len(shown.content))
        upgrade = {"connection": "upgrade", "upgrade": "websocket"}
        assert client.get("/about", headers=upgrade).status_code == 200
        for line, start in (
            (b"GET /about HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 200 OK"),
            (b"GET /about HTTP/1.0\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        ):
            with socket.create_connection(("127.0.0.1", port)) as old:
                old.sendall(line)
                assert old.recv(2**16).startswith(start)
    assert capfd.readouterr().err == ""


def test_half_open_connections_make_room(model: LiT, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 8)
    with served(model, store, monkeypatch) as port:
        half = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        for connection in half:
            with suppress(OSError):  # it was ended meanwhile
                connection.sendall(HALF)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.post("/search", json={"query": "ring"}).status_code == 200
            assert client.get("/about").status_code == 200
        assert sum(ended(connection, 0.2) for connection in half) >= 22
        for connection in half:
            connection.close()


def test_client_that_goes_away_is_no_error(
    model: LiT, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(model, store, monkeypatch) as port:
        for sent in (BODY + b"{", BODY.replace(b"application/json", b"multipart/form-data; boundary=b") + b"--b\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as gone:
                gone.sendall(sent)
                time.sleep(0.2)
        time.sleep(0.3)
        assert httpx.get(f"http://127.0.0.1:{port}/about").status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_connections_leave_room_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for allowed, most in ((1024, 448), (64, 16), (10**6, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        assert connections.most_connections() == most


def test_images_that_are_sent_have_few_pixels_and_scans(model: LiT, store: Store) -> None:
    client = TestClient(make_app(model, store), base_url="http://127.0.0.1")
    file = io.BytesIO()
    Image.new("L", (4000, 4000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    scans = data[:last] + data[last:-2] * 500 + data[-2:]
    began = time.monotonic()
    for sent, reason in ((scans, r"50\d scans of 16.0 megapixels"), (bomb(6000, 6000), "36.0 megapixels")):
        answer = client.post("/search", files={"image": ("a", sent)})
        assert answer.status_code == 422
        assert re.search(reason, said(answer))
    assert time.monotonic() - began < 5


def test_images_that_wait_go_through_the_tower_together(model: LiT, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, passes = encoding.ImageEncoder(model), []
    backend = encoder._open_backend()
    encoder._backend = lambda pixels: (passes.append(len(pixels)), time.sleep(0.1), backend(pixels))[2]
    sent = [png(color) for color in ("red", "green", "blue", "white", "black", "yellow")]

    async def ask() -> list[torch.Tensor]:
        return await asyncio.gather(*(encoder.encode(io.BytesIO(image)) for image in sent))

    found = torch.stack(asyncio.run(ask()))
    assert sum(passes) == len(sent) > len(passes)
    torch.testing.assert_close(found, model.encode_images(sent).cpu(), atol=1e-4, rtol=0)
    with pytest.raises(ImageError, match="not an image"):
        asyncio.run(encoder.encode(io.BytesIO(b"no image")))


def test_tower_that_breaks_keeps_nobody_waiting(model: LiT) -> None:
    encoder = encoding.ImageEncoder(model)
    encoder._backend = lambda pixels: pixels[99]
    with pytest.raises(RuntimeError, match="the image tower failed"):
        asyncio.run(encoder.encode(io.BytesIO(png())))


def test_one_that_is_cancelled_takes_nobody_with_it(model: LiT) -> None:
    """While the tower is at work on a first image, others wait; some go before their pass and some during it."""
    encoder, passes = encoding.ImageEncoder(model), []
    backend = encoder._open_backend()
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def step_by_step(pixels: torch.Tensor) -> torch.Tensor:
        passes.append(len(pixels))
        begun.release()
        go_on.acquire()
        return backend(pixels)

    encoder._backend = step_by_step
    sent = [png(color) for color in ("red", "green", "blue", "white")]

    async def ask() -> list[torch.Tensor | BaseException]:
        asked = [asyncio.create_task(encoder.encode(io.BytesIO(sent[0])))]
        await asyncio.to_thread(begun.acquire)
        asked += [asyncio.create_task(encoder.encode(io.BytesIO(image))) for image in sent[1:]]
        while len(encoder._waiting) < 3:
            await asyncio.sleep(0.01)
        asked[1].cancel()
        await asyncio.sleep(0)
        go_on.release()
        await asyncio.to_thread(begun.acquire)
        asked[2].cancel()
        await asyncio.sleep(0)
        go_on.release()
        return await asyncio.gather(*asked, return_exceptions=True)

    first, before, during, last = asyncio.run(ask())
    assert passes == [1, 2]
    assert isinstance(before, asyncio.CancelledError)
    assert isinstance(during, asyncio.CancelledError)
    expected = model.encode_images([sent[0], sent[3]]).cpu()
    for found, vector in ((first, expected[0]), (last, expected[1])):
        assert isinstance(found, torch.Tensor), found
        torch.testing.assert_close(found, vector, atol=1e-4, rtol=0)


def test_json_of_all_clients_is_bounded(model: LiT, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "ALL_JSON", 100)
    client = TestClient(make_app(model, store), base_url="http://127.0.0.1")
    answer = client.post("/search", json={"query": "a" * 200})
    assert (answer.status_code, said(answer)) == (503, "too many send much at once; ask again")
    assert client.post("/search", json={"query": "a"}).status_code == 200


def test_browser_that_has_a_file_gets_it_not_again(model: LiT, store: Store) -> None:
    client = TestClient(make_app(model, store), base_url="http://127.0.0.1")
    first = client.get("/static/app.js")
    assert first.headers["content-type"].startswith("text/javascript")
    again = client.get("/static/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/static/none.js").status_code == 404


def test_kept_rows_are_those_of_the_store(tmp_path: Path) -> None:
    texts = [[f"text {number}"] for number in range(10)]
    store = write_store(tmp_path / "a.lance", torch.eye(10, 16), texts, [{"year": number} for number in range(10)])
    rows = KeptRows(store, kept=3)
    for asked in ([1, 2, 3], [3, 1, 1], [9, 8, 7, 6, 5], [], [0, 9]):
        found = rows.take(asked)
        assert [row["texts"] for row in found] == [texts[row] for row in asked]
        assert [row["metadata"] for row in found] == [{"year": row} for row in asked]
        assert len(rows._rows) <= 3


def test_rows_of_a_small_store_are_read_at_once(tmp_path: Path) -> None:
    texts = [[f"text {number}"] for number in range(10)]
    store = write_store(tmp_path / "a.lance", torch.eye(10, 16), texts)
    rows = KeptRows(store)
    shutil.rmtree(tmp_path / "a.lance")
    assert [row["texts"] for row in rows.take([9, 0, 4])] == [texts[9], texts[0], texts[4]]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not know the threads of a process apart")
def test_searches_let_pages_go_first(model: LiT, store: Store) -> None:
    service = Service(model, store)
    pools = [service.showing, service.mapping, service.searching, service.classifying, service.embedding]
    priorities = [pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) for pool in pools]
    own = os.getpriority(os.PRIO_PROCESS, 0)
    asked = [encoding.AT_ONCE] * 2 + [encoding.LATER] * 3
    assert [each.result() - own for each in priorities] == asked


def test_collection_of_garbage_does_not_look_at_the_model(model_path: Path, store_path: Path) -> None:
    frozen: list[int] = []

    def started(_: str) -> None:
        threading.Thread(target=stop, daemon=True).start()

    def stop() -> None:
        while not gc.get_freeze_count():
            time.sleep(0.01)
        frozen.append(gc.get_freeze_count())
        time.sleep(0.5)  # until the server has taken the signal
        os.kill(os.getpid(), signal.SIGINT)

    with suppress(KeyboardInterrupt):
        lamplit.serve(model_path, store_path, port=0, started=started)
    assert frozen[0] > 100_000
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_words_of_other_weights_are_made_again(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    (folder / TEXT_GRAPH).unlink(missing_ok=True)
    words = answering._open_words(str(folder), None)
    assert words is not None
    weights = load_file(folder / TEXT_TOWER)
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, folder / TEXT_TOWER)
    made = (folder / TEXT_GRAPH).read_bytes()
    again = answering._open_words(str(folder), None)
    assert again is not None
    assert (folder / TEXT_GRAPH).read_bytes() != made
    expected = lamplit.load(folder, towers="text").encode_texts(["a ring"]).numpy()
    assert abs(again.encode_texts(["a ring"]) - expected).max() < 1e-4
    assert abs(words.encode_texts(["a ring"]) - expected).max() > 1e-3
