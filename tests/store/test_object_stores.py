"""Stores in object storage: what several processes and a bad network do to them, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_server import ObjectServer
from torch.nn import functional as F

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.pairs import Pair
from lamplit.data.skipped import Skipped
from lamplit.errors import LamplitError, StoreError
from lamplit.locations.paths import path_of
from lamplit.retrieval.collection import open_collection
from lamplit.retrieval.indexing import build_index
from lamplit.store.arrays.row_vectors import read_vectors
from lamplit.store.embed import store_writer
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.embed_report import list_skipped
from lamplit.store.exchange import export_vectors, import_vectors
from lamplit.store.lance_store import Store
from lamplit.store.table import object_lock
from lamplit.store.table.store_lock import StoreBusyError, store_lock
from lamplit.towers.identity import TowerIdentity

HALF = (0.5, 0.5, 0.5)
TOWER = TowerIdentity("timm:tower", "f" * 32, 4, Preprocessing((32, 32), HALF, HALF), {"library": "timm"})


def vectors(numbers: Sequence[int]) -> torch.Tensor:
    return F.normalize(torch.tensor([[1.0, number, number % 7, -3.0] for number in numbers]), dim=1)


def write(out: str, numbers: Sequence[int], step: int = 100, **metadata: Any) -> StoreWriter:
    writer = StoreWriter(out, TOWER, centered=False)
    for start in range(0, len(numbers), step):
        some = numbers[start : start + step]
        pairs = [Pair(f"{number:04}", b"", (f"text {number}",), metadata) for number in some]
        writer.add(pairs, [f"{number:032x}" for number in some], vectors(some), "torch")
        writer.commit_if_due()
    writer.finish(None, prune=False)
    return writer


def require_whole(out: str, numbers: Sequence[int]) -> None:
    store = Store(out)
    assert store.column("id") == [f"{number:04}" for number in numbers]
    assert store.texts() == [[f"text {number}"] for number in numbers]
    assert torch.equal(store.vectors(), F.normalize(vectors(numbers).half().float(), dim=-1))


@pytest.fixture
def out(objects: ObjectServer) -> str:
    return f"{objects.root}/pairs.lance"


def test_a_store_is_what_it_is_on_a_disk(objects: ObjectServer, out: str, tmp_path: Path) -> None:
    assert not Store.exists(out)
    with pytest.raises(StoreError, match=f"no store at {out}; make one with: lamplit embed SOURCE"):
        Store(out)
    write(out, range(20))
    write(out, range(10, 30), note="theirs")
    require_whole(out, range(30))
    store = Store(out)
    assert store.path == out
    assert store.column("note") == [None] * 10 + ["theirs"] * 20
    assert store.where("note = 'theirs'").sum() == 20
    write(out, range(28, 31), note=7)
    write(out, range(31, 33), year=1999)
    write(out, range(32, 34), year="unknown")
    store = Store(out)
    assert store.column("note")[27:31] == ["theirs", "7", "7", "7"]
    assert store.column("year")[30:] == [None, "1999", "unknown", "unknown"]
    store.delete(["0003", "0030", "0031", "0032", "0033"])
    assert len(store) == 29
    report = export_vectors(store, tmp_path / "vectors")
    assert report.images == 29
    copy = f"{objects.root}/copy.lance"
    assert import_vectors(tmp_path / "vectors", copy, image_tower="timm:tower").imported == 29
    assert import_vectors(tmp_path / "vectors", copy, image_tower="timm:tower").known == 29
    assert Store(copy).texts() == store.texts()
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name.startswith("s3")) == []


def test_derived_files_are_kept_here(objects: ObjectServer, out: str) -> None:
    write(out, range(20))
    first = read_vectors(Store(out))
    objects.seen.clear()
    again = read_vectors(Store(out))
    assert again.halves.tobytes() == first.halves.tobytes()
    assert not [path for method, path, _ in objects.seen if method == "GET" and "/data/" in path]
    write(out, range(20, 25))
    assert len(read_vectors(Store(out))) == 25
    found = open_collection(Store(out), lambda zimg: zimg, TOWER.fingerprint).vectors
    np.testing.assert_allclose(found, Store(out).vectors().numpy(), atol=1e-6)


def test_the_list_of_skipped_images_lies_beside_it(out: str) -> None:
    file = list_skipped(out, [Skipped("a", "a.jpg", "empty file")])
    assert file == out.replace(".lance", ".skipped.jsonl")
    assert json.loads(path_of(file).read_text())["reason"] == "empty file"
    assert list_skipped(out, []) is None
    assert not path_of(file).exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow", "drop"])
def test_what_the_network_does_is_tried_again(
    objects: ObjectServer, out: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "COMMIT_ROWS", 10)
    numbers = iter(range(10**6))
    objects.fault = lambda method, path: fault if next(numbers) % 4 == 0 else None
    write(out, range(40), 10)
    require_whole(out, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["_versions/", "_transactions/", "data/"])
def test_an_answer_that_is_lost_doubles_nothing(
    objects: ObjectServer, out: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit was done, and who made it does not know: it looks, and does not commit again."""
    write(out, range(10))
    lost: list[str] = []

    def lose(method: str, path: str) -> str | None:
        if method != "PUT" or part not in path or len(lost) >= 2:
            return None
        lost.append(path)
        return "lose"

    objects.fault = lose
    write(out, range(10, 20))
    assert lost
    require_whole(out, range(20))


def test_another_writer_commits_first(objects: ObjectServer, out: str) -> None:
    """Between the moment a commit is prepared and the moment it is written, another process adds the same rows."""
    write(out, range(10))
    others: list[int] = []

    def overtake(method: str, path: str) -> str | None:
        if method == "PUT" and "_versions/" in path and not others:
            others.append(1)
            objects.fault = lambda method, path: None
            write(out, range(5, 25), note="theirs")
        return None

    objects.fault = overtake
    write(out, range(10, 30), note="ours")
    assert others
    require_whole(out, range(30))
    assert Store(out).column("note") == [None] * 5 + ["theirs"] * 20 + ["ours"] * 5


def test_two_writers_at_once(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "COMMIT_ROWS", 10)
    failed: list[BaseException] = []

    def run(numbers: Sequence[int]) -> None:
        try:
            write(out, numbers, 10)
        except (LamplitError, OSError) as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in (range(100), range(50, 160))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    require_whole(out, range(160))


def test_one_holds_the_lock(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, range(3))
    inside: list[int] = []

    def enter() -> None:
        with store_lock(out, "waits"):
            inside.append(1)
            assert len(inside) == 1
            inside.pop()

    with store_lock(out, "deletes rows"):
        with pytest.raises(StoreBusyError, match=rf"{out} is in use: process \d+ on .* deletes rows since 2"):
            store_lock(out, "too", 0.2).__enter__()
        write(out, range(3, 6))  # embedding does not wait
    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((path_of(out) / "_writers").iterdir())) == 1


@pytest.mark.slow
def test_the_lock_of_a_dead_process_ends(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, range(3))
    folder = path_of(out) / "_writers"
    dead = {"pid": 1, "host": "gone", "since": "2026", "doing": "died", "token": "a"}
    (folder / "lock-000000000041").write_bytes(json.dumps(dead).encode())
    with pytest.raises(StoreBusyError, match="process 1 on gone died since 2026"), store_lock(out, "asks", 0.3):
        pass
    monkeypatch.setattr(object_lock, "LEASE", 1.0)
    with store_lock(out, "deletes rows", 10):
        assert [file.name for file in folder.iterdir()] == ["lock-000000000042"]
        before = (folder / "lock-000000000042").read_bytes()
        threading.Event().wait(1.5)
        assert (folder / "lock-000000000042").read_bytes() != before  # it lives
    assert (folder / "lock-000000000042").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("deny", "access is denied; check AWS_ACCESS_KEY_ID"),
        (None, "there is no such bucket; check its name"),
    ],
)
def test_why_a_store_cannot_be_opened(objects: ObjectServer, fault: str | None, said: str) -> None:
    objects.fault = lambda method, path: fault
    bucket = objects.root if fault else "s3://no-such-bucket-here"
    with pytest.raises(StoreError, match=f"{bucket}/a.lance cannot be opened: {said}"):
        Store(f"{bucket}/a.lance")


@pytest.mark.slow
def test_no_server(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="cannot be opened: the server cannot be reached; check AWS_ENDPOINT_URL"):
        Store(out)


READS: list[Callable[[Store], object]] = [
    lambda store: store.column("id"),
    lambda store: list(store.batches("texts")),
    lambda store: store.take([0, 1]),
    lambda store: store.where("id = '0001'"),
    read_vectors,
]


def test_why_a_store_cannot_be_read(objects: ObjectServer, out: str) -> None:
    write(out, range(3))
    objects.fault = lambda method, path: "deny" if "/data/" in path else None
    for read in READS:
        with pytest.raises(StoreError, match=f"{out} cannot be read: access is denied"):
            read(Store(out))


def test_no_credentials(objects: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="cannot be opened: no credentials were found, or they have expired; set AWS_"):
        Store(f"{objects.root}/other.lance")


def test_a_write_that_is_refused(objects: ObjectServer, out: str) -> None:
    write(out, range(3))
    objects.fault = lambda method, path: "deny" if method == "PUT" else None
    with pytest.raises(StoreError, match="cannot be written: access is denied"):
        write(out, range(3, 6))
    objects.fault = lambda method, path: None
    require_whole(out, range(3))


@pytest.mark.parametrize("what", [build_index, lambda store: export_vectors(store, f"{store.path}/vectors")])
def test_what_lies_in_a_folder_alone(out: str, what: Callable[[Store], object]) -> None:
    write(out, range(3))
    with pytest.raises(LamplitError, match="lies in a folder of this machine, not at s3://"):
        what(Store(out))
