"""The page shows images that lie inside a tar or a table, to many at once, and says why where it cannot."""

from __future__ import annotations

import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from packed_images import PACKED, drawings, pack
from PIL import Image

import lamplit
from lamplit.app.server import make_app
from lamplit.data.places import placed_images
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.images.image_tower import ImageTower

COUNT = 20


@pytest.fixture(scope="module")
def folder(image_folder: Path, image_tower: ImageTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same drawings packed in four ways, and a store of each; copy it to change it."""
    made = pack(tmp_path_factory.mktemp("packed"), drawings(image_folder, COUNT))
    for name in PACKED:
        lamplit.embed(made / name, made / f"{name}.lance", image_tower=image_tower, backend="torch")
    return made


def client_of(model_path: Path, store: Path) -> TestClient:
    return TestClient(make_app(lamplit.load(model_path), Store(store)), base_url="http://127.0.0.1")


def pixels(content: bytes) -> list[int]:
    with Image.open(io.BytesIO(content)) as image:
        return list(image.convert("RGB").resize((8, 8)).tobytes())


def differ(one: list[int], other: list[int]) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", PACKED)
def test_every_image_is_shown_to_many_at_once(folder: Path, image_folder: Path, model_path: Path, name: str) -> None:
    client, store = client_of(model_path, folder / f"{name}.lance"), Store(folder / f"{name}.lance")
    expected = {caption: pixels(image) for _, image, caption in drawings(image_folder, COUNT)}
    wanted = [(path, row["id"], row["texts"][0]) for row in store.rows() for path in ("/thumbnail", "/image")]

    def ask(path: str, name: str, _: str) -> Any:
        return client.get(path, params={"id": name})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, *zip(*wanted, strict=True)))
    for (path, row, caption), answer in zip(wanted, answers, strict=True):
        assert answer.status_code == 200, (path, row, answer.text)
        assert answer.headers["content-type"] == "image/jpeg"
        assert differ(pixels(answer.content), expected[caption]) < 40, (path, row, caption)


@pytest.mark.parametrize(
    ("name", "shown"), [("shard.tar", "0003.png in shard.tar"), ("cells.parquet", "row 3 of cells.parquet")]
)
def test_the_name_of_an_image_tells_no_folder(folder: Path, model_path: Path, name: str, shown: str) -> None:
    client, store = client_of(model_path, folder / f"{name}.lance"), Store(folder / f"{name}.lance")
    [row] = [row for row in store.rows() if int(row["id"]) == 3]
    item = client.get("/item", params={"id": row["id"]}).json()
    assert item["name"].rpartition(".")[2] == shown.rpartition(".")[2]
    assert item["name"].replace(".jpg", ".png") == shown
    assert str(folder) not in str(item)


@pytest.mark.parametrize("name", PACKED)
def test_a_file_that_is_gone_or_another_is_said(folder: Path, model_path: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder / f"{name}.lance", tmp_path / "a.lance")
    shutil.copy(folder / name, tmp_path / name)
    store = Store(tmp_path / "a.lance")
    rows = [(row["id"], row["path"].replace(str(folder), str(tmp_path))) for row in store.rows()]
    client = client_of(model_path, moved(store, dict(rows)))
    assert client.get("/image", params={"id": rows[0][0]}).status_code == 200
    (tmp_path / name).write_bytes(b"another file" * 2000)
    answer = client.get("/image", params={"id": rows[0][0]})
    assert answer.status_code == 404
    assert "this image cannot be shown: " in answer.json()["error"]
    assert str(tmp_path) not in answer.json()["error"]
    (tmp_path / name).unlink()
    answer = client.get("/image", params={"id": rows[0][0]})
    assert (answer.status_code, answer.json()["error"]) == (404, "this image cannot be shown: file not found")


def moved(store: Store, paths: dict[str, str]) -> Path:
    """Give the rows of a store other paths."""
    rows = [Row(row["id"], paths[row["id"]], row["hash"], row["texts"], None) for row in store.rows()]
    store.replace(rows)
    return Path(store.path)


def test_an_image_above_the_bound_is_not_shown_and_said(
    folder: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, store = client_of(model_path, folder / "cells.parquet.lance"), Store(folder / "cells.parquet.lance")
    monkeypatch.setattr(placed_images, "MOST_GROUP_BYTES", 100)
    answer = client.get("/thumbnail", params={"id": store.column("id")[0]})
    assert answer.status_code == 404
    assert "a row group of cells.parquet has 0 MiB, more than the bound of 0" in answer.json()["error"]


def test_an_svg_in_a_table_and_in_a_tar_is_drawn(image_tower: ImageTower, model_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    disc = (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><circle cx="12" cy="12" r="9" fill="lime"/></svg>'
    )
    pack(tmp_path, [("disc.svg", disc, "A disc.")])
    for name in ("shard.tar", "cells.parquet"):
        lamplit.embed(tmp_path / name, tmp_path / f"{name}.lance", image_tower=image_tower, backend="torch")
        client, [row] = (
            client_of(model_path, tmp_path / f"{name}.lance"),
            Store(tmp_path / f"{name}.lance").column("id"),
        )
        for path in ("/thumbnail", "/image"):
            answer = client.get(path, params={"id": row})
            assert answer.status_code == 200, answer.text
            with Image.open(io.BytesIO(answer.content)) as image:
                middle = image.getpixel((image.width // 2, image.height // 2))
            assert middle == pytest.approx((0, 255, 0), abs=8)
