"""A source that is embedded in units, apart, gives the store that one process makes of it."""

from __future__ import annotations

import copy
import csv
import io
import json
import multiprocessing
import shutil
import tarfile
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from same_stores import require_equal_stores

from lamplit.data.sources import read_pairs
from lamplit.errors import StoreError, UsageError
from lamplit.store.embed import unit_embedding
from lamplit.store.embed.embedding import embed
from lamplit.store.embed.unit_embedding import HowToEmbed, UnitEmbedder
from lamplit.store.embed_report import EmbedReport
from lamplit.store.lance_store import Store
from lamplit.store.table import table_writing
from lamplit.store.table.store_lock import store_lock
from lamplit.store.unit_records import UnitRecords, commit_units
from lamplit.towers.images.image_tower import ImageTower, open_image_tower

OPTIONS: dict[str, Any] = {"backend": "torch", "batch_size": 8}


def captions(folder: Path) -> list[dict[str, str]]:
    with (folder / "pairs.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_folder(images: Path, folder: Path) -> Path:
    for number, row in enumerate(captions(images)):
        file = folder / f"{number % 3}" / row["path"]
        file.parent.mkdir(exist_ok=True)
        shutil.copy(images / row["path"], file)
        if number % 2:
            file.with_suffix(".txt").write_text(row["caption"])
        if number % 5 == 0:
            file.with_suffix(".json").write_text(json.dumps({"number": number if number < 30 else f"no. {number}"}))
    (folder / "1" / "broken.jpg").write_bytes(b"no image")
    return folder


def as_table(images: Path, folder: Path) -> Path:
    """Two rows an image, far apart; some numbers are whole, others are not, and a column begins late."""
    rows: list[dict[str, Any]] = []
    for name in ("caption", "german"):
        for number, row in enumerate(captions(images)):
            rows.append({"image": str(images / row["path"]), "text": row[name], "n": number if number < 40 else 0.5})
            if number > 50:
                rows[-1]["late"] = [number]
    rows.insert(50, {"image": "gone.png", "text": "nothing"})
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def as_parquet(images: Path, folder: Path) -> Path:
    rows = captions(images)
    for name, part in (("a", rows[:35]), ("b", rows[35:])):
        content = [(images / row["path"]).read_bytes() for row in part]
        table = pa.table({"image": content, "text": [row["caption"] for row in part], name: [1] * len(part)})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    return folder


def as_tars(images: Path, folder: Path) -> Path:
    rows = captions(images)
    for number in range(6):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for place, row in enumerate(rows[number * 10 : number * 10 + 10]):
                name, ending = f"{number}{place:03}", row["path"].rpartition(".")[2]
                about = {"n": place} if number < 4 else {"n": "many", "new": True}
                for file, content in (
                    (f"{name}.{ending}", (images / row["path"]).read_bytes()),
                    (f"{name}.txt", row["caption"].encode()),
                    (f"{name}.json", json.dumps(about).encode()),
                ):
                    member = tarfile.TarInfo(file)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


MAKERS = {"folder": as_folder, "table": as_table, "parquet": as_parquet, "tars": as_tars}


def skipped(out: Path) -> list[dict[str, str]]:
    file = out.with_suffix(".skipped.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(map(json.loads, lines), key=repr)


def shards(tower: ImageTower, source: Path, out: Path, count: int, *, rows: int = 8) -> list[EmbedReport]:
    # The last one first: any order will do.
    return [
        embed(source, out, image_tower=tower, shard=(index, count), unit_rows=rows, **OPTIONS)
        for index in reversed(range(count))
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_shards_make_the_store_of_one_process(
    kind: str, image_folder: Path, image_tower: ImageTower, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    source = MAKERS[kind](image_folder, tmp_path / "source")
    whole = embed(source, tmp_path / "whole.lance", image_tower=image_tower, **OPTIONS)
    reports = shards(image_tower, source, tmp_path / "parts.lance", 3)
    require_equal_stores(tmp_path / "parts.lance", tmp_path / "whole.lance")
    assert skipped(tmp_path / "parts.lance") == skipped(tmp_path / "whole.lance")
    together = EmbedReport("", "")
    for report in reports:
        together.add(report)
    assert together.num_usable == whole.num_usable == 60
    assert together.without_text == whole.without_text
    assert len(together.skipped) == len(whole.skipped)
    assert [report.units_left for report in reports][-1] == 0
    assert all(report.units_left for report in reports[:-1])
    again = shards(image_tower, source, tmp_path / "parts.lance", 2)
    assert [(report.num_usable, report.units_left) for report in again] == [(0, 0), (0, 0)]
    require_equal_stores(tmp_path / "parts.lance", tmp_path / "whole.lance")
    # One process finds nothing to do, either.
    after = embed(source, tmp_path / "parts.lance", image_tower=image_tower, **OPTIONS)
    assert (after.embedded, after.updated, after.unchanged) == (0, 0, 60)


def embedder_of(tower: ImageTower, source: Path, out: Path, *, rows: int = 8, centered: bool = False) -> UnitEmbedder:
    how = HowToEmbed(centered, "torch", torch.device("cpu"), 8, 0, 10**6)
    # A copy: who embeds in units gives no tower back as it was.
    return UnitEmbedder(read_pairs(source), copy.deepcopy(tower), out, how, rows)


def stage_all(embedder: UnitEmbedder) -> None:
    for unit in embedder.units:
        assert embedder.embed(unit, lambda _: None) is not None


@pytest.fixture
def lines(image_folder: Path, tmp_path: Path) -> Path:
    return as_table(image_folder, tmp_path)


def test_units_of_other_columns_are_committed_together(lines: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    """All are staged before one is committed: none has seen the columns of the others, or the types of their values."""
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["id_"] = number % 60
        row["kind"] = ["text", 3, None, 2**60, 0.5, [1]][number // 20 % 6]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed(lines, tmp_path / "whole.lance", image_tower=image_tower, **OPTIONS)
    out = tmp_path / "parts.lance"
    embedder = embedder_of(image_tower, lines, out)
    stage_all(embedder)
    assert len(Store(out)) == 0
    staged = UnitRecords(out).staged()
    assert len(staged) == len(embedder.units) > 10
    version = lance.dataset(str(out)).version
    commit_units(out)
    assert UnitRecords(out).staged() == []
    assert lance.dataset(str(out)).version > version
    require_equal_stores(out, tmp_path / "whole.lance")


def test_one_commit_takes_all_that_is_staged(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    out = tmp_path / "parts.lance"
    stage_all(embedder_of(image_tower, image_folder / "pairs.csv", out))
    version = lance.dataset(str(out)).version
    commit_units(out)
    assert lance.dataset(str(out)).version == version + 1
    assert len(Store(out)) == 60


def test_the_second_attempt_at_a_unit_loses(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    out = tmp_path / "parts.lance"
    first, second = (embedder_of(image_tower, image_folder / "pairs.csv", out) for _ in range(2))
    stage_all(first)
    assert first.left() == second.left() == []
    files = sorted((out / "data").iterdir())
    for unit in second.units[:3]:
        assert second.embed(unit, lambda _: None) is None
    assert sorted((out / "data").iterdir()) == files  # the loser leaves nothing
    commit_units(out)
    for unit in second.units:
        assert second.embed(unit, lambda _: None) is None
    commit_units(out)
    ids = Store(out).column("id")
    assert len(ids) == len(set(ids)) == 60


def test_a_committer_that_ends_between_commit_and_mark(
    image_folder: Path, image_tower: ImageTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "parts.lance"
    stage_all(embedder_of(image_tower, image_folder / "pairs.csv", out))

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(UnitRecords, "mark", ended)
        with pytest.raises(KeyboardInterrupt):
            commit_units(out)
    assert len(Store(out)) == 60
    assert len(UnitRecords(out).staged()) == 8
    # Fragments keep their names until the next committer has looked.
    monkeypatch.setattr(table_writing, "_MOST_FRAGMENTS", 0)
    Store(out).finish()
    assert len(lance.dataset(str(out)).get_fragments()) == 8
    commit_units(out)
    assert UnitRecords(out).staged() == []
    assert len(Store(out)) == 60
    Store(out).finish()
    assert len(lance.dataset(str(out)).get_fragments()) == 1
    commit_units(out)
    assert len(Store(out)) == 60


def test_a_unit_whose_files_are_gone_is_embedded_again(
    image_folder: Path, image_tower: ImageTower, tmp_path: Path
) -> None:
    out = tmp_path / "parts.lance"
    embedder = embedder_of(image_tower, image_folder / "pairs.csv", out)
    stage_all(embedder)
    records = UnitRecords(out)
    [fragment] = records.read(embedder.units[3].name).fragments
    (out / "data" / fragment.files[0].path).unlink()
    commit_units(out)
    assert embedder.left() == [embedder.units[3]]
    assert len(Store(out)) == 52
    [report] = shards(image_tower, image_folder / "pairs.csv", out, 1)
    assert (report.embedded, report.units_left) == (8, 0)
    assert len(Store(out)) == 60


def twenty_embedded(image_folder: Path, image_tower: ImageTower, folder: Path) -> tuple[Path, Path, list[str]]:
    """Copy the first twenty drawings and embed them; return the copies, the store, and the names of all drawings."""
    source, out = folder / "photos", folder / "parts.lance"
    source.mkdir()
    names = sorted(file.name for file in image_folder.glob("*_*.*"))
    for name in names[:20]:
        shutil.copy(image_folder / name, source / name)
    embed(source, out, image_tower=image_tower, **OPTIONS)
    return source, out, names


def test_what_the_store_held_is_kept(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    """Rows that are there, that were changed, and contents under other names; another row stays as it is."""
    source, out, names = twenty_embedded(image_folder, image_tower, tmp_path)
    (source / names[0]).unlink()  # another source's
    (source / names[1]).rename(source / "moved.png")
    shutil.copy(image_folder / names[30], source / names[2])
    (source / names[3]).with_suffix(".txt").write_text("a new caption")
    shutil.copy(source / names[4], source / "copy.png")
    for name in names[20:40]:
        shutil.copy(image_folder / name, source / name)
    whole = tmp_path / "whole.lance"
    shutil.copytree(out, whole)
    expected = embed(source, whole, image_tower=image_tower, **OPTIONS)
    reports = shards(image_tower, source, out, 2)
    require_equal_stores(out, whole)
    together = EmbedReport("", "")
    for report in reports:
        together.add(report)
    assert (together.updated, together.unchanged) == (2, expected.unchanged)
    assert together.num_usable == expected.num_usable == 40


def test_rows_of_units_are_not_read_again(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    """What a process keeps of a store does not grow with what units of the same source have put there."""
    source, out, names = twenty_embedded(image_folder, image_tower, tmp_path)
    for name in names[20:]:
        shutil.copy(image_folder / name, source / name)
    embed(source, out, image_tower=image_tower, shard=(1, 2), unit_rows=16, **OPTIONS)
    how = HowToEmbed(False, "torch", torch.device("cpu"), 8, 0, 10**8)
    embedder = UnitEmbedder(read_pairs(source), image_tower, out, how, rows=16)
    assert len(embedder.left()) == 2
    before = embedder._before
    assert len(Store(out)) > 40
    assert len(before.is_seen) == 20, "those of the first run alone"
    assert all(row is not None for row in before.read(names[:20]))
    embed(source, out, image_tower=image_tower, shard=(0, 2), unit_rows=16, **OPTIONS)
    whole = tmp_path / "whole.lance"
    embed(source, whole, image_tower=image_tower, **OPTIONS)
    require_equal_stores(out, whole)


def test_centre_is_fixed_when_all_is_there(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    source, out = image_folder / "pairs.csv", tmp_path / "parts.lance"
    embed(source, tmp_path / "whole.lance", image_tower=image_tower, mean_center=True, **OPTIONS)
    options = OPTIONS | {"image_tower": image_tower, "mean_center": True, "unit_rows": 16}
    embed(source, out, shard=(1, 2), **options)
    assert Store(out).centered
    assert Store(out).center is None
    embed(source, out, shard=(0, 2), **options)
    center, expected = Store(out).center, Store(tmp_path / "whole.lance").center
    assert center is not None
    assert expected is not None
    torch.testing.assert_close(center, expected, atol=1e-4, rtol=0)


def test_nothing_that_can_be_used(image_tower: ImageTower, tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "parts.lance"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.jpg").write_bytes(b"no image")
    first = embed(source, out, image_tower=image_tower, shard=(0, 2), unit_rows=8, **OPTIONS)
    assert (first.units, first.units_left, len(first.skipped)) == (3, 3, 12)
    for _ in range(2):  # nothing is kept that would hide the images when they are mended
        with pytest.raises(StoreError, match="nothing to embed: none of 20 images could be used"):
            shards(image_tower, source, out, 1)
    assert not Store.exists(out)
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(source / f"{number}.jpg")
    [report] = shards(image_tower, source, out, 1)
    assert (report.num_usable, report.units_left, skipped(out)) == (20, 0, [])


def test_a_unit_without_images_beside_others(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    """The units without rows are committed, too, as soon as there is a table."""
    source, out = tmp_path / "photos", tmp_path / "parts.lance"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.jpg").write_bytes(b"no image")
    for file in image_folder.glob("*_ring.*"):
        shutil.copy(file, source / file.name)
    reports = [
        embed(source, out, image_tower=image_tower, shard=(index, 2), unit_rows=4, **OPTIONS) for index in range(2)
    ]
    assert [report.units_left for report in reports][-1] == 0
    assert len(Store(out)) == 12
    assert len(skipped(out)) == 8


def test_another_tower_is_refused(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    out = tmp_path / "parts.lance"
    shards(image_tower, image_folder / "pairs.csv", out, 1)
    other = open_image_tower("timm:test_vit", weights="random")
    with pytest.raises(StoreError, match="their vectors cannot be compared"):
        shards(other, image_folder / "pairs.csv", out, 1)


def test_while_another_process_commits(
    image_folder: Path, image_tower: ImageTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit on the way is left to that process; the last one waits, and then names it."""
    source, out = image_folder / "pairs.csv", tmp_path / "parts.lance"
    shards(image_tower, source, out, 3)
    monkeypatch.setattr(unit_embedding, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(unit_embedding, "PATIENCE", 0.2)
    with store_lock(out, "commits units"), pytest.raises(StoreError, match=r"in use: process .* commits units since"):
        shards(image_tower, source, out, 1, rows=5)
    assert len(UnitRecords(out).staged()) == 12
    [report] = shards(image_tower, source, out, 1, rows=5)
    assert (report.num_usable, report.units_left, len(Store(out))) == (0, 0, 60)


def commit_often(out: Path, until: int) -> None:
    while not Store.exists(out) or len(Store(out)) < until:
        commit_units(out)


@pytest.mark.slow
def test_several_committers_at_once(image_folder: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    source, out = as_table(image_folder, tmp_path), tmp_path / "parts.lance"
    context = multiprocessing.get_context("spawn")
    committers = [context.Process(target=commit_often, args=(out, 60)) for _ in range(2)]
    for process in committers:
        process.start()
    stage_all(embedder_of(image_tower, source, out, rows=2))
    for process in committers:
        process.join(300)
        assert process.exitcode == 0
    shards(image_tower, source, out, 1, rows=2)
    embed(source, tmp_path / "whole.lance", image_tower=image_tower, **OPTIONS)
    require_equal_stores(out, tmp_path / "whole.lance")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shard": (2, 2)}, "there is no shard 2 of 2; of 2 shards they are 0 to 1"),
        ({"shard": (-1, 2)}, "there is no shard -1 of 2"),
        ({"shard": (0, 2), "unit_rows": 0}, "a unit of 0 rows is none"),
        ({"shard": (0, 2), "prune": True}, "does not see all files"),
        ({"unit_rows": 5}, "unit_rows is the size of the units"),
        ({"shard": (0, 2), "cluster": "ray"}, "a cluster takes all units; leave the shard out"),
        ({"cluster": "dask"}, "the cluster is 'dask'; expected ray or ray://HOST:PORT"),
        ({"cluster": "ray", "image_tower": object()}, "give the names of both"),
        ({"cluster": "ray", "image_tower_weights": "random"}, "random weights are others in each process"),
    ],
)
def test_what_is_refused(options: dict[str, Any], reason: str, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        embed(image_folder, tmp_path / "a.lance", **{"image_tower": "timm:test_vit"} | options)


def test_one_process_embeds_the_same_images_meanwhile(
    image_folder: Path, image_tower: ImageTower, tmp_path: Path
) -> None:
    """What was staged before does not know of it; the run that finishes the store deletes what is there twice."""
    source, out = image_folder / "pairs.csv", tmp_path / "parts.lance"
    embedder = embedder_of(image_tower, source, out)
    stage_all(embedder)
    embed(source, out, image_tower=image_tower, **OPTIONS)
    report = EmbedReport("", "")
    embedder.finish(report)
    assert report.notes == [f"60 rows of {out} were there twice, left by two writers at once; one of each is kept"]
    embed(source, tmp_path / "whole.lance", image_tower=image_tower, **OPTIONS)
    require_equal_stores(out, tmp_path / "whole.lance")
