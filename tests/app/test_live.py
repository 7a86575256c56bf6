"""A store that changes while the page shows it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_store
from fastapi.testclient import TestClient

import lamplit
from lamplit.app import live
from lamplit.app.server import make_app
from lamplit.model import LiT
from lamplit.store.lance_store import Store


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


@pytest.fixture
def copied(store_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(store_path, tmp_path / "copied.lance")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def search(client: TestClient, query: str, k: int) -> list[str]:
    answer = client.post("/search", json={"query": query, "k": k})
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["hits"]]


def test_changed_store_is_shown_and_no_request_fails(model: LiT, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.05)
    store = Store(copied)
    everything = store.column("id")
    gone = everything[::3]
    failed: list[int] = []
    done = threading.Event()
    with TestClient(make_app(model, store), base_url="http://localhost") as client:

        def ask() -> None:
            while not done.is_set():
                for path in ("/about", "/map", "/thumbnail?id=" + everything[1], "/item?id=" + everything[1]):
                    if (status := client.get(path).status_code) not in (200, 404):
                        failed.append(status)
                search(client, "a picture", 5)

        asking = threading.Thread(target=ask)
        asking.start()
        assert len(search(client, "a picture", len(everything))) == len(everything)
        assert client.get("/item", params={"id": gone[0]}).status_code == 200
        Store(copied).delete(gone)
        wait_for(lambda: client.get("/health").json() == {"status": "ok", "images": len(everything) - len(gone)})
        assert set(search(client, "a picture", len(everything))) == set(everything) - set(gone)
        assert client.get("/item", params={"id": gone[0]}).status_code == 404
        assert client.get("/about").json()["images"] == client.get("/map").json()["images"]
        assert len(client.get("/map/points").content) == 8 * (len(everything) - len(gone))
        done.set()
        asking.join()
    assert failed == []


def test_store_is_followed_after_a_copy_that_had_no_data_yet(
    model: LiT, copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.05)
    with TestClient(make_app(model, Store(copied)), base_url="http://localhost") as client:
        images = client.get("/health").json()["images"]
        other = copied.parent / "copy.lance"
        shutil.copytree(copied, other)
        Store(other).delete(Store(other).column("id")[:1])
        shutil.rmtree(copied)
        shutil.copytree(other, copied, ignore=shutil.ignore_patterns("data"))
        (copied / "data").mkdir()
        wait_for(lambda: "cannot be opened again" in caplog.text)
        assert client.get("/health").json()["images"] == images
        shutil.copytree(other / "data", copied / "data", dirs_exist_ok=True)
        wait_for(lambda: client.get("/health").json()["images"] == images - 1)


def test_store_that_cannot_be_opened_again_stays_as_it_was(
    model: LiT, copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.05)
    with TestClient(make_app(model, Store(copied)), base_url="http://localhost") as client:
        images = client.get("/health").json()["images"]
        other = write_store(copied.parent / "other.lance", torch.eye(3, 16), [["a"], ["b"], ["c"]])  # of another tower
        shutil.rmtree(copied)
        shutil.move(other.path, copied)
        wait_for(lambda: "cannot be opened again" in caplog.text)
        assert client.get("/health").json()["images"] == images
        assert client.get("/about").json()["images"] == images
