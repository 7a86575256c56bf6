from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.data.archives import tar_members, tars
from lamplit.data.archives.tars import TarSamples
from lamplit.data.pairs import Pair
from lamplit.data.skipped import Skipped
from lamplit.data.sources import read_pairs
from lamplit.errors import PairsError


def tar_bytes(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(tar_bytes(members))
    return path


def read(path: Path, **options: Any) -> list[tuple[str, bytes, tuple[str, ...], dict[str, Any]]]:
    return [(pair.id, pair.image, pair.texts, pair.metadata) for pair in read_pairs(path, **options)]  # type: ignore[misc]


def test_endings_of_two_parts(tmp_path: Path) -> None:
    members = {"0.input.jpg": b"A", "0.outputs.txt": b"a cat", "1.input.jpg": b"B", "1.outputs.txt": b"a dog"}
    file = write(tmp_path / "a.tar", members)
    expected = [("0", b"A", ("a cat",), {}), ("1", b"B", ("a dog",), {})]
    assert read(file) == expected
    assert read(file, text_column="outputs.txt", image_column="input.jpg") == expected
    assert read(file, text_column="txt", image_column="jpg") == expected


def test_endings_that_are_named_hold_what_they_are_named_for(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.tar",
        {"0.img": b"A", "0.cap": b"a cat", "1.IMG": b"B", "1.cap": "é, ü, 日本, ".encode() + b"a d\xffg "},
    )
    expected = [("0", b"A", ("a cat",), {}), ("1", b"B", ("é, ü, 日本, a d\N{REPLACEMENT CHARACTER}g",), {})]
    assert read(file, image_column="img", text_column="cap") == expected
    with pytest.raises(PairsError, match="no images in its first samples; it has img, cap"):
        read_pairs(file)


def test_names_with_dots_are_told_apart(tmp_path: Path) -> None:
    members = {f"shot 12.{n}.{end}": f"{n}{end}".encode() for n in range(500) for end in ("jpg", "txt")}
    file = write(tmp_path / "a.tar", members)
    pairs = read_pairs(file)
    assert list(pairs) == [Pair(f"shot 12.{n}", f"{n}jpg".encode(), (f"{n}txt",), {}) for n in range(500)]
    assert pairs.notes == ["images that share their name up to a dot are each an image of its own, such as shot 12.0"]


def test_several_views_share_the_texts_of_their_key(tmp_path: Path) -> None:
    members = {
        "0.left.jpg": b"L", "0.right.jpg": b"R", "0.right.txt": b"on the right", "0.txt": b"both",
        "0.json": b'{"year": 1999}', "1.left.jpg": b"l", "1.mask.png": b"m", "1.prompt.txt": b"whose?",
    }  # fmt: skip
    file = write(tmp_path / "a.tar", members)
    assert read(file) == [
        ("0.left", b"L", ("both",), {"year": 1999}),
        ("0.right", b"R", ("on the right",), {"year": 1999}),
        ("1.left", b"l", (), {}),
        ("1.mask", b"m", (), {}),
        ("1.prompt", b"", ("whose?",), {}),
    ]
    assert read(file, image_column="left.jpg", text_column="txt")[1] == ("1", b"l", ("whose?",), {})


def test_a_second_image_is_never_dropped_unsaid(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path / "a.tar", {"0.jpg": b"A", "0.png": b"B", "0.txt": b"x"}))
    for _ in range(2):
        assert list(pairs) == [Pair("0", b"A", ("x",), {})]
        assert pairs.problems == [Skipped("0.png", "0.png", "a second image of sample 0, of which the .jpg is read")]


def test_json_in_tars(tmp_path: Path) -> None:
    members = {
        "0.jpg": b"A", "0.captions.json": b'["one", "two"]', "0.meta.json": b'{"year": 1, "jpg": "x", "txt": 2}',
        "0.txt": b"", "1.jpg": b"B", "1.json": b"[" * 100_000, "1.captions.json": b"{",
    }  # fmt: skip
    pairs = read_pairs(write(tmp_path / "a.tar", members), text_column="captions")
    first, second = pairs
    assert first == Pair("0", b"A", ("one", "two"), {"year": 1, "jpg": "x", "json.txt": 2, "txt": ""})
    assert second.metadata == {"json": "[" * 100_000, "captions.json": "{"}


SHARD = {f"{n:03}.{end}": f"{n}{end}".encode() * 99 for n in range(4) for end in ("jpg", "txt", "json", "mp4")}
WHOLE = tar_bytes(SHARD)


@settings(max_examples=60)
@given(st.integers(0, len(WHOLE)))
def test_a_shard_that_was_cut_off_gives_what_is_whole(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "0.tar").write_bytes(WHOLE[:length])
    write(folder / "1.tar", {"last.jpg": b"Z"})
    problems: list[Skipped] = []
    samples = TarSamples([folder / "0.tar", folder / "1.tar"], notes=[], problems=problems)
    *found, last = samples
    assert last.key == "last"
    (folder / "0.tar").write_bytes(WHOLE)
    expected = list(TarSamples([folder / "0.tar"], notes=[], problems=[]))[: len(found)]
    assert found[:-1] == expected[:-1]
    for sample, whole in zip(found[-1:], expected[-1:], strict=True):  # nobody knows what of it did not come
        assert (sample.key, sample.image) == (whole.key, whole.image)
        assert sample.cells.items() <= whole.cells.items()
    end = len(WHOLE.rstrip(b"\0")) // 512 * 512 + 512
    assert [problem.id for problem in problems] == ([] if length > end else ["0.tar"])
    assert all(problem.reason.endswith(f"; samples read before that: {len(found)}") for problem in problems)
    # A sample takes 4 headers and 4 to 5 blocks of content; only the one that the cut goes through is lost.
    assert len(found) >= length // (9 * 512) - 1


def test_a_shard_that_is_damaged_is_a_problem_and_the_next_are_read(tmp_path: Path) -> None:
    first = WHOLE[: 10 * 512] + b"\xff" * 512 + WHOLE[11 * 512 :]
    (tmp_path / "0.tar").write_bytes(first)
    (tmp_path / "1.tar").write_bytes(WHOLE + WHOLE)
    (tmp_path / "2.tar").write_bytes(b"")
    (tmp_path / "3.tar").write_bytes(WHOLE.rstrip(b"\0") + b"\0" * (-len(WHOLE.rstrip(b"\0")) % 512))
    write(tmp_path / "4.tar", {"last.png": b"Z"})
    pairs = read_pairs(tmp_path)
    ids = [pair.id for pair in pairs]
    assert ids[-1] == "last"
    assert len(ids) == 2 + 4 + 0 + 4 + 1
    assert [(problem.id, problem.reason.partition(";")[0]) for problem in pairs.problems] == [
        ("0.tar", "cut off or damaged (bad checksum)"),
        ("1.tar", "more data is behind the tar's end, as if several were one file"),
        ("2.tar", "its end is not marked: it was cut off, or its writer was not closed"),
        ("3.tar", "its end is not marked: it was cut off, or its writer was not closed"),
    ]
    assert pairs.problems[0].reason.endswith("; samples read before that: 2")
    with pytest.raises(PairsError, match=r"2.tar cannot be read: 2.tar: its end is not marked"):
        read_pairs(tmp_path / "2.tar")


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.tgz", gzip.compress), ("a.tar.gz", gzip.compress), ("a.tar.bz2", bz2.compress), ("a.txz", lzma.compress)],
)
def test_compressed_tars(tmp_path: Path, name: str, compress: Any) -> None:
    whole = compress(WHOLE[:9000]) + compress(WHOLE[9000:])  # as pigz and others write them
    (tmp_path / name).write_bytes(whole)
    for source in (tmp_path, tmp_path / name):
        pairs = read_pairs(source)
        assert [pair.id for pair in pairs] == ["000", "001", "002", "003"]
        assert pairs.problems == []
    (tmp_path / name).write_bytes(whole[:-20])
    pairs = read_pairs(tmp_path / name)
    assert len(list(pairs)) >= 1
    assert [problem.id for problem in pairs.problems] == [name]


def test_zstandard_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_members, "find_spec", lambda name: None)  # as before Python 3.14
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(PairsError, match=r"type: zstd -d .*a\.tar\.zst"):
        read_pairs(tmp_path / "a.tar.zst")


def sparse(name: str, size: int) -> bytes:
    """Write a header of the old GNU format that claims `size` bytes, of which none are in the file."""
    info = tarfile.TarInfo(name)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_members_of_absurd_size_are_problems_and_not_memory(tmp_path: Path) -> None:
    good = tar_bytes({"0.jpg": b"A", "0.txt": b"a"}).rstrip(b"\0")
    good += b"\0" * (-len(good) % 512)
    content = good + sparse("1.jpg", 2**40) + sparse("1.txt", 2**30) + tar_bytes({"2.jpg": b"B"})
    (tmp_path / "a.tar").write_bytes(content)
    tracemalloc.start()
    pairs = read_pairs(tmp_path / "a.tar")
    assert [(pair.id, pair.image) for pair in pairs] == [("0", b"A"), ("2", b"B")]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
    assert [(problem.id, problem.reason) for problem in pairs.problems] == [
        ("1.jpg", "1,048,576 MiB, more than the bound of 2,048"),
        ("1.txt", "1,024 MiB, more than the bound of 16"),
    ]


def test_a_header_of_absurd_size_is_damage(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 2**28
    content = tar_bytes({"0.jpg": b"A"})[:1024] + header.tobuf(tarfile.USTAR_FORMAT) + b"\0" * 2**28
    (tmp_path / "a.tgz").write_bytes(gzip.compress(content, 1))
    pairs = read_pairs(tmp_path / "a.tgz")
    assert [pair.id for pair in pairs] == ["0"]
    [problem] = pairs.problems
    assert "a header claims 268,435,456 bytes" in problem.reason


def test_links_and_files_without_an_ending_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in {"0.jpg": tarfile.REGTYPE, "1.jpg": tarfile.LNKTYPE, "2.jpg": tarfile.SYMTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg" if kind != tarfile.REGTYPE else ""
            info.size = 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"abc"))
        archive.addfile(tarfile.TarInfo("README"))
    pairs = read_pairs(tmp_path / "a.tar")
    assert [pair.id for pair in pairs] == ["0"]
    reason = "not a file but a link; write the tar with --dereference --hard-dereference"
    assert pairs.problems == [Skipped(name, f"{tmp_path}/a.tar/{name}", reason) for name in ("1.jpg", "2.jpg")]
    assert pairs.notes == ["files without an ending are left out, such as README"]


def test_what_is_neither_image_nor_text_is_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", {"0.mp4": bytes(2**25), "0.jpg": b"A", "0.cls": b"3"})
    tracemalloc.start()
    assert read(file) == [("0", b"A", (), {"cls": "3"})]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_MAX_GROUP_FILES", 10)
    file = write(tmp_path / "a.tar", {f"shot.{n}.{end}": b"x" for n in range(3000) for end in ("jpg", "txt")})
    samples = TarSamples([file], notes=[], problems=[])
    tracemalloc.start()
    assert sum(sample.cells == {"txt": "x"} and len(sample.image) for sample in samples) == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
