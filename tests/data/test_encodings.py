from __future__ import annotations

from pathlib import Path

import pytest

from lamplit.data.tables import encodings
from lamplit.data.tables.encodings import find_encoding, open_text


def written(path: Path, content: bytes) -> Path:
    (path / "a.csv").write_bytes(content)
    return path / "a.csv"


@pytest.mark.parametrize(
    ("encoding", "text", "note"),
    [
        ("utf-8", "image,text\na,café 日本\n", ""),
        ("utf-8-sig", "image,text\na,café\n", ""),
        ("utf-16", "image,text\na,café 日本\n", "a.csv is read as UTF-16"),
        ("utf-16-le", "image,text\na,café\n", "a.csv is read as UTF-16"),
        ("utf-16-be", "image,text\na,café\n", "a.csv is read as UTF-16"),
        ("utf-32", "image,text\na,café\n", "a.csv is read as UTF-32"),
        ("cp1252", "image,text\na,café – “quoted”\n", "a.csv is not UTF-8 and is read as Windows-1252 (Latin-1)"),
        ("latin-1", "image,text\na,caf\x81 é\n", "a.csv is not UTF-8 and is read as Latin-1"),
        ("ascii", "", ""),
    ],
)
def test_an_encoding_is_found(tmp_path: Path, encoding: str, text: str, note: str) -> None:
    found = find_encoding(file := written(tmp_path, text.encode(encoding)))
    assert found.note.partition(";")[0] == note
    with open_text(file, found) as opened:
        assert opened.read() == text


def test_a_damaged_byte_among_utf8_spoils_no_other(tmp_path: Path) -> None:
    file = written(tmp_path, "é, ü, 日本, ß, ".encode() + b"\xff, \xef\xbf\xbd")
    found = find_encoding(file)
    assert found.note == "1 byte of a.csv is not UTF-8 and becomes U+FFFD"
    with open_text(file, found) as opened:
        assert opened.read() == "é, ü, 日本, ß, \ufffd, \ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_across_blocks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(encodings, "_BLOCK_BYTES", size)
    assert find_encoding(written(tmp_path, "aé日😀b".encode())).name == "utf-8-sig"
    assert find_encoding(written(tmp_path, "aébü".encode("latin-1"))).name == "cp1252"
    assert find_encoding(written(tmp_path, "日😀".encode()[:-1])).errors == "replace"
