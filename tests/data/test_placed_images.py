"""Images inside tars and tables, read by their paths: the same bytes, and a sentence for all that is not there."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from packed_images import PACKED, ROWS_OF_A_GROUP, as_table, drawings, pack, samples, write_arrow, write_tar
from pyarrow import parquet

from lamplit.data.decoding.images import open_bytes, read_thumbnail
from lamplit.data.inputs import decode_input
from lamplit.data.pairs import Pair
from lamplit.data.places import placed_images
from lamplit.data.places.image_files import file_holding, read_image
from lamplit.data.sources import read_pairs
from lamplit.errors import ImageError

COUNT = 20


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty drawings in a tar and in tables; to be read only."""
    return pack(tmp_path_factory.mktemp("packed"), drawings(image_folder, COUNT))


def encoded(pair: Pair) -> bytes:
    assert isinstance(pair.image, bytes)
    return pair.image


def reason(path: object) -> str:
    """Return why an image cannot be read; any other error fails the test."""
    with pytest.raises(ImageError) as raised:
        read_image(str(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def require_places(source: object, count: int = COUNT) -> list[Pair]:
    """Read all images of a source by their paths alone."""
    pairs = list(read_pairs(str(source)))
    assert len({pair.path for pair in pairs}) == len(pairs) == count
    for pair in pairs:
        assert os.path.isabs(pair.path)
        assert pair.path != pair.id
        assert read_image(pair.path) == pair.image
    return pairs


# --- The same bytes as were embedded


@pytest.mark.parametrize("name", PACKED)
def test_every_image_is_read_by_its_path(folder: Path, name: str, image_folder: Path) -> None:
    pairs = require_places(folder / name)
    assert [pair.image for pair in pairs] == [image for _, image, _ in drawings(image_folder, COUNT)]
    assert {file_holding(pair.path) for pair in pairs} == {str(folder / name)}


def test_paths_say_where(folder: Path, image_folder: Path) -> None:
    (_, first, _), (_, second, caption) = drawings(image_folder, 2)
    path = next(iter(read_pairs(folder / "shard.tar"))).path
    assert path == f"{folder}/shard.tar#bytes=512-{511 + len(first)},name=0000.jpg"
    [*_, last] = read_pairs(folder / "cells.parquet")
    assert last.path == f"{folder}/cells.parquet#row=19,column=image"
    with (folder / "shard.tar").open("rb") as file:
        file.seek(512)
        assert file.read(len(first)) == first
    assert second != first
    assert caption


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format(tmp_path: Path, image_folder: Path, kind: int) -> None:
    """Long names and names beyond ASCII take further headers before the one of the file."""
    long = "x" * 90 if kind == tarfile.USTAR_FORMAT else "x" * 300
    images = [image for _, image, _ in drawings(image_folder, 4)]
    names = ["n01/0.png", f"{'y' * 60}/{long}.png", "日本/é #1%.png", "./a\tb.png"]
    file = write_tar(tmp_path / "a #1.tar", list(zip(names, images, strict=True)), kind)
    pairs = require_places(file, 4)
    assert pairs[2].path.endswith(",name=é %231%25.png")
    assert pairs[3].path.endswith(",name=a%09b.png")


def test_a_name_that_is_not_utf8(tmp_path: Path, image_folder: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("other systems have no such names")
    [(_, image, _)] = drawings(image_folder, 1)
    name = os.fsdecode(b"\xff")
    file = write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", image)], tarfile.GNU_FORMAT)
    [pair] = read_pairs(file)
    assert pair.path.isascii()
    assert read_image(pair.path) == image
    assert os.path.exists(os.fsdecode(file))


def test_samples_of_several_images_and_several_shards(tmp_path: Path, image_folder: Path) -> None:
    images = [image for _, image, _ in drawings(image_folder, 6)]
    for number in range(2):
        members = [
            (f"{number}{name}", images[3 * number + place])
            for place, name in enumerate(["a.l.png", "a.r.png", "b.png"])
        ]
        write_tar(tmp_path / f"{number}.tar", [*members, (f"{number}b.txt", b"a ring")])
    pairs = require_places(tmp_path / "{0..1}.tar", 6)
    assert [pair.image for pair in pairs] == images


@pytest.mark.parametrize("name", ["shard.tar.gz", "shard.tar"])  # the second says what it is not
def test_a_compressed_tar_has_no_places(tmp_path: Path, image_folder: Path, name: str) -> None:
    made = write_tar(tmp_path / "made.tar.gz", samples(drawings(image_folder, 3)))
    made.rename(tmp_path / name)
    assert [pair.path for pair in read_pairs(tmp_path / name)] == ["0000", "0001", "0002"]


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_parquet_of_every_kind(tmp_path: Path, image_folder: Path, compression: str, version: str) -> None:
    table = as_table(drawings(image_folder, COUNT))
    parquet.write_table(
        table, tmp_path / "a.parquet", row_group_size=3, compression=compression, data_page_version=version,
        use_dictionary=version == "1.0",
    )  # fmt: skip
    require_places(tmp_path / "a.parquet")


def test_cells_as_datasets_writes_them(tmp_path: Path, image_folder: Path) -> None:
    """A struct of bytes and a path, a list of one, large binary, and a column of an odd name."""
    images = [image for _, image, _ in drawings(image_folder, COUNT)]
    columns = {
        "image": pa.array([{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)]),
        "images": pa.array([[image] for image in images]),
        "a/b #%": pa.array(images, pa.large_binary()),
        "one": pa.array([[{"bytes": image, "path": None}] for image in images]),
    }
    for name, cells in columns.items():
        table = pa.table({name: cells, "text": [f"{row}" for row in range(COUNT)], "other": [b"x" * 50] * COUNT})
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        parquet.write_table(table, folder / "a.parquet", row_group_size=6)
        for file in (folder / "a.parquet", write_arrow(folder / "stream.arrow", table)):
            pairs = list(read_pairs(file, image_column=name))
            assert [read_image(pair.path) for pair in pairs] == images, (file, name)


def test_rows_are_counted_in_each_file(tmp_path: Path, image_folder: Path) -> None:
    rows = drawings(image_folder, COUNT)
    for number in range(2):
        part = as_table(rows[10 * number : 10 * number + 10])
        parquet.write_table(part, tmp_path / f"{number}.parquet", row_group_size=4)
    pairs = require_places(tmp_path)
    assert pairs[10].path == f"{tmp_path}/1.parquet#row=0,column=image"
    assert pairs[10].id == "10"


def test_rows_with_paths_keep_them(tmp_path: Path, image_folder: Path) -> None:
    """In a column of both, each is what it is."""
    (name, image, _), (_, other, _) = drawings(image_folder, 2)
    cells = [{"bytes": None, "path": str(image_folder / name)}, {"bytes": other, "path": None}]
    parquet.write_table(pa.table({"image": cells, "text": ["a", "b"]}), tmp_path / "a.parquet")
    pairs = list(read_pairs(tmp_path / "a.parquet"))
    assert [pair.path for pair in pairs] == [str(image_folder / name), f"{tmp_path}/a.parquet#row=1,column=image"]
    assert [open_bytes(pair.image) for pair in pairs] == [image, other]
    assert reason(f"{tmp_path}/a.parquet#row=0,column=image") == (
        "row 0 of a.parquet has a path in column image, not an image"
    )


def test_a_file_whose_name_looks_like_a_place_is_a_file(folder: Path, image_folder: Path, tmp_path: Path) -> None:
    [(_, image, _)] = drawings(image_folder, 1)
    shutil.copy(folder / "cells.parquet", tmp_path / "a.parquet")
    path = tmp_path / "a.parquet#row=3,column=image"
    assert read_image(str(path)) != image
    assert file_holding(str(path)) == str(tmp_path / "a.parquet")
    path.write_bytes(image)
    assert read_image(str(path)) == image
    assert file_holding(str(path)) == str(path)
    (tmp_path / "owl #2.png").write_bytes(image)
    assert read_image(str(tmp_path / "owl #2.png")) == image


def test_every_function_that_takes_an_image_takes_such_a_path(folder: Path) -> None:
    path = f"{folder}/cells.parquet#row=3,column=image"
    assert decode_input(path).shape == (3, 64, 64)
    assert decode_input(Path(path)).shape == (3, 64, 64)
    assert read_thumbnail(Path(path), 32).size == (32, 32)


def test_many_threads_read_at_once_and_leave_nothing_open(folder: Path) -> None:
    pairs = [pair for name in PACKED for pair in read_pairs(folder / name)]
    wanted = random.Random(0).choices(pairs, k=400)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read_image, [pair.path for pair in wanted]))
    assert found == [encoded(pair) for pair in wanted]
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) <= before + 1


# --- What is not there, or not as it was


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("cells.parquet#row=20,column=image", "has no row 20: the table is not as it was; embed it again"),
        (f"cells.parquet#row={10**18 - 1},column=image", "no row 9"),
        ("stream.arrow#row=20,column=image", "stream.arrow has no row 20"),
        ("file.arrow#row=20,column=image", "file.arrow has no row 20"),
        ("cells.parquet#row=2,column=images", "cells.parquet has no column images, or several; embed it again"),
        ("stream.arrow#row=2,column=images", "stream.arrow has no column images"),
        ("cells.parquet#row=2,column=text", "has a path in column text, not an image"),
        ("shard.tar#row=2,column=image", "rows of shard.tar cannot be opened, only those of .parquet, and of .arrow"),
        ("shard.tar#bytes=0-100,name=0000.jpg", "no file of shard.tar lies there: the tar is not as it was"),
        ("shard.tar#bytes=512-100,name=0000.jpg", "no file of shard.tar lies there"),
        ("shard.tar#bytes=512-600,name=0000.jpg", "no file of shard.tar lies there"),
        ("shard.tar#bytes=513-900,name=0000.jpg", "no file of shard.tar lies there"),
        (f"shard.tar#bytes={10**17}-{10**17 + 99},name=0000.jpg", "no file of shard.tar lies there"),
        (f"shard.tar#bytes=512-{10**17},name=0000.jpg", "more than the bound of 2,048"),
        ("cells.parquet#bytes=512-600,name=a.jpg", "no file of cells.parquet lies there"),
        ("none.tar#bytes=512-600,name=a.jpg", "file not found"),
        ("none.parquet#row=1,column=image", "file not found"),
        ("none.arrow#row=1,column=image", "file not found"),
        ("shard.tar/a.tar#bytes=512-600", "file not found"),
        ("shard.tar#anything", "file not found"),
        ("shard.tar#bytes=1-2,name=../../etc/passwd", "file not found"),
        ("cells.parquet#row=1", "file not found"),
        (f"{'x' * 300}.tar#bytes=512-600", "file cannot be read (File name too long)"),
        ("a\0b.tar#bytes=512-600", "file not found"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_sentence(folder: Path, place: str, said: str) -> None:
    assert said in reason(f"{folder}/{place}")


def test_a_folder_and_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.parquet").mkdir()
    for place in ("a.tar#bytes=512-600", "a.parquet#row=1,column=image"):
        assert reason(tmp_path / place).endswith("is not a regular file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.parquet")
        assert reason(tmp_path / "pipe.parquet#row=1,column=image") == "pipe.parquet is not a regular file"


def damaged(content: bytes, generator: random.Random) -> bytes:
    match generator.randrange(5):
        case 0:
            return content[: generator.randrange(len(content))]
        case 1:
            return generator.randbytes(len(content))
        case 2:
            start = generator.randrange(len(content))
            return content[:start] + generator.randbytes(64) + content[start + 64 :]
        case 3:  # near its end, where Parquet says what is where
            place = len(content) - generator.randrange(1, min(1500, len(content)))
        case _:
            place = generator.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << generator.randrange(8))]) + content[place + 1 :]


@pytest.mark.parametrize("name", PACKED)
def test_damage_is_an_image_or_a_sentence(folder: Path, tmp_path: Path, name: str) -> None:
    """Whatever has become of a file since it was embedded."""
    pairs, whole, generator = list(read_pairs(folder / name)), (folder / name).read_bytes(), random.Random(name)
    for number in range(400):
        file = tmp_path / f"{number % 2}-{name}"
        file.write_bytes(damaged(whole, generator))
        for pair in generator.sample(pairs, 4):
            path = str(file) + pair.path.removeprefix(str(folder / name))
            with suppress(ImageError):  # any other error fails the test
                assert isinstance(read_image(path), bytes)


def test_no_bit_of_what_parquet_says_of_itself_ends_the_process(tmp_path: Path) -> None:
    """pyarrow aborts on some of these if it is asked for the size of a column."""
    file = tmp_path / "a.parquet"
    parquet.write_table(as_table([("", b"an image", "a caption")] * 20), file, row_group_size=ROWS_OF_A_GROUP)
    whole = file.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    assert 500 < footer < 2000
    for place in range(len(whole) - footer, len(whole)):
        for bit in (0, 3, 7):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with suppress(ImageError):
                assert isinstance(read_image(f"{file}#row=8,column=image"), bytes)


def replaced_by_text(file: Path, _: Path) -> None:
    file.write_text("something else\n" * 1000)


def replaced_by_nothing(file: Path, _: Path) -> None:
    file.write_bytes(b"")


def replaced_by_less(file: Path, image_folder: Path) -> None:
    rows = drawings(image_folder, 3)
    if file.suffix == ".tar":
        write_tar(file, samples(rows))
    elif file.suffix == ".parquet":
        parquet.write_table(as_table(rows), file)
    else:
        write_arrow(file, as_table(rows))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("replace", [replaced_by_text, replaced_by_nothing, replaced_by_less])
def test_a_file_that_was_replaced_is_seen(
    folder: Path, image_folder: Path, tmp_path: Path, name: str, replace: Callable[[Path, Path], None]
) -> None:
    file = tmp_path / name
    shutil.copy(folder / name, file)
    pairs = list(read_pairs(file))
    assert read_image(pairs[9].path) == pairs[9].image
    replace(file, image_folder)
    assert reason(pairs[9].path)
    file.unlink()
    assert reason(pairs[9].path) == "file not found"


def test_another_table_of_the_same_name_is_read_as_it_is_now(folder: Path, image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cells.parquet"
    shutil.copy(folder / "cells.parquet", file)
    rows = drawings(image_folder, COUNT)
    path = f"{file}#row=3,column=image"
    assert read_image(path) == rows[3][1]
    parquet.write_table(as_table(rows[::-1]), file, row_group_size=2)
    assert read_image(path) == rows[16][1]


# --- Bounds


def test_a_file_of_a_tar_is_bounded(folder: Path) -> None:
    pair = next(iter(read_pairs(folder / "shard.tar")))
    size = len(encoded(pair))
    assert read_image(pair.path, size) == pair.image
    for path in (pair.path, f"{folder}/cells.parquet#row=0,column=image", f"{folder}/stream.arrow#row=0,column=image"):
        with pytest.raises(ImageError, match=r"MiB, more than the bound of 0$"):
            read_image(path, size - 1)


def test_a_row_group_is_bounded_before_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{folder}/cells.parquet#row=0,column=image"
    group = parquet.read_metadata(folder / "cells.parquet").row_group(0)
    assert group.num_rows == ROWS_OF_A_GROUP
    size = group.total_byte_size
    monkeypatch.setattr(placed_images, "MOST_GROUP_BYTES", size)
    assert read_image(path)
    monkeypatch.setattr(placed_images, "MOST_GROUP_BYTES", size - 1)
    said = reason(path)
    assert (
        said
        == "a row group of cells.parquet has 0 MiB, more than the bound of 0; write the table with fewer rows in each"
    )


def test_a_large_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    """64 MiB of images are one row group of many pages, of which a few are in memory at once."""
    images = [random.Random(row).randbytes(2**20) for row in range(64)]
    parquet.write_table(
        pa.table({"image": images}),
        tmp_path / "a.parquet",
        compression="none",
        use_dictionary=False,
        write_batch_size=1,
    )
    assert parquet.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        for row in (0, 31, 63):
            assert read_image(f"{tmp_path}/a.parquet#row={row},column=image") == images[row]
        assert pool.max_memory() < 48 * 2**20
        assert pool.bytes_allocated() == 0
    finally:
        pa.set_memory_pool(before)
