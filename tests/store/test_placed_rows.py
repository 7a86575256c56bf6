"""Stores of images that lie in a tar or a table say where, and still do when these are embedded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from packed_images import PACKED, as_table, drawings, pack, samples, write_tar
from PIL import Image
from pyarrow import parquet

import lamplit
from lamplit.data.places.image_files import read_image
from lamplit.publishing.pushing import push
from lamplit.retrieval.contact_sheet import contact_sheet, duplicates_sheet
from lamplit.retrieval.searcher import Hit
from lamplit.store.duplicates import find_duplicates
from lamplit.store.embed.embedding import EmbedReport, embed
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.images.image_tower import ImageTower

COUNT = 12


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    return pack(tmp_path, drawings(image_folder, COUNT))


def embedded(source: Path, tower: ImageTower, out: Path | None = None, *, prune: bool = False) -> EmbedReport:
    out = out or source.with_suffix(".lance")
    return embed(source, out, image_tower=tower, backend="torch", prune=prune)


@pytest.mark.parametrize("name", PACKED)
def test_a_store_says_where_its_images_lie(
    folder: Path, image_tower: ImageTower, image_folder: Path, name: str
) -> None:
    report = embedded(folder / name, image_tower)
    assert (report.embedded, len(report.skipped)) == (COUNT, 0)
    images = {caption: image for _, image, caption in drawings(image_folder, COUNT)}
    for row in Store(folder / name.replace(Path(name).suffix, ".lance")).rows():
        assert read_image(row["path"]) == images[row["texts"][0]]
    again = embedded(folder / name, image_tower)
    assert (again.unchanged, again.updated, again.embedded) == (COUNT, 0, 0)


@pytest.mark.parametrize("name", ["shard.tar", "cells.parquet"])
def test_an_older_store_gets_the_places_without_the_tower(folder: Path, image_tower: ImageTower, name: str) -> None:
    """A store of an earlier version has the id for a path; embedding again writes where the images lie, no vectors."""
    out = folder / "a.lance"
    embedded(folder / name, image_tower, out)
    store = Store(out)
    before, vectors = store.rows(), store.vectors_at(range(COUNT))
    store.replace([Row(row["id"], row["id"], row["hash"], row["texts"], None) for row in before])
    assert Store(out).column("path") == Store(out).column("id")
    report = embedded(folder / name, image_tower, out)
    assert (report.embedded, report.moved, report.unchanged, report.updated) == (0, 0, COUNT, COUNT)
    assert Store(out).rows() == before
    assert np.array_equal(Store(out).vectors_at(range(COUNT)), vectors)


def test_a_tar_that_was_written_anew_keeps_its_vectors(
    folder: Path, image_tower: ImageTower, image_folder: Path
) -> None:
    embedded(folder / "shard.tar", image_tower)
    write_tar(folder / "shard.tar", [("a.txt", b"first"), *samples(drawings(image_folder, COUNT))])
    report = embedded(folder / "shard.tar", image_tower)
    assert (report.embedded, report.unchanged, report.updated, report.notes) == (0, COUNT, COUNT, [])
    images = {caption: image for _, image, caption in drawings(image_folder, COUNT)}
    for row in Store(folder / "shard.lance").rows():
        assert read_image(row["path"]) == images[row["texts"][0]]


def test_other_images_of_the_same_file_are_no_loss_and_those_of_another_are(
    folder: Path, image_tower: ImageTower, image_folder: Path
) -> None:
    out, rows = folder / "cells.lance", drawings(image_folder)
    embedded(folder / "cells.parquet", image_tower)
    parquet.write_table(as_table(rows[COUNT : 2 * COUNT]), folder / "cells.parquet", row_group_size=5)
    report = embedded(folder / "cells.parquet", image_tower)
    assert (report.embedded, report.notes) == (COUNT, [])
    parquet.write_table(as_table(rows[2 * COUNT : 3 * COUNT]), folder / "others.parquet")
    report = embedded(folder / "others.parquet", image_tower, out)
    [note] = report.notes
    assert note.startswith("images that took the place of others of the same id, whose files are still there: 12, such")
    assert f"{folder}/others.parquet#row=0,column=image of {folder}/cells.parquet#row=0,column=image" in note
    (folder / "others.parquet").rename(folder / "moved.parquet")
    report = embedded(folder / "cells.parquet", image_tower, out)
    assert report.notes == []


def test_a_file_that_is_gone_is_not_pruned_away(folder: Path, image_tower: ImageTower, image_folder: Path) -> None:
    """Rows of tars and tables have no file of their own, so no row is deleted for want of one."""
    (folder / "files").mkdir()
    shutil.copy(image_folder / drawings(image_folder, 1)[0][0], folder / "files")
    out = folder / "a.lance"
    embedded(folder / "cells.parquet", image_tower, out)
    (folder / "cells.parquet").unlink()
    parquet.write_table(as_table(drawings(image_folder, 2)), folder / "files" / "cells.parquet")
    for source in (folder / "files" / "cells.parquet", folder / "files"):
        report = embedded(source, image_tower, out, prune=True)
        assert report.pruned == 0
    assert len(Store(out)) >= COUNT


def test_what_is_skipped_is_listed_with_its_place(folder: Path, image_tower: ImageTower, image_folder: Path) -> None:
    rows = [*drawings(image_folder, 2), ("broken.png", b"no image", "broken")]
    write_tar(folder / "broken.tar", samples(rows))
    report = embedded(folder / "broken.tar", image_tower)
    [listed] = map(json.loads, Path(str(report.skipped_file)).read_text().splitlines())
    assert listed["path"].startswith(f"{folder}/broken.tar#bytes=")
    assert listed["path"].endswith(",name=0002.png")
    assert read_image(listed["path"]) == b"no image"


@pytest.mark.parametrize("name", PACKED)
def test_contact_sheets_show_them(folder: Path, image_tower: ImageTower, name: str) -> None:
    out = folder / "a.lance"
    embedded(folder / name, image_tower, out)
    hits = [Hit(0.5, row["id"], row["path"], [], {}) for row in Store(out).rows()]
    contact_sheet({"": hits}, folder / "sheet.png")
    duplicates_sheet(find_duplicates(out, threshold=0.1), folder / "copies.png")
    for sheet, shown in (("sheet.png", COUNT), ("copies.png", 8)):
        with Image.open(folder / sheet) as image:
            pixels = np.asarray(image.convert("RGB"))
        for column in range(shown):
            cell = pixels[40:220, 10 + 190 * column : 190 + 190 * column]
            assert (cell != 211).any(axis=2).all(), f"{column} is a grey square"  # lightgray
            assert len(np.unique(cell.reshape(-1, 3), axis=0)) > 1


def test_a_published_store_tells_no_folder(folder: Path, image_tower: ImageTower, image_folder: Path) -> None:
    """A single image, so that what its path begins with is not found by comparing it with others."""
    private = folder / "private"
    private.mkdir()
    table = as_table(drawings(image_folder, 1)).append_column("source", [[f"{private}/original.png"]])
    parquet.write_table(table, private / "cells.parquet")
    write_tar(private / "a.tar", [(f"{name}", content) for name, content in samples(drawings(image_folder, 1))])
    for name in ("cells.parquet", "a.tar"):
        out = folder / f"{name}.lance"
        embedded(private / name, image_tower, out)
        push(out, "ann/drawings", out=folder / f"{name}.out")
        opened = Store(f"hf:{folder / f'{name}.out'}")
        assert opened.column("path") == opened.column("id")
        for file in (folder / f"{name}.out").rglob("*"):
            assert not file.is_file() or str(private).encode() not in file.read_bytes(), file


def test_a_search_gives_a_path_that_can_be_opened(folder: Path, image_tower: ImageTower, model_path: Path) -> None:
    out = folder / "a.lance"
    embedded(folder / "cells.parquet", image_tower, out)
    searcher = lamplit.Searcher(model_path, out)
    [hit] = searcher.search("a red ring", k=1)
    assert hit.path == f"{folder}/cells.parquet#row={hit.id},column=image"
    [same] = searcher.search(image=hit.path, k=1)
    assert same.id == hit.id
    assert same.score == pytest.approx(1.0, abs=2e-3)
