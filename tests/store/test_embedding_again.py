"""Embedding again over any mixture of rows, against a new store of the same source."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.data.decoding import images
from lamplit.data.pairs import Pair, Pairs
from lamplit.store.embed import store_writer
from lamplit.store.embed.embedding import EmbedReport, embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower

ONE_FP16_STEP = 1e-3  # for unit vectors, whose coordinates are less than 1
Given = tuple[int, int, list[str], str | None]  # id, file, texts, metadata
rows_given = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.integers(0, 6),
        st.lists(st.sampled_from(["a", "b", "é"]), max_size=2),
        st.sampled_from([None, "", "x"]),
    ),
    min_size=1,
    max_size=16,
)
contents_given = st.lists(st.integers(0, 4), min_size=6, max_size=6)  # of each file; the seventh is not there


def put_files(folder: Path, drawings: Sequence[Path], contents: Sequence[int]) -> None:
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        shutil.copyfile(drawings[content], folder / f"{number}.png")


def as_pairs(folder: Path, rows: Sequence[Given]) -> Pairs:
    pairs = [Pair(f"id{name}", folder / f"{file}.png", tuple(texts), {"m": value}) for name, file, texts, value in rows]
    return Pairs("made up", len(pairs), None, (), lambda: iter(pairs))


def by_id(store: Store) -> dict[str, dict[str, object]]:
    return {row["id"]: row for row in store.rows()}


def usable(report: EmbedReport) -> int:
    return report.embedded + report.moved + report.copies + report.unchanged


@settings(max_examples=25)
@given(rows_given, contents_given, rows_given, contents_given, st.integers(1, 5), st.integers(1, 4))
def test_again_gives_what_a_new_store_has(
    tmp_path_factory: pytest.TempPathFactory,
    image_folder: Path,
    image_tower: ImageTower,
    first_rows: list[Given],
    first_contents: list[int],
    rows: list[Given],
    contents: list[int],
    batch_size: int,
    compared: int,
) -> None:
    folder = tmp_path_factory.mktemp("again")
    drawings = sorted(image_folder.glob("*.png"))[:5]
    first_rows, rows = ([*some, (9, 0, ["a"], None)] for some in (first_rows, rows))  # at least one is usable
    put_files(folder / "files", drawings, first_contents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_BLOCKS_BEFORE", 1)
        patch.setattr(store_writer, "COMPARED_ROWS", compared)
        options = {"image_tower": image_tower, "backend": "torch", "batch_size": batch_size}
        embed(as_pairs(folder / "files", first_rows), folder / "a.lance", **options)
        before = by_id(Store(folder / "a.lance"))
        put_files(folder / "files", drawings, contents)
        again = embed(as_pairs(folder / "files", rows), folder / "a.lance", **options)
        new = embed(as_pairs(folder / "files", rows), folder / "new.lance", **options)
    store, fresh = Store(folder / "a.lance"), Store(folder / "new.lance")
    after, expected = by_id(store), by_id(fresh)
    assert after == {**before, **expected}
    vectors = dict(zip(store.column("id"), store.vectors(), strict=True))
    for name, vector in zip(fresh.column("id"), fresh.vectors(), strict=True):
        assert (vectors[name] - vector).abs().max() < ONE_FP16_STEP
    assert (again.skipped, again.without_text, again.not_kept) == (new.skipped, new.without_text, new.not_kept)
    assert usable(again) == usable(new) == len(expected)
    both = expected.keys() & before.keys()
    assert again.updated == sum(expected[name] != before[name] for name in both)
    same = {name for name in both if expected[name]["hash"] == before[name]["hash"]}
    assert again.unchanged == len(same)
    stored = {row["hash"] for row in before.values()}
    assert again.moved == sum(expected[name]["hash"] in stored for name in expected.keys() - same)
    assert again.embedded == len({row["hash"] for row in expected.values()} - stored)


def test_hashes_are_those_of_the_files(tmp_path: Path, image_folder: Path, image_tower: ImageTower) -> None:
    drawings = sorted(image_folder.glob("*.png"))[:3]
    put_files(tmp_path / "files", drawings, range(3))
    pairs = as_pairs(tmp_path / "files", [(number, number, [], None) for number in range(3)])
    for _ in range(2):
        embed(pairs, tmp_path / "a.lance", image_tower=image_tower, backend="torch")
        hashes = [blake2b(drawing.read_bytes(), digest_size=16).hexdigest() for drawing in drawings]
        assert Store(tmp_path / "a.lance").column("hash") == hashes
