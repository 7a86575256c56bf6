"""The layouts that img2dataset 1.47 writes, as in its `writer.py` and `logger.py`."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lamplit.data.sources import read_pairs

IMAGES = [b"A", b"B", None]  # the last could not be downloaded
METAS: list[dict[str, Any]] = [
    {"caption": f"caption {n}", "url": f"https://x.org/{n}.jpg", "key": f"00000000{n}", "status": "success", "width": 4}
    for n in range(3)
]


def write_webdataset(root: Path, ending: str) -> None:
    with tarfile.open(root / "00000.tar", "w") as archive:
        for image, meta in zip(IMAGES, METAS, strict=True):
            if image is not None:
                parts = {ending: image, "json": json.dumps(meta, indent=4).encode(), "txt": meta["caption"].encode()}
                for name, content in parts.items():
                    info = tarfile.TarInfo(f"{meta['key']}.{name}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    pq.write_table(pa.Table.from_pylist(METAS), root / "00000.parquet")


def write_files(root: Path, ending: str) -> None:
    folder = root / "00000"
    folder.mkdir()
    for image, meta in zip(IMAGES, METAS, strict=True):
        if image is not None:
            (folder / f"{meta['key']}.{ending}").write_bytes(image)
            (folder / f"{meta['key']}.txt").write_text(meta["caption"])
            (folder / f"{meta['key']}.json").write_text(json.dumps(meta, indent=4))
    pq.write_table(pa.Table.from_pylist(METAS), root / "00000.parquet")


def write_parquet(root: Path, ending: str) -> None:
    rows = [
        {**meta, ending: image, "txt": meta["caption"] if image else None}
        for meta, image in zip(METAS, IMAGES, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "00000.parquet")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("write", [write_webdataset, write_files, write_parquet])
def test_every_layout_gives_its_images_texts_and_metadata(tmp_path: Path, write: Any, ending: str) -> None:
    write(tmp_path, ending)
    (tmp_path / "00000_stats.json").write_text('{"count": 3}')
    pairs = read_pairs(tmp_path)
    found = [pair for pair in pairs if isinstance(pair.image, Path) or pair.image]
    assert [pair.texts for pair in found] == [("caption 0",), ("caption 1",)]
    images = [pair.image.read_bytes() if isinstance(pair.image, Path) else pair.image for pair in found]
    assert images == IMAGES[:2]
    assert [pair.metadata["url"] for pair in found] == [meta["url"] for meta in METAS[:2]]
    assert [pair.metadata["width"] for pair in found] == [4, 4]
    if write is not write_parquet:
        assert "00000.parquet is left out" in pairs.notes[0]
