"""Sources in object storage: read as those of this machine are, in pieces, whatever the network does."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from object_server import ObjectServer
from pyarrow import parquet

from lamplit.data.decoding.images import open_bytes
from lamplit.data.pairs import Pair, Pairs
from lamplit.data.places.image_files import read_image
from lamplit.data.sources import read_pairs
from lamplit.data.units import pairs_of, plan_units
from lamplit.data.vectors.foreign_vectors import read_vectors
from lamplit.errors import ImageError, PairsError, UsageError
from lamplit.locations.addresses import RemotePath
from lamplit.locations.paths import lance_options, path_of
from lamplit.store.embed.embedding import embed
from lamplit.towers.images.image_tower import ImageTower

COUNT = 6
SOURCES = ("shards/{000..002}.tar", "shards/", "cells.parquet", "paths.parquet", "pairs.csv", "images/")


def write_tar(file: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawings with captions, in every layout; to be read only."""
    made = tmp_path_factory.mktemp("layouts")
    (made / "images").mkdir()
    (made / "shards").mkdir()
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        rows = [(row["path"], row["caption"]) for row in csv.DictReader(file)][:COUNT]
    images = [(image_folder / name).read_bytes() for name, _ in rows]
    texts = [caption for _, caption in rows]
    members: list[tuple[str, bytes]] = []
    for number, (name, caption) in enumerate(rows):
        shutil.copy(image_folder / name, made / "images" / name)
        (made / "images" / name).with_suffix(".txt").write_text(caption)
        members += [(f"{number:04}{Path(name).suffix}", images[number]), (f"{number:04}.txt", caption.encode())]
    for number in range(3):
        write_tar(made / "shards" / f"{number:03}.tar", members[4 * number : 4 * number + 4])
    parquet.write_table(pa.table({"image": images, "text": texts}), made / "cells.parquet", row_group_size=5)
    paths = [f"images/{name}" for name, _ in rows]
    parquet.write_table(pa.table({"path": paths, "text": texts}), made / "paths.parquet")
    (made / "pairs.csv").write_text("path,caption\n" + "".join(f"images/{name},{text}\n" for name, text in rows))
    return made


@pytest.fixture(scope="module")
def address(object_storage: ObjectServer, folder: Path) -> str:
    """All of it in object storage; to be read only."""
    object_storage.begin()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            object_storage.put(file, f"set/{file.relative_to(folder).as_posix()}")
    return f"{object_storage.root}/set"


def content(pairs: Pairs) -> list[Pair]:
    """Pairs with the bytes of their images, wherever these are."""
    return [replace(pair, image=open_bytes(pair.image)) for pair in pairs]


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize("source", SOURCES)
def test_the_same_pairs_as_on_a_disk(address: str, folder: Path, source: str) -> None:
    there, here = read_pairs(f"{address}/{source}"), read_pairs(f"{folder}/{source}")
    expected = content(here)
    assert content(there) == expected
    assert (there.count, there.image_column, there.text_columns) == (here.count, here.image_column, here.text_columns)
    assert (len(expected), there.problems) == (COUNT, [])
    units = [pair for unit in plan_units(there, rows=3) for pair in pairs_of(there, unit)]
    assert [(pair.id, pair.texts) for pair in units] == [(pair.id, pair.texts) for pair in expected]


def test_an_image_inside_a_tar_or_a_table_is_read_alone(objects: ObjectServer, address: str) -> None:
    for source in ("shards/{000..002}.tar", "cells.parquet"):
        pairs = list(read_pairs(f"{address}/{source}"))
        objects.seen.clear()
        for pair in pairs:
            assert pair.path.startswith(f"{address}/{source[:5]}")
            assert open_bytes(path_of(pair.path)) == pair.image
        if source.endswith(".tar"):
            assert [method for method, *_ in objects.seen] == ["GET"] * COUNT
    for place in ("none.tar#bytes=512-600", "none.parquet#row=1,column=image"):
        with pytest.raises(ImageError, match=r"^file not found$"):
            read_image(f"{address}/{place}")
    for place in (
        "shards/000.tar#bytes=512-600",
        "shards/000.tar#bytes=900000-900100",
        "cells.parquet#row=6,column=image",
    ):
        with pytest.raises(ImageError):
            read_image(f"{address}/{place}")


def test_an_object_whose_name_looks_like_a_place_is_an_object(
    objects: ObjectServer, folder: Path, tmp_path: Path
) -> None:
    [image, *_] = sorted((folder / "images").glob("*.png"))
    path = objects.put(image, "a.tar#bytes=512-600,name=owl.png")
    assert read_image(path) == image.read_bytes()


@pytest.mark.usefixtures("objects")
def test_a_table_that_names_objects(address: str, folder: Path, tmp_path: Path) -> None:
    names = sorted(file.name for file in (folder / "images").glob("*.png"))
    table = tmp_path / "addresses.csv"
    table.write_text("image,text\n" + "".join(f"{address}/images/{name},a drawing\n" for name in [*names, "none.png"]))
    *pairs, missing = read_pairs(table)
    assert [pair.id for pair in pairs] == [f"{address}/images/{name}" for name in names]
    assert [open_bytes(pair.image) for pair in pairs] == [(folder / "images" / name).read_bytes() for name in names]
    with pytest.raises(ImageError, match="file not found"):
        open_bytes(missing.image)


@pytest.mark.slow
def test_only_what_is_needed_is_read(objects: ObjectServer, tmp_path: Path) -> None:
    """A large tar is read in pieces, and a reader that stops early has not read it whole."""
    image = os.urandom(2**20)
    write_tar(tmp_path / "large.tar", [(f"{number:04}.jpg", image) for number in range(20)])
    pairs = iter(read_pairs(objects.put(tmp_path / "large.tar", "large.tar")))
    objects.seen.clear()
    assert next(pairs).image == image
    assert sum(method == "GET" for method, *_ in objects.seen) < 8
    assert all(pair.image == image for pair in pairs)
    assert sum(method == "GET" for method, *_ in objects.seen) < 12


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow", "drop", "cut"])
def test_what_the_network_does_is_tried_again(objects: ObjectServer, address: str, folder: Path, fault: str) -> None:
    numbers = iter(range(10**6))
    objects.fault = lambda method, path: fault if next(numbers) % 3 == 0 else None
    assert content(read_pairs(f"{address}/shards/")) == content(read_pairs(folder / "shards"))
    assert fault in [each for *_, each in objects.seen]


@pytest.mark.usefixtures("objects")
def test_vectors_that_others_made(address: str, tmp_path: Path) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0, 0.0, 1.0], pa.float32()), 2)
    table = pa.table({"path": ["a.jpg", "b.jpg"], "caption": ["one", "two"], "vector": vectors})
    parquet.write_table(table, tmp_path / "vectors.parquet")
    (RemotePath(address) / "vectors/0.parquet").write_bytes((tmp_path / "vectors.parquet").read_bytes())
    lance.write_dataset(table, f"{address}/vectors.lance", storage_options=lance_options(address))
    for name in ("vectors/0.parquet", "vectors", "vectors.lance"):
        [(found, _, described)] = read_vectors(f"{address}/{name}")
        assert found.tolist() == [[1, 0], [0, 1]]
        assert described.texts.to_pylist() == [["one"], ["two"]]
    with pytest.raises(PairsError, match="is a table of Lance"):
        read_pairs(f"{address}/vectors.lance")
    (RemotePath(address) / "vectors.npy").write_bytes(b"...")
    with pytest.raises(UsageError, match="an array of vectors lies in a folder of this machine"):
        read_vectors(f"{address}/vectors.npy")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shards/", "cells.parquet", "pairs.csv"])
def test_what_cannot_be_reached_is_not_given_up(
    objects: ObjectServer,
    address: str,
    source: str,
    image_tower: ImageTower,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that is gone in the middle ends the run, and the next run has everything."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # s3fs tries five times, and botocore each time again
    objects.system.clear_instance_cache()
    pairs = read_pairs(f"{address}/{source}")
    numbers = iter(range(10**6))
    objects.fault = lambda method, path: "slow" if next(numbers) >= 1 else None
    with pytest.raises(PairsError, match=r"the server asks for fewer requests \(SlowDown\); wait a while"):
        embed(pairs, tmp_path / "a.lance", image_tower=image_tower, backend="torch", batch_size=2)
    objects.fault = lambda method, path: None
    report = embed(pairs, tmp_path / "a.lance", image_tower=image_tower, backend="torch")
    assert (report.num_usable, report.skipped) == (COUNT, [])


def test_what_is_not_there(objects: ObjectServer, address: str) -> None:
    for source, said in (
        ("s3://no-such-bucket-here/a.tar", "s3://no-such-bucket-here/a.tar cannot be read: there is no such bucket"),
        (f"{address}/none.csv", f"{address}/none.csv does not exist"),
        (f"{address}/shards/{{000..004}}.tar", "there is no file for 003, 004"),
    ):
        with pytest.raises(PairsError, match=said.replace("{", "\\{")):
            read_pairs(source)
    with pytest.raises(UsageError, match="has no columns"):
        read_pairs(f"{address}/images", text_column="caption")
    objects.fault = lambda method, path: "deny"
    with pytest.raises(PairsError, match="access is denied; check AWS_ACCESS_KEY_ID"):
        read_pairs(f"{address}/images")


def test_no_credentials(objects: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PairsError, match="no credentials were found, or they have expired; set AWS_"):
        read_pairs(f"{objects.root}/a.tar")
