from __future__ import annotations

import io
import os
import random
from pathlib import PurePosixPath

import pytest
from object_server import ObjectServer

from lamplit.locations.addresses import RemotePath, is_remote
from lamplit.locations.object_errors import RemoteError


def test_what_an_address_is() -> None:
    assert all(map(is_remote, ("s3://a", "s3://a/b", "gs://a/b", "az://a/b", "abfss://a/b", RemotePath("s3://a/b"))))
    assert not any(map(is_remote, ("", "s3:/a", "s3", "ray://a:1", "https://a/b", "a/s3://b", None)))


def test_names() -> None:
    file = RemotePath("s3://bucket/shards//a/../000.tar.gz")
    assert str(file) == file.as_posix() == "s3://bucket/shards/000.tar.gz"
    assert (file.name, file.stem, file.suffix) == ("000.tar.gz", "000.tar", ".gz")
    assert file.parent == RemotePath("s3://bucket/shards/")
    assert {file.parent: 1}[RemotePath("s3://bucket/shards")] == 1
    assert file.parent != "s3://bucket/shards"
    assert file.with_suffix("").name == "000.tar"
    assert file.with_name("1.txt") == file.parent / "1.txt" == file.absolute().parent / PurePosixPath("1.txt")
    assert file.relative_to(RemotePath("s3://bucket")) == PurePosixPath("shards/000.tar.gz")
    assert file.is_relative_to(file.parent)
    assert not file.is_relative_to(RemotePath("s3://bucket/shard"))
    # What a table may name: another object, or one of its bucket.
    assert str(file.parent / "s3://other/b.jpg") == "s3://other/b.jpg"
    assert str(file.parent / "/b.jpg") == "s3://bucket/b.jpg"
    assert str(file.parent / "../b.jpg") == "s3://bucket/b.jpg"


def test_reading(objects: ObjectServer) -> None:
    content = random.Random(0).randbytes(3_000_000)
    file = RemotePath(f"{objects.root}/a/b.bin")
    file.write_bytes(content)
    assert file.stat().st_size == len(content)
    assert (file.is_file(), file.is_dir(), file.exists()) == (True, False, True)
    assert (file.parent.is_file(), file.parent.is_dir(), file.parent.exists()) == (False, True, True)
    assert not (file.parent / "c").exists()
    assert [each.name for each in file.parent.iterdir()] == ["b.bin"]
    assert list((file.parent / "none").iterdir()) == []
    assert file.read_bytes() == content
    assert file.read_start(10) == content[:10]
    assert file.read_start(2**24) == content
    with file.open() as opened:
        for place in (0, 2_999_990, 1_000_000, 1_000_100, 5):
            opened.seek(place)
            assert opened.read(200_000) == content[place : place + 200_000]
            assert opened.tell() == min(place + 200_000, len(content))
        assert opened.seek(-10, os.SEEK_END) == len(content) - 10
        assert opened.read() == content[-10:]
        assert opened.read(1) == b""
    objects.seen.clear()
    with file.open() as opened:
        parts = [opened.read(1000) for _ in range(len(content) // 1000)]
    assert b"".join(parts) == content
    assert sum(method == "GET" for method, *_ in objects.seen) < 8  # pieces grow
    (file.parent / "empty").write_bytes(b"")
    assert (file.parent / "empty").read_start(100) == (file.parent / "empty").read_bytes() == b""
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.read_bytes()


def test_an_object_that_is_replaced_while_it_is_read(objects: ObjectServer) -> None:
    file = RemotePath(f"{objects.root}/a.bin")
    file.write_bytes(bytes(2**20))
    with io.BufferedReader(file.open()) as opened:
        opened.read(10)
        RemotePath(str(file)).write_bytes(bytes([1]) * 2**20)
        with pytest.raises(RemoteError):
            opened.read()
