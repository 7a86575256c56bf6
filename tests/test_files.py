from __future__ import annotations

import os
import shutil
import time
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import FolderHandler, serve

from lamplit.errors import UsageError
from lamplit.files import _machine, cache_folder, download, replacing, replacing_parts, write_text


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("LAMPLIT_CACHE", "~/images")
    assert cache_folder() == Path.home() / "images"
    monkeypatch.delenv("LAMPLIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lamplit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lamplit"


class BreaksOff(BaseHTTPRequestHandler):
    """Promises ten bytes and sends three."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"abc")

    def log_message(self, *_: object) -> None:
        pass


def test_download(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.npz").write_bytes(content)
    file = tmp_path / "cache" / "lit" / "a.npz"
    with serve(partial(FolderHandler, directory=tmp_path / "served")) as address:
        download(f"{address}/a.npz", file)
    assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with serve(BreaksOff) as address, pytest.raises(OSError, match="broke off after 3 of 10 bytes"):
        download(f"{address}/a.npz", tmp_path / "cache" / "a.npz")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with (
        serve(partial(FolderHandler, directory=tmp_path)) as address,
        pytest.raises(OSError, match="404"),
    ):
        download(f"{address}/a.npz", tmp_path / "cache" / "a.npz")
    assert list((tmp_path / "cache").iterdir()) == []


def test_write_text_replaces(tmp_path: Path) -> None:
    for text in ("first, and long", "größer"):
        write_text(tmp_path / "report.json", text)
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == "größer"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_replacing_gives_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "weights") as partial:
            partial.touch(mode=0o600)
        assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_replacing_leaves_the_old_where_writing_fails(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    for name in ("a", "folder"):
        with pytest.raises(FileNotFoundError), replacing(tmp_path / name) as partial:
            (partial / "nowhere").touch()
    assert (tmp_path / "a").read_text() == "old"
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["old"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_replacing_a_folder_gives_its_files_the_permissions_of_the_umask(tmp_path: Path) -> None:
    with replacing(tmp_path / "folder") as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "weights").touch(mode=0o600)
    (tmp_path / "new").touch()
    assert (tmp_path / "folder" / "inner" / "weights").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_replacing_parts(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    for text in ("first", "second"):
        with replacing_parts(tmp_path, "last") as partial:
            (partial / "last").write_text(text)
            (partial / "folder").mkdir()
            (partial / "folder" / text).touch()
        assert (tmp_path / "last").read_text() == text
        assert [file.name for file in (tmp_path / "folder").iterdir()] == [text]
    with pytest.raises(FileNotFoundError), replacing_parts(tmp_path, "last") as partial:
        shutil.copytree(tmp_path / "nowhere", partial / "folder")
    assert (tmp_path / "last").read_text() == "second"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "kept", "last"]


def test_parts_that_do_not_belong_to_the_new_ones(tmp_path: Path) -> None:
    for name in ("last", "old", "kept"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(FileNotFoundError), replacing_parts(tmp_path, "last", ["old", "folder"]):
        (tmp_path / "nowhere").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "kept", "last", "old"]
    with replacing_parts(tmp_path, "last", ["old", "folder", "never there"]) as partial:
        (partial / "last").touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept", "last"]


def test_replacing_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["new"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Containers that share a folder often have one number for their processes."""
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"  # which was written first, and finished last
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("machine", "process", "days", "is_left"),
    [
        (None, 999_999_999, 0, True),
        (None, None, 9, False),
        ("ffff", 999_999_999, 0, False),
        ("ffff", 1, 2, True),
    ],
)
def test_what_killed_processes_left(
    tmp_path: Path, machine: str | None, process: int | None, days: float, is_left: bool
) -> None:
    left = tmp_path / f".a.{machine or _machine()}.{process or os.getpid()}.00.partial"
    left.mkdir()
    (left / "half").touch()
    os.utime(left, (time.time() - 86_400 * days,) * 2)
    write_text(tmp_path / "a", "whole")
    assert left.exists() == (not is_left)


@pytest.mark.parametrize("name", ["s3://bucket/report.json", "gs://bucket/run/config.json"])
def test_an_address_is_not_written_to_a_folder_of_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is an address, and this is written on the disk of this machine"):
        write_text(Path(name), "{}")
    assert list(tmp_path.iterdir()) == []
