from __future__ import annotations

import sys
from pathlib import Path

import pytest
from object_server import ObjectServer

from lamplit.data.sources import read_pairs
from lamplit.errors import MissingExtraError, UsageError
from lamplit.locations.paths import find_files, lance_options, path_of, require_local, write_new, write_whole


def test_a_path_is_a_path(tmp_path: Path) -> None:
    for name in (tmp_path, "a/b.csv", "C:/a", "hf:ann/stamps", "https://example.org/a.tar", "file:///a", "~/a"):
        assert isinstance(path_of(name), Path)
        assert str(path_of(name)) == str(Path(name))
        assert lance_options(name) == {}
        require_local(name, "a run")
    for address in ("s3://bucket/run", Path("s3://bucket/run")):
        with pytest.raises(UsageError, match="a run lies in a folder of this machine, not at s3://bucket/run; give a"):
            require_local(address, "a run")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {}),
        ({"AWS_ENDPOINT_URL": "https://a.org"}, {"aws_endpoint": "https://a.org"}),
        ({"AWS_ENDPOINT_URL": "http://a.org"}, {"aws_endpoint": "http://a.org", "allow_http": "true"}),
        (
            {"AWS_ENDPOINT_URL": "http://a.org", "AWS_ENDPOINT_URL_S3": "https://b.org"},
            {"aws_endpoint": "https://b.org"},
        ),
    ],
)
def test_what_lance_is_told(
    variables: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = lance_options("s3://bucket/a.lance")
    assert int(options.pop("client_max_retries")) > 3
    assert options == expected
    assert not lance_options("gs://bucket/a.lance").keys() & {"aws_endpoint", "allow_http"}


def test_files_on_a_disk(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "a-2.tar"):
        (tmp_path / name).touch()
    names = [str(tmp_path / f"a-{number}.tar") for number in range(3)]
    assert list(map(str, find_files(f"{tmp_path}/a-{{0..2}}.tar"))) == names
    assert list(map(str, find_files(f"{tmp_path}/a-*.tar"))) == names
    with pytest.raises(FileNotFoundError, match="there is no file for 3"):
        find_files(f"{tmp_path}/a-{{2..3}}.tar")


def test_new_files_on_a_disk(tmp_path: Path) -> None:
    assert write_new(tmp_path / "a", b"first")
    assert not write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    write_whole(tmp_path / "a", "third")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"third")]


def test_new_objects(objects: ObjectServer) -> None:
    file = path_of(f"{objects.root}/a")
    assert write_new(file, b"first")
    assert not write_new(file, b"second")
    assert file.read_bytes() == b"first"
    write_whole(file, "third")
    assert file.read_bytes() == b"third"
    lost: list[str] = []

    def lose_once(method: str, path: str) -> str | None:
        if method == "PUT" and not lost:
            lost.append(path)
            return "lose"
        return None

    objects.fault = lose_once
    assert write_new(path_of(f"{objects.root}/b"), b"mine")  # it was written, and the second attempt finds it
    assert lost


@pytest.mark.parametrize(
    ("package", "source", "said"),
    [
        ("s3fs", "s3://bucket/a.tar", "s3fs is not installed; type: pip install 'lamplit[s3]'"),
        ("gcsfs", "gs://bucket/a.tar", "gcsfs is not installed; type: pip install gcsfs"),
        ("adlfs", "az://container/a.tar", "adlfs is not installed; type: pip install adlfs"),
    ],
)
def test_what_is_not_installed(package: str, source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        read_pairs(source)
    assert str(caught.value) == said
