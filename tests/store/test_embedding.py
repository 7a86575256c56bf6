from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from conftest import COLORS, SHAPES, draw
from PIL import ExifTags, Image
from pyarrow import parquet
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lamplit.data.decoding.images import Skipped, decode_image
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.pairs import Pair, Pairs
from lamplit.data.sources import read_pairs
from lamplit.errors import PairsError, StoreError, TowerError, UsageError
from lamplit.model import LiT
from lamplit.store.embed import store_writer
from lamplit.store.embed.embedding import EmbedReport, embed
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.lance_store import Store
from lamplit.store.table.table_writing import tidy
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, open_image_tower

ONE_FP16_STEP = 1e-3  # for unit vectors, whose coordinates are less than 1


@pytest.fixture
def source(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of twelve of the drawings and their pairs, to be changed."""
    folder = tmp_path / "source"
    folder.mkdir()
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::5]
    for row in rows:
        shutil.copy(image_folder / row["path"], folder)
    write_csv(folder / "pairs.csv", rows)
    return folder / "pairs.csv"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pairs.lance"


def read_csv(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def counts(report: EmbedReport) -> tuple[int, int, int, int]:
    return report.embedded, report.updated, report.unchanged, len(report.skipped)


def content(store: Store) -> list[dict[str, Any]]:
    return store.rows(range(len(store)))


def embed_with(tower: ImageTower, source: Any, out: Path, **options: Any) -> EmbedReport:
    return embed(source, out, image_tower=tower, backend="torch", **options)


def test_new_store(source: Path, out: Path, image_tower: ImageTower) -> None:
    report = embed_with(image_tower, source, out)
    assert counts(report) == (12, 0, 0, 0)
    assert (report.store, report.image_tower, report.backend) == (str(out), "timm:test_vit", "torch")
    assert report.skipped_file is None
    assert report.seconds > 0

    store = Store(out)
    rows = sorted(read_csv(source), key=lambda row: row["path"])
    assert store.column("id") == [row["path"] for row in rows]
    assert store.column("path") == [str(source.parent / row["path"]) for row in rows]
    assert store.texts() == [[row["caption"]] for row in rows]
    assert store.texts("german") == [[row["german"]] for row in rows]
    assert store.column("shape") == [row["shape"] for row in rows]
    assert store.tower == image_tower.identity()
    assert store.backend == "torch"


def test_vectors_are_the_towers(source: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, source, out)
    store = Store(out)
    for path, vector in zip(store.column("path"), store.vectors(), strict=True):
        pixels = image_tower.preprocessing.resize(decode_image(Path(path).read_bytes()))
        with torch.no_grad():
            expected = F.normalize(image_tower(pixels[None]), dim=-1)[0]
        assert (vector - expected).abs().max() < ONE_FP16_STEP


def test_again_nothing_changes(source: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, source, out)
    before, vectors = content(Store(out)), Store(out).vectors()
    report = embed_with(image_tower, source, out)
    assert counts(report) == (0, 0, 12, 0)
    assert report.backend == "none"
    assert content(Store(out)) == before
    assert torch.equal(Store(out).vectors(), vectors)


def test_changed_image(source: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, source, out)
    before, vectors = content(Store(out)), Store(out).vectors()
    changed = before[4]["id"]
    draw("ring", "orange", 30).save(source.parent / changed)

    assert counts(embed_with(image_tower, source, out)) == (1, 1, 11, 0)

    store = Store(out)
    moved = (store.vectors() - vectors).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [4]
    assert [row["hash"] != old["hash"] for row, old in zip(content(store), before, strict=True)] == moved.tolist()
    assert counts(embed_with(image_tower, source, out)) == (0, 0, 12, 0)


def test_changed_texts_and_metadata_leave_the_vectors(source: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, source, out)
    vectors = Store(out).vectors()
    rows = read_csv(source)
    rows[1]["caption"], rows[2]["german"] = "Something else.", "etwas anderes"
    write_csv(source, rows)

    assert counts(embed_with(image_tower, source, out)) == (0, 2, 12, 0)

    store = Store(out)
    assert torch.equal(store.vectors(), vectors)
    assert store.texts()[store.column("id").index(rows[1]["path"])] == ["Something else."]
    assert store.column("german")[store.column("id").index(rows[2]["path"])] == "etwas anderes"
    assert counts(embed_with(image_tower, source, out)) == (0, 0, 12, 0)


def test_added_and_removed_pairs(source: Path, out: Path, image_tower: ImageTower) -> None:
    rows = read_csv(source)
    write_csv(source, rows[:8])
    embed_with(image_tower, source, out)
    write_csv(source, rows[4:])
    assert counts(embed_with(image_tower, source, out)) == (4, 0, 4, 0)
    assert Store(out).column("id") == sorted(row["path"] for row in rows)  # what is gone from the source stays


# what is kept, and what is said


class Bad(nn.Module):
    """A tower whose vectors of dark images are not numbers, and of white ones nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        mean = images.mean((1, 2, 3))[:, None]
        vectors = torch.cat([mean, mean + 1, mean - 3], 1) * self.weight
        vectors[(mean < -1.5).flatten()] = torch.nan
        return vectors * (mean < 1.5)


def own_tower(model: nn.Module) -> ImageTower:
    return open_image_tower(model, preprocessing=Preprocessing((8, 8), (0.5,) * 3, (0.25,) * 3))


def save_levels(folder: Path, levels: dict[str, int]) -> None:
    for name, level in levels.items():
        Image.new("L", (8, 8), level).save(folder / name)


def test_vectors_that_are_no_numbers_are_skipped(out: Path, tmp_path: Path) -> None:
    save_levels(tmp_path, {"a.png": 0, "b.png": 128, "c.png": 0, "d.png": 255, "e.png": 100})
    report = embed(tmp_path, out, image_tower=own_tower(Bad()), backend="torch")
    assert counts(report)[:1] == (2,)
    assert {item.id: item.reason for item in report.skipped} == dict.fromkeys(
        ("a.png", "c.png", "d.png"), "the tower gives no number"
    )
    assert Store(out).column("id") == ["b.png", "e.png"]
    assert torch.isfinite(Store(out).vectors()).all()


@pytest.mark.parametrize(("batch_size", "commit_rows"), [(1, 1), (2, 2), (8, 100)])
def test_an_id_that_comes_twice_is_said(
    out: Path, image_folder: Path, image_tower: ImageTower, batch_size: int, commit_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Only pairs that are made by hand can have it; the first one counts, in every run."""
    monkeypatch.setattr(store_writer, "COMMIT_ROWS", commit_rows)
    files = [file.read_bytes() for file in sorted(image_folder.glob("*.png"))[:4]]
    given = [Pair(name, data, (name,), {}) for name, data in zip("abaa", files, strict=True)]
    for expected in ((2, 0), (0, 2)):
        pairs = Pairs("given", 4, None, (), lambda: iter(given))
        report = embed(pairs, out, image_tower=image_tower, backend="torch", batch_size=batch_size)
        assert (report.embedded, report.unchanged) == expected
        assert [(item.id, item.reason) for item in report.skipped] == [
            ("a", "another image of the source has this id")
        ] * 2
        assert Store(out).column("id") == ["a", "b"]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@pytest.mark.parametrize("commit_rows", [1, 100])
def test_equal_bytes_go_through_the_tower_once(
    out: Path, tmp_path: Path, batch_size: int, commit_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "COMMIT_ROWS", commit_rows)
    save_levels(tmp_path, {"a.png": 100, "b.png": 128, "c.png": 100, "d.png": 100, "e.png": 128, "f.png": 90})
    model = Bad()
    tower = own_tower(model)
    model.seen = 0  # opening it took a look
    report = embed(tmp_path, out, image_tower=tower, backend="torch", batch_size=batch_size)
    assert (report.embedded, report.copies, model.seen) == (3, 3, 3)
    vectors = by_id(Store(out))
    assert len(vectors) == 6
    assert torch.equal(vectors["a.png"], vectors["d.png"])
    assert torch.equal(vectors["a.png"], vectors["c.png"])
    assert torch.equal(vectors["b.png"], vectors["e.png"])
    assert not torch.equal(vectors["a.png"], vectors["b.png"])
    assert not torch.equal(vectors["a.png"], vectors["f.png"])


def test_column_that_comes_later_and_wider_values(source: Path, out: Path, image_tower: ImageTower) -> None:
    rows = read_csv(source)
    file = source.with_suffix(".jsonl")

    def embedded(prices: list[Any], **more: Any) -> EmbedReport:
        priced = [{**row, "price": price, **more} for row, price in zip(rows, prices, strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in priced))
        return embed_with(image_tower, file, out)

    embedded(list(range(12)))
    later = [number + 0.5 for number in range(12)]
    assert counts(embedded(later)) == (0, 12, 12, 0)
    assert sorted(Store(out).column("price")) == later
    assert counts(embedded(later)) == (0, 0, 12, 0)
    assert counts(embedded(later, made="yesterday")) == (0, 12, 12, 0)
    assert Store(out).column("made") == ["yesterday"] * 12
    assert counts(embedded(later, made="yesterday")) == (0, 0, 12, 0)


def test_columns_of_other_software_are_kept(source: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, source, out)
    lance.dataset(str(out)).add_columns({"stars": "CAST(5 AS INT)"})
    assert not lance.dataset(str(out)).schema.field("stars").nullable
    rows = read_csv(source)
    shutil.copy(source.parent / rows[0]["path"], source.parent / "new.png")
    rows[3]["caption"] = "Another."
    write_csv(source, [*rows, {**rows[0], "path": "new.png"}])
    report = embed_with(image_tower, source, out)
    assert (*counts(report), report.moved) == (0, 1, 12, 0, 1)
    assert report.notes == [f"the column stars of {out}, which other software added, may be empty from now on"]
    assert Counter(Store(out).column("stars")) == {5: 12, None: 1}
    write_csv(source, rows)
    assert counts(embed_with(image_tower, source, out)) == (0, 0, 12, 0)
    for row in rows:
        row["stars"] = "many"  # which their column cannot hold
    write_csv(source, rows)
    report = embed_with(image_tower, source, out)
    assert counts(report) == (0, 0, 12, 0)
    assert report.not_kept == {"stars": 12}
    assert Counter(Store(out).column("stars")) == {5: 12, None: 1}


def test_no_name_and_no_image_ends_a_run(out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    save_levels(tmp_path, {"a.png": 100})
    bomb = io.BytesIO()
    Image.new("L", (4000, 4000)).save(bomb, "JPEG", progressive=True)
    start, end = bomb.getvalue().rindex(b"\xff\xda"), bomb.getvalue().rindex(b"\xff\xd9")
    (tmp_path / "scans.jpg").write_bytes(bomb.getvalue()[:end] + bomb.getvalue()[start:end] * 1000 + b"\xff\xd9")
    rows = [{"image": name, "text": name} for name in ("a.png", "half\ud83d.png", "scans.jpg")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = embed_with(image_tower, tmp_path / "pairs.jsonl", out)
    assert report.embedded == 1
    reasons = {item.id: item.reason for item in report.skipped}
    assert reasons == {
        "half\\ud83d.png": "file not found",
        "scans.jpg": "1,006 scans of 16.0 megapixels, which would take minutes to decode",
    }
    assert report.skipped_file is not None
    listed = Path(report.skipped_file).read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["id"] for line in listed} == set(reasons)


def test_a_column_of_texts_that_is_empty_is_said(out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    save_levels(tmp_path, {"a.png": 100, "b.png": 128})
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,\nb.png, \n")
    report = embed_with(image_tower, tmp_path / "pairs.csv", out)
    assert (report.without_text, report.notes) == (2, ["no image has a text: every cell of caption is empty"])


def test_report_counts_what_has_no_text_and_what_was_lost(out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    save_levels(tmp_path, {"a.png": 100, "b.png": 128, "c.png": 0})
    problem = Skipped("x.tar", "x.tar", "cut off")
    given = [
        Pair("a", tmp_path / "a.png", ("A text.",), {"a.b": 1, "a_b": 2}, ("title", "title")),
        Pair("b", tmp_path / "b.png", (), {"a.b": 3, "a_b": 3}),
        Pair("c", tmp_path / "c.png", ("half \ud83d",), {"a.b": "\ud83d"}),
    ]
    pairs = Pairs("given", 3, None, (), lambda: iter(given), None, ["a note"], [problem])
    report = embed_with(image_tower, pairs, out)
    assert report.without_text == 1
    assert report.notes == ["a note"]
    assert report.skipped == [problem]
    assert report.not_kept == {"title": 2, "a_b": 1}
    assert Store(out).texts() == [["A text."], [], ["half \ufffd"]]
    assert Store(out).column("a_b") == ["1", "3", "\ufffd"]


def test_captions_that_change_leave_the_space_of_vectors_alone(tmp_path: Path) -> None:
    """Before, each run wrote the vectors again, and nothing was given back."""
    out = tmp_path / "pairs.lance"
    identity = TowerIdentity(
        "timm:tower", "f" * 32, 4096, Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3), {"library": "timm"}
    )
    vectors = F.normalize(torch.randn(100, 4096, generator=torch.Generator().manual_seed(0)), dim=1)

    def size() -> float:
        return sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / (100 * 4096 * 2)

    for run in range(5):
        writer = StoreWriter(out, identity, centered=False)
        pairs = [Pair(f"{number:03}", b"", (f"caption {run}",), {}) for number in range(100)]
        if run == 0:
            writer.add(pairs, [f"{number:032x}" for number in range(100)], vectors, "torch")
        else:
            writer.keep([(pair, f"{number:032x}") for number, pair in enumerate(pairs)])
        writer.finish(None, prune=False)
    store = Store(out)
    assert store.texts() == [["caption 4"]] * 100
    assert torch.equal(store.vectors(), F.normalize(vectors.half().float(), dim=-1))
    assert size() < 1.2
    store.delete(store.column("id")[:50])
    tidy(lance.dataset(str(out)), kept_for=timedelta(0))
    assert size() < 0.7
    assert torch.equal(Store(out).vectors(), F.normalize(vectors[50:].half().float(), dim=-1))


# moved, copied and deleted images


@pytest.fixture
def folder(source: Path) -> Path:
    """The twelve drawings without a table; ids are file names, and texts are in files beside them."""
    for row in read_csv(source):
        (source.parent / row["path"]).with_suffix(".txt").write_text(row["caption"])
    source.unlink()
    return source.parent


def sync(report: EmbedReport) -> tuple[int, int, int, int, int]:
    return report.embedded, report.moved, report.unchanged, report.missing, report.pruned


def named(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix != ".txt")


def by_id(store: Store) -> dict[str, torch.Tensor]:
    return dict(zip(store.column("id"), store.vectors(), strict=True))


def test_moved_images_keep_their_vectors(folder: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, folder, out)
    before = by_id(Store(out))
    first, second, *_ = named(folder)
    (folder / "deep").mkdir()
    first.rename(folder / "deep" / "it's new.png")  # its name needs a quote in a filter
    second.rename(folder / "other.png")
    (folder / "other.txt").write_text("Another caption.")

    report = embed_with(image_tower, folder, out)
    assert sync(report) == (0, 2, 10, 2, 0)
    assert report.backend == "none"  # the tower did not run
    store = Store(out)
    after = by_id(store)
    assert set(after) == {*before, "deep/it's new.png", "other.png"}
    assert torch.equal(after["deep/it's new.png"], before[first.name])
    assert torch.equal(after["other.png"], before[second.name])
    place = store.column("id").index("other.png")
    assert store.texts()[place] == ["Another caption."]
    assert store.column("path")[place] == str(folder / "other.png")

    assert sync(embed_with(image_tower, folder, out)) == (0, 0, 12, 2, 0)
    assert sync(embed_with(image_tower, folder, out, prune=True)) == (0, 0, 12, 0, 2)
    assert sync(embed_with(image_tower, folder, out, prune=True)) == (0, 0, 12, 0, 0)
    pruned = by_id(Store(out))
    assert set(pruned) == set(after) - {first.name, second.name}
    assert all(torch.equal(pruned[name], after[name]) for name in pruned)

    (folder / "deep" / "it's new.png").rename(first)  # and back, in one run
    assert sync(embed_with(image_tower, folder, out, prune=True)) == (0, 1, 11, 0, 1)
    assert torch.equal(by_id(Store(out))[first.name], before[first.name])


def test_copies_and_images_that_change_places(folder: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, folder, out)
    before = by_id(Store(out))
    first, second, third, *_ = named(folder)
    for name in ("copy.png", "copy 2.png"):
        shutil.copy(third, folder / name)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    report = embed_with(image_tower, folder, out)
    assert sync(report) == (0, 4, 10, 0, 0)
    assert report.updated == 2
    after = by_id(Store(out))
    assert torch.equal(after[first.name], before[second.name])
    assert torch.equal(after[second.name], before[first.name])
    assert torch.equal(after["copy.png"], before[third.name])
    assert torch.equal(after["copy 2.png"], before[third.name])
    assert sync(embed_with(image_tower, folder, out)) == (0, 0, 14, 0, 0)


def test_folder_that_was_renamed(folder: Path, out: Path, image_tower: ImageTower) -> None:
    """Ids and contents are as they were; the paths are not."""
    embed_with(image_tower, folder, out)
    vectors = Store(out).vectors()
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    report = embed_with(image_tower, elsewhere, out, prune=True)
    assert sync(report) == (0, 0, 12, 0, 0)
    assert report.updated == 12
    assert Store(out).column("path") == [str(file) for file in named(elsewhere)]
    assert torch.equal(Store(out).vectors(), vectors)
    assert embed_with(image_tower, elsewhere, out).updated == 0


def test_prune_leaves_the_rows_of_other_sources(
    folder: Path, out: Path, image_tower: ImageTower, tmp_path: Path
) -> None:
    other = tmp_path / "source 2"  # begins like the first
    other.mkdir()
    for name in ("one.png", "two.png"):
        draw("ring", "orange", 20 + len(name)).save(other / name)
    shard = tmp_path / "shard.parquet"  # a table in the parent of both folders
    parquet.write_table(pa.table({"image": [(other / "one.png").read_bytes()], "caption": ["x"]}), shard)
    table = folder / "pairs.jsonl"
    files = named(folder)
    table.write_text("".join(json.dumps({"path": file.name}) + "\n" for file in files))
    for source in (table, other, shard):
        embed_with(image_tower, source, out)
    everything = set(Store(out).column("id"))
    assert len(everything) == 15

    (other / "one.png").unlink()
    files[0].unlink()
    table.write_text("".join(json.dumps({"path": file.name}) + "\n" for file in files[2:]))
    # The second is off the list, and may be on another: its file is there, so its row stays.
    assert sync(embed_with(image_tower, table, out, prune=True)) == (0, 0, 10, 0, 1)
    assert set(Store(out).column("id")) == everything - {files[0].name}
    assert sync(embed_with(image_tower, shard, out, prune=True)) == (0, 0, 1, 0, 0)
    assert sync(embed_with(image_tower, other, out, prune=True)) == (0, 0, 1, 0, 1)
    assert set(Store(out).column("id")) == everything - {files[0].name, "one.png"}


def test_an_image_that_takes_the_place_of_another_is_said(
    folder: Path, out: Path, image_tower: ImageTower, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ids are names below the source, so the files of two folders may have the same ones."""
    files = named(folder)
    embed_with(image_tower, folder, out)
    other = tmp_path / "other folder"
    other.mkdir()
    shutil.copy(files[1], other / files[0].name)
    shutil.copy(files[2], other / files[2].name)  # the same image: nothing is lost
    report = embed_with(image_tower, other, out)
    [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{other / files[0].name} takes the place of {files[0]}, which is still there")
    [note] = report.notes
    assert note.startswith("images that took the place of others of the same id, whose files are still there: 1,")
    assert f"such as {other / files[0].name} of {files[0]};" in note


def test_values_of_another_content_are_said(folder: Path, out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    """A column that the source does not name keeps what was said of the image before."""
    files = named(folder)
    table = folder / "table.jsonl"
    rows = [{"image": file.name, "text": "a", "by": "Ann", "year": None} for file in files[:2]]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed_with(image_tower, table, out)
    shutil.copy(files[2], files[0])
    table.write_text("".join(json.dumps({"image": file.name, "text": "a"}) + "\n" for file in files[:2]))
    [note] = embed_with(image_tower, table, out).notes
    assert note.startswith("values that were stored for other contents of the same images, and stay: 1 of by;")
    assert Store(out).column("by") == ["Ann", "Ann"]
    shutil.copy(files[3], files[0])
    table.write_text("".join(json.dumps({"image": file.name, "text": "a", "by": None}) + "\n" for file in files[:2]))
    assert embed_with(image_tower, table, out).notes == []
    assert Store(out).column("by") == [None, None]


def test_out_that_holds_something_else_is_refused(folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, reason in (
        (tmp_path / "file", "is a file, and a store is a folder"),
        (folder, "holds no store, but other"),
    ):
        before = sorted(folder.rglob("*"))
        with pytest.raises(UsageError, match=reason):
            embed_with(image_tower, folder, out)
        assert sorted(folder.rglob("*")) == before
    (tmp_path / "stopped.lance" / "data").mkdir(parents=True)  # as a first commit that was killed leaves it
    (tmp_path / "stopped.lance" / ".DS_Store").touch()
    embed_with(image_tower, folder, tmp_path / "stopped.lance")
    embed_with(image_tower, folder, tmp_path / "stopped.lance")


def test_nothing_is_pruned_where_no_image_can_be_used(folder: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, folder, out)
    for file in named(folder):
        file.unlink()
    with pytest.raises(PairsError, match="holds no images"):
        embed_with(image_tower, folder, out, prune=True)
    (folder / "broken.png").touch()
    assert sync(embed_with(image_tower, folder, out, prune=True)) == (0, 0, 0, 12, 0)
    assert len(Store(out)) == 12


def test_nothing_is_pruned_where_the_source_was_not_read_to_its_end(
    folder: Path, out: Path, image_tower: ImageTower
) -> None:
    table = folder / "pairs.jsonl"
    lines = [json.dumps({"path": file.name}) + "\n" for file in named(folder)]
    table.write_text("".join(lines))
    embed_with(image_tower, table, out)
    named(folder)[0].unlink()
    table.write_text("".join([*lines[1:], "{broken"]))
    report = embed_with(image_tower, read_pairs(table), out, prune=True)
    assert (report.missing, report.pruned) == (1, 0)
    assert [skipped.id for skipped in report.skipped] == ["pairs.jsonl, line 12"]
    assert len(Store(out)) == 12
    table.write_text("".join(lines[1:]))
    assert sync(embed_with(image_tower, table, out, prune=True)) == (0, 0, 11, 0, 1)


def test_prune_in_a_table_with_many_commits(
    folder: Path, out: Path, image_tower: ImageTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are found by their place; deleted rows before them must not shift it."""
    monkeypatch.setattr(store_writer, "COMMIT_ROWS", 3)
    embed_with(image_tower, folder, out, batch_size=2)
    before = by_id(Store(out))
    files = named(folder)
    for file in files[::3]:
        file.unlink()
    files[1].rename(folder / "moved.png")
    assert sync(embed_with(image_tower, folder, out, batch_size=2, prune=True)) == (0, 1, 7, 0, 5)
    store = Store(out)
    names = store.column("id")
    assert [row["id"] for row in store.rows(range(len(store)))] == names
    assert torch.equal(F.normalize(store.vectors_at(range(len(store))).float(), dim=-1), store.vectors())
    before["moved.png"] = before[files[1].name]
    assert all(torch.equal(by_id(store)[name], before[name]) for name in names)


def test_stray_metadata_is_not_new_every_time(source: Path, out: Path, image_tower: ImageTower) -> None:
    """What does not fit a column's type is kept as it can be, once."""
    lines = [{"path": row["path"], "caption": row["caption"], "n": i} for i, row in enumerate(read_csv(source))]
    file = source.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    embed_with(image_tower, file, out)
    lines[3]["n"] = "many"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert counts(embed_with(image_tower, file, out)) == (0, 1, 12, 0)
    assert counts(embed_with(image_tower, file, out)) == (0, 0, 12, 0)


@pytest.mark.parametrize("name", ["id", "hash", "texts", "vector", "", "a.b"])
def test_columns_whose_names_a_store_cannot_have(source: Path, out: Path, image_tower: ImageTower, name: str) -> None:
    write_csv(source, [row | {name: str(i)} for i, row in enumerate(read_csv(source))])
    embed_with(image_tower, source, out, text_column="caption")
    store = Store(out)
    [given] = [column for column in store.metadata_columns if column not in ("german", "shape")]
    assert sorted(store.column(given), key=int) == [str(i) for i in range(12)]
    assert counts(embed_with(image_tower, source, out, text_column="caption")) == (0, 0, 12, 0)


def test_worker_processes_make_the_same_store(source: Path, out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    other = tmp_path / "other.lance"
    embed_with(image_tower, source, out, workers=0, batch_size=5)
    embed_with(image_tower, source, other, workers=1, batch_size=5)
    assert content(Store(other)) == content(Store(out))
    assert torch.equal(Store(other).vectors(), Store(out).vectors())


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batch_size_does_not_matter(
    source: Path, out: Path, image_tower: ImageTower, tmp_path: Path, batch_size: int
) -> None:
    embed_with(image_tower, source, out)
    embed_with(image_tower, source, tmp_path / "other.lance", batch_size=batch_size)
    assert content(Store(tmp_path / "other.lance")) == content(Store(out))
    assert (Store(tmp_path / "other.lance").vectors() - Store(out).vectors()).abs().max() < ONE_FP16_STEP


@pytest.mark.parametrize("rows", [1, 5])
def test_commits_do_not_matter(
    source: Path, out: Path, image_tower: ImageTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    embed_with(image_tower, source, out)
    monkeypatch.setattr(store_writer, "COMMIT_ROWS", rows)
    embed_with(image_tower, source, tmp_path / "other.lance", batch_size=2)
    draw("ring", "orange", 30).save(source.parent / read_csv(source)[2]["path"])
    assert counts(embed_with(image_tower, source, tmp_path / "other.lance", batch_size=2)) == (1, 1, 11, 0)
    embed_with(image_tower, source, out)
    assert content(Store(tmp_path / "other.lance")) == content(Store(out))


def test_interrupted_run_goes_on(
    source: Path, out: Path, image_tower: ImageTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle; `kill -9` is below."""
    monkeypatch.setattr(store_writer, "COMMIT_ROWS", 20)
    rows = [{**row, "path": f"{copy}_{row['path']}"} for copy in range(10) for row in read_csv(source)]
    for row in rows:  # the same content again gets an id of its own
        shutil.copy(source.parent / row["path"].partition("_")[2], source.parent / row["path"])
    write_csv(source, rows)
    pairs = read_pairs(source)

    def read() -> Iterator[Pair]:
        yield from islice(pairs, 110)
        raise ValueError("the disk is gone")

    with pytest.raises(PairsError, match="the disk is gone"):
        embed_with(image_tower, replace(pairs, read=read), out, batch_size=2)
    done = len(Store(out))
    assert 80 <= done <= 110
    report = embed_with(image_tower, source, out)
    assert counts(report) == (0, 0, done, 0)
    assert report.moved == 120 - done  # the same images again have their vectors already


def test_folder_without_texts(source: Path, out: Path, image_tower: ImageTower) -> None:
    source.unlink()
    assert counts(embed_with(image_tower, source.parent, out)) == (12, 0, 0, 0)
    assert Store(out).texts() == [[]] * 12


def test_images_in_parquet(image_folder: Path, out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    files = sorted(image_folder.glob("*_red_*.png"))
    table = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "caption": ["x"] * len(files),
    }
    parquet.write_table(pa.table(table), tmp_path / "pairs.parquet")
    embed_with(image_tower, tmp_path / "pairs.parquet", out)
    store = Store(out)
    assert len(store) == len(files)
    expected = tmp_path / "expected.lance"
    embed_with(image_tower, image_folder, expected)
    known = dict(zip(Store(expected).column("hash"), Store(expected).vectors(), strict=True))
    for found, vector in zip(store.column("hash"), store.vectors(), strict=True):
        assert (vector - known[found]).abs().max() < ONE_FP16_STEP
    assert counts(embed_with(image_tower, tmp_path / "pairs.parquet", out)) == (0, 0, len(files), 0)


# images that cannot be used, and odd ones that can


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_broken_and_odd_images(out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    drawn = draw("cross", "red", 20)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    grey16 = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    palette = drawn.quantize(8)
    palette.info["transparency"] = 0
    good = {
        "cmyk.jpg": encode(drawn.convert("CMYK"), "JPEG"),
        "palette.png": encode(palette, "PNG"),
        "grey16.png": encode(grey16, "PNG"),
        "rotated.jpg": encode(drawn, "JPEG", exif=exif),
    }
    broken = {
        "truncated.jpg": (encode(drawn, "JPEG")[:400], "truncated"),
        "truncated.png": (encode(drawn, "PNG")[:100], "truncated"),
        "empty.png": (b"", "empty file"),
        "text.jpg": (b"This is not an image at all.", "not an image"),
        "vector.svg": (
            b"<svg xmlns='http://www.w3.org/2000/svg'>",
            "damaged SVG (no element found: line 1, column 40)",
        ),
        "bomb.png": (encode(Image.new("1", (3000, 3000)), "PNG"), "9.0 megapixels, more than the bound of 1"),
        "missing.png": (None, "file not found"),
    }
    for name, data in (good | {name: data for name, (data, _) in broken.items()}).items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    names = [*good, *broken]
    random.Random(0).shuffle(names)
    write_csv(tmp_path / "pairs.csv", [{"path": name, "caption": name} for name in names])

    for workers in (0, 1):
        report = embed_with(
            image_tower, tmp_path / "pairs.csv", out, batch_size=3, max_pixels=1_000_000, workers=workers
        )
        assert counts(report) == ((4, 0, 0, 7) if workers == 0 else (0, 0, 4, 7))
        assert Store(out).column("id") == sorted(good)
        listed = tmp_path / "pairs.skipped.jsonl"
        assert report.skipped_file == str(listed)
        items = [json.loads(line) for line in listed.read_text().splitlines()]
        assert {item["id"]: item["reason"] for item in items} == {name: why for name, (_, why) in broken.items()}
        assert all(item["path"] == str(tmp_path / item["id"]) for item in items)

    # mended, they are embedded (as one image, which they are), and nothing is listed any more
    for name in broken:
        drawn.save(tmp_path / name, "PNG")
    report = embed_with(image_tower, tmp_path / "pairs.csv", out)
    assert counts(report) == (1, 0, 4, 0)
    assert report.copies == 6
    assert not listed.exists()


def test_image_that_broke_since_keeps_its_vector(source: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, source, out)
    vectors = Store(out).vectors()
    (source.parent / read_csv(source)[0]["path"]).write_bytes(b"")
    assert counts(embed_with(image_tower, source, out)) == (0, 0, 11, 1)
    assert torch.equal(Store(out).vectors(), vectors)


def test_nothing_usable_is_an_error(source: Path, out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    for row in read_csv(source):
        (source.parent / row["path"]).write_bytes(b"")
    with pytest.raises(StoreError, match=r"none of 12 images could be used.*pairs\.skipped\.jsonl"):
        embed_with(image_tower, source, out)
    assert not Store.exists(out)
    assert len((tmp_path / "pairs.skipped.jsonl").read_text().splitlines()) == 12


def test_no_pairs_is_an_error(out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("path,caption\n")
    with pytest.raises((StoreError, PairsError), match=r"pairs\.csv"):
        embed_with(image_tower, tmp_path / "pairs.csv", out)


# towers


def test_another_tower_is_refused(source: Path, out: Path, image_tower: ImageTower) -> None:
    embed_with(image_tower, source, out)
    before = content(Store(out))
    torch.manual_seed(7)
    others = [
        open_image_tower("timm:test_vit", weights="random"),  # other weights
        open_image_tower("timm:test_resnet", weights="random"),  # another architecture
    ]
    for other in others:
        with pytest.raises(StoreError, match=image_tower.identity().fingerprint) as caught:
            embed_with(other, source, out)
        assert other.identity().fingerprint in str(caught.value)
    assert content(Store(out)) == before


def test_other_preprocessing_is_refused(source: Path, out: Path) -> None:
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    half = (0.5, 0.5, 0.5)
    embed_with(open_image_tower(module, preprocessing=Preprocessing((32, 32), half, half)), source, out)
    other = open_image_tower(module, preprocessing=Preprocessing((32, 32), half, half, "bilinear"))
    with pytest.raises(StoreError, match="fingerprint"):
        embed_with(other, source, out)


def test_tower_by_name_and_file(source: Path, out: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "tower.safetensors")
    for expected in ((12, 0, 0, 0), (0, 0, 12, 0)):
        report = embed(
            source,
            out,
            image_tower="timm:test_vit",
            image_tower_weights=tmp_path / "tower.safetensors",
            backend="torch",
        )
        assert counts(report) == expected
    assert Store(out).tower.weights == str(tmp_path / "tower.safetensors")
    with pytest.raises(TowerError, match="--image-tower-weights"):
        embed(source, out, image_tower="timm:test_vit")


# centre


def test_center(source: Path, out: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    embed_with(image_tower, source, tmp_path / "plain.lance")
    plain = Store(tmp_path / "plain.lance").vectors()
    rows = read_csv(source)
    embed_with(image_tower, source, out, mean_center=True)
    store = Store(out)
    assert store.center is not None
    assert torch.allclose(store.center, plain.mean(0), atol=1e-6)
    assert torch.equal(store.vectors(), plain)  # kept as they are; what reads them subtracts
    assert torch.allclose(store.vectors(store.center), F.normalize(plain - plain.mean(0), dim=-1), atol=1e-5)

    draw("ring", "orange", 30).save(source.parent / "new.png")
    write_csv(source, [*rows, rows[0] | {"path": "new.png"}])
    embed_with(image_tower, source, out)  # it is a property of the store; --mean-center need not be said again
    again = Store(out)
    assert len(again) == 13
    assert again.center is not None
    assert torch.equal(again.center, store.center)

    with pytest.raises(StoreError, match="made without --mean-center"):
        embed_with(image_tower, source, tmp_path / "plain.lance", mean_center=True)


# kill -9

DRIVER = """
import lamplit.store.embed.embedding
from lamplit.cli.main import main

if __name__ == "__main__":
    lamplit.store.embed.store_writer.COMMIT_ROWS = 8
    main()
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """The real command, killed with SIGKILL again and again, then left alone: every image is there once."""
    generator = random.Random(os.getpid())
    folder = tmp_path / "images"
    folder.mkdir()
    drawn = [(s, c, r) for s in SHAPES for c in COLORS for r in range(8, 29, 3)]
    rows = []
    for number, (shape, color, radius) in enumerate(drawn):
        draw(shape, color, radius).save(folder / f"{number:03}.png")
        rows.append({"path": f"{number:03}.png", "caption": f"A {color} {shape} of {radius}."})
    write_csv(folder / "pairs.csv", rows)
    assert len(rows) == 210
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "tower.safetensors")
    (tmp_path / "driver.py").write_text(DRIVER)

    def start(out: Path) -> subprocess.Popen[str]:
        command = [
            sys.executable, tmp_path / "driver.py", "embed", folder / "pairs.csv", "--image-tower", "timm:test_resnet",
            "--image-tower-weights", tmp_path / "tower.safetensors", "--out", out, "--backend", "torch",
            "--batch-size", "8", "--workers", "1", "--json",
        ]  # fmt: skip
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole, killed = tmp_path / "whole.lance", tmp_path / "killed.lance"
    calm = start(whole)
    sizes = []
    for commits in (0, 2, 8):  # since the start of each run
        before = len(Store(killed)) if Store.exists(killed) else 0
        process = start(killed)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            size = len(Store(killed)) if Store.exists(killed) else 0
            if size - before >= commits * 8:
                break
            time.sleep(0.005)
        time.sleep(generator.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was at work
        if Store.exists(killed):
            ids = Store(killed).column("id")
            assert len(ids) == len(set(ids))
            sizes.append(len(ids))
    assert sizes == sorted(sizes)
    assert 0 < sizes[-1] < 210

    process = start(killed)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert (report["embedded"], report["unchanged"]) == (210 - sizes[-1], sizes[-1])

    _, stderr = calm.communicate(timeout=300)
    assert calm.returncode == 0, stderr
    assert content(Store(killed)) == content(Store(whole))
    assert Store(killed).column("id") == [row["path"] for row in rows]
    assert (Store(killed).vectors() - Store(whole).vectors()).abs().max() < ONE_FP16_STEP


class Elsewhere(nn.Module):
    """A module that says where its weight is when it runs, and gives vectors on the CPU, which `meta` cannot."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 2)
        self.devices: list[str] = []
        self.fails_at = fails_at

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.devices.append(self.convolution.weight.device.type)
        if len(self.devices) == self.fails_at:
            raise RuntimeError("out of memory")
        return torch.ones(len(images), 4)


@pytest.mark.parametrize("fails_at", [None, 3])
def test_tower_of_the_callers_comes_back(source: Path, out: Path, fails_at: int | None) -> None:
    module = Elsewhere(fails_at).train()
    tower = open_image_tower(module, preprocessing=Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3))
    module.train()
    weight, data = module.convolution.weight, module.convolution.weight.data_ptr()
    failing = nullcontext() if fails_at is None else pytest.raises(RuntimeError, match="out of memory")
    with failing:
        embed(source.parent, out, image_tower=tower, backend="torch", device="meta", batch_size=4)
    assert set(module.devices[1:]) == {"meta"}  # the first is that of opening
    assert module.convolution.weight is weight
    assert (weight.device.type, weight.data_ptr(), weight.requires_grad) == ("cpu", data, True)
    assert weight.is_contiguous()
    assert module.training


def test_two_stores_with_one_backbone(source: Path, out: Path, tmp_path: Path) -> None:
    """As `evaluate` with two benchmarks does: a new tower, with another preprocessing, around the same backbone."""
    module = Elsewhere()
    for number, size in enumerate(((8, 8), (10, 10))):
        tower = ImageTower("module:one", module, Preprocessing(size, (0.5,) * 3, (0.5,) * 3), {"library": "module"})
        embed(source, tmp_path / f"{number}.lance", image_tower=tower, backend="torch", device="meta")
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert module.devices.count("cpu") == 2  # what measures the width of each tower


def test_backend_that_does_not_exist(source: Path, out: Path, image_tower: ImageTower) -> None:
    with pytest.raises(UsageError, match=r"^backend is 'tensorrt'; expected one of auto, torch, compile, onnx$"):
        embed(source, out, image_tower=image_tower, backend="tensorrt")  # type: ignore[arg-type]
    assert not out.exists()


def test_tower_that_is_none(source: Path, out: Path, image_tower: ImageTower) -> None:
    with pytest.raises(UsageError, match=r"open it first: lamplit\.open_image_tower\(module, preprocessing=lamplit\."):
        embed(source, out, image_tower=nn.Identity())
    model = LiT(None, image_tower.identity(), image_tower)
    with pytest.raises(UsageError, match=r"image_tower is a LiT, a whole model; .* image_tower='model:FOLDER'"):
        embed(source, out, image_tower=model)
    with pytest.raises(UsageError, match="'None' is not an image tower; expected timm:NAME"):
        embed(source, out, image_tower=None)  # type: ignore[arg-type]


def test_source_that_is_a_list(out: Path, image_tower: ImageTower) -> None:
    with pytest.raises(UsageError, match=r"^source is a list; give a folder or a file of pairs$"):
        embed(["a.png", "b.png"], out, image_tower=image_tower)  # type: ignore[arg-type]


def test_onnx_runs_on_the_cpu_alone(source: Path, out: Path, image_tower: ImageTower) -> None:
    with pytest.raises(UsageError, match="backend onnx runs on the CPU, not on meta"):
        embed(source, out, image_tower=image_tower, backend="onnx", device="meta")
