from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.errors import TowerError
from lamplit.towers.published import npz
from lamplit.towers.published.npz import ArrayFile

REFUSED = r"a\.npz cannot be read as a published model: "


class Executed:
    """What makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.npz"


def zipped(file: Path, **members: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(save: object, file: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "img/cls": generator.normal(size=(1, 1, 7)).astype(np.float32),
        "half": generator.normal(size=(3, 2)).astype(np.float16),
        "double": generator.normal(size=5),
        "big/endian": generator.normal(size=(2, 2)).astype(">f4"),
        "fortran": np.asfortranarray(generator.normal(size=(4, 3)).astype(np.float32)),
        "scalar": np.float32(3).reshape(()),
    }
    save(file, **arrays)  # type: ignore[operator]
    found = ArrayFile(file)
    assert found.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        read = found.read(name)
        assert read.dtype == torch.float32
        assert np.array_equal(read.numpy(), array.astype(np.float32))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
@settings(max_examples=30)
def test_bfloat16_is_read_from_what_numpy_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    file = tmp_path_factory.mktemp("bf16") / "a.npz"
    expected = torch.tensor(values).to(torch.bfloat16)
    np.savez(file, a=expected.view(torch.int16).numpy().view("V2"))
    assert torch.equal(ArrayFile(file).read("a"), expected.float())


def test_a_pickle_that_poses_as_one_is_not_unpickled(file: Path, tmp_path: Path) -> None:
    evil = pickle.dumps(Executed(tmp_path / "executed"))
    file.write_bytes(evil)
    with pytest.raises(TowerError, match=REFUSED + "File is not a zip file"):
        ArrayFile(file)
    zipped(file, a=evil)
    with pytest.raises(TowerError, match=REFUSED + "the magic string is not correct"):
        ArrayFile(file)
    assert not (tmp_path / "executed").exists()
    pickle.loads(evil)  # and it would have been
    assert (tmp_path / "executed").exists()


def test_objects_are_not_unpickled(file: Path, tmp_path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Executed(tmp_path / "executed")
    np.savez(file, a=array)
    with pytest.raises(TowerError, match=REFUSED + "its array a.npy holds Python objects"):
        ArrayFile(file)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.arange(3), "int64"),
        (np.array(["a"]), "<U1"),
        (np.zeros(2, np.complex64), "complex64"),
        (np.zeros(2, "V4"), r"\|V4"),
        (np.zeros(2, [("a", "f4")]), r"\[\('a', '<f4'\)\]"),
        (np.zeros(2, [("a", "V2")]), r"\[\('a', 'V2'\)\]"),
    ],
)
def test_only_floating_point_numbers_are_weights(array: np.ndarray, kind: str, file: Path) -> None:
    np.savez(file, a=array)
    with pytest.raises(TowerError, match=REFUSED + f"its array a.npy is of {kind}; expected floating-point numbers"):
        ArrayFile(file)


def test_what_says_it_is_larger_than_it_is(file: Path) -> None:
    content = npy(np.zeros((3, 2), np.float32))
    for shape in (b"(9, 9)", b"(3, 1)", b"(-3, -2)", b"(99999999999999999999, 2)"):
        padding = len(b"(3, 2)") - len(shape)
        changed = content.replace(b"(3, 2)", shape)
        changed = changed.replace(b" " * -padding, b"", 1) if padding < 0 else changed
        zipped(file, a=changed)
        with pytest.raises(TowerError, match=REFUSED + "its array a.npy is not of the size it says"):
            ArrayFile(file)


def test_bombs_are_refused_unread(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(file, a=np.zeros(300_000, np.float32), b=np.zeros(300_000, np.float32))
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(npz, "MAX_BYTES", 2_400_000)
    assert len(ArrayFile(file).shapes) == 2
    monkeypatch.setattr(npz, "MAX_BYTES", 2_399_999)
    with pytest.raises(TowerError, match=REFUSED + "it unpacks to 2,400,000 bytes; at most 2,399,999 are read"):
        ArrayFile(file)
    monkeypatch.setattr(npz, "MAX_ARRAYS", 1)
    with pytest.raises(TowerError, match=REFUSED + "it has 2 members"):
        ArrayFile(file)


def test_other_members_and_names_twice(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(TowerError, match=REFUSED + "its member readme.txt is no array"):
        ArrayFile(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(1)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", npy(np.zeros(1)))
    with pytest.raises(TowerError, match=REFUSED + "it has two members of the same name"):
        ArrayFile(file)


def test_no_file(file: Path) -> None:
    with pytest.raises(TowerError, match=REFUSED + ".*No such file"):
        ArrayFile(file)


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")  # numpy's, of headers that Python 2 might have written
@given(st.data())
@settings(max_examples=300)
def test_damaged_files_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is wrong, it is one error or the true values: every member has a checksum."""
    file = tmp_path_factory.getbasetemp() / "damaged.npz"
    arrays = {"a": np.arange(20, dtype=np.float32), "b": np.ones((2, 3), np.float32)}
    np.savez_compressed(file, **arrays)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        found = ArrayFile(file)
        for name in found.shapes:
            read = found.read(name)
            if name in arrays:
                assert np.array_equal(read.numpy(), arrays[name])
    except TowerError:
        pass
