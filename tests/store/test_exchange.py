"""Stores from vectors that are there already, what is done with them, and the way back."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.nn import functional as F
from vector_files import some, write_part

import lamplit
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.vectors import foreign_tables as columns_of
from lamplit.data.vectors import foreign_vectors as vectors_of
from lamplit.errors import ImageError, PairsError, StoreError, TowerError, UsageError
from lamplit.files import _machine
from lamplit.inspection import describe
from lamplit.store import exchange
from lamplit.store.exchange import ImportReport, export_vectors, import_vectors
from lamplit.store.lance_store import Store
from lamplit.store.table.column_types import as_text
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, open_image_tower

ONE_FP16_STEP = 1e-3  # for unit vectors, whose coordinates are less than 1
ACME = "acme:pathology-v3"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pairs.lance"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (columns_of, vectors_of, exchange):
        monkeypatch.setattr(module, "BLOCK_ROWS", 3)


def unit(vectors: np.ndarray) -> torch.Tensor:
    return F.normalize(torch.from_numpy(vectors.astype(np.float64)), dim=-1).float()


def stored_bytes(store: Store) -> bytes:
    column = store.take(range(len(store)))["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).tobytes()


def import_array(vectors: np.ndarray, out: Path, **options: Any) -> ImportReport:
    np.save(out.with_suffix(".npy"), vectors)
    return import_vectors(out.with_suffix(".npy"), out, image_tower=ACME, **options)


# what a store of imported vectors is


def test_a_table_of_lance(tmp_path: Path, out: Path) -> None:
    vectors = some(5, kind=np.float32)
    cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)
    lance.write_dataset(pa.table({"vector": cells, "id": list("abcde"), "text": ["x"] * 5}), tmp_path / "db.lance")
    with pytest.raises(StoreError, match=r"not one that lamplit made.*: lamplit import .*db\.lance --image-tower NAME"):
        Store(tmp_path / "db.lance")
    report = import_vectors(tmp_path / "db.lance", out, image_tower=ACME)
    assert (report.imported, report.texts) == (5, 5)
    assert torch.allclose(Store(out).vectors(), unit(vectors), atol=ONE_FP16_STEP)
    assert Store(out).take(range(5), ["id_"])["id_"].to_pylist() == list("abcde")
    with pytest.raises(UsageError, match="is a store already"):
        import_vectors(out, tmp_path / "another.lance", image_tower=ACME)


@pytest.mark.usefixtures("small_blocks")
def test_clip_retrievals_folder(tmp_path: Path, out: Path) -> None:
    made = {number: some(7, seed=number, kind=np.float16) for number in (0, 2, 10)}
    for number, vectors in made.items():
        write_part(
            tmp_path / "clip", str(number), vectors, image_path=[f"{number}/{i}" for i in range(7)],
            caption=[f"text {number} {i}" for i in range(7)], n=[float(i) for i in range(7)],
        )  # fmt: skip
    report = import_vectors(tmp_path / "clip", out, image_tower=ACME)
    assert (report.store, report.image_tower, report.width) == (str(out), ACME, 4)
    assert (report.imported, report.texts, report.skipped, report.skipped_file) == (21, 21, [], None)
    store = Store(out)
    assert store.column("id") == [f"{number:09}" for number in range(21)]
    assert store.column("path") == [f"{number}/{i}" for number in made for i in range(7)]
    assert store.texts() == [[f"text {number} {i}"] for number in made for i in range(7)]
    assert store.column("n") == [float(i) for i in range(7)] * 3
    assert (store.vectors() - unit(np.concatenate(list(made.values())))).abs().max() < ONE_FP16_STEP
    assert store.backend == "imported"
    assert not store.centered


def test_what_made_the_vectors_is_a_name(out: Path, image_tower: ImageTower) -> None:
    import_array(some(3, image_tower.width), out)
    identity = Store(out).tower
    assert identity == TowerIdentity.of_imported(ACME, image_tower.width)
    assert TowerIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    assert (identity.spec, identity.width, identity.preprocessing) == (ACME, image_tower.width, None)
    assert identity.imported
    assert not image_tower.identity().imported
    assert identity.fingerprint.startswith("vectors-")
    others = [TowerIdentity.of_imported(ACME, 5), TowerIdentity.of_imported("acme:v4", 64), identity]
    assert len({other.fingerprint for other in others}) == 3


def test_info(tmp_path: Path, out: Path) -> None:
    import_array(some(3), out)
    found = describe(out)
    assert (found["image tower"], found["backend"], found["image size"]) == (ACME, "imported", "unknown")
    assert found["vectors"].startswith("imported; the fingerprint is of the tower's name")


def test_equal_vectors_are_one_image(out: Path) -> None:
    import_array(some(2)[[0, 1, 0]], out)
    first, second, third = Store(out).column("hash")
    assert first == third != second


@pytest.mark.usefixtures("small_blocks")
def test_columns_of_later_parts(tmp_path: Path, out: Path) -> None:
    write_part(tmp_path / "clip", "0", some(4), image_path=list("abcd"), n=[1, 2, 3, 4], id=[1, 2, 3, 4])
    write_part(tmp_path / "clip", "1", some(2), image_path=list("ef"), n=[None, 0.5], late=["x", None], id=[5, 6])
    import_vectors(tmp_path / "clip", out, image_tower=ACME)
    store = Store(out)
    assert store.column("n") == [1.0, 2.0, 3.0, 4.0, None, 0.5]
    assert store.column("late") == [None] * 4 + ["x", None]
    assert store.column("id_") == [1, 2, 3, 4, 5, 6]


# vectors of every length


@pytest.mark.parametrize(
    ("kind", "powers"), [(np.float16, (-4, 4)), (np.float32, (-44, 37)), (np.float64, (-320, 307))]
)
def test_vectors_of_any_length(out: Path, kind: Any, powers: tuple[int, int]) -> None:
    """The largest and smallest numbers there are have squares that are not numbers any more."""
    directions = np.array([[3, 4, 0, 0], [0, -1, 0, 2]])
    made = np.concatenate([directions * 10.0**power for power in (*powers, 0)]).astype(kind)
    import_array(made, out)
    loss = 1e-3 if kind is np.float16 else ONE_FP16_STEP
    expected = unit(np.concatenate([directions] * 3))
    exact = [row for row in range(6) if row not in (0, 1)]  # what the smallest numbers keep is less
    assert (Store(out).vectors() - expected)[exact].abs().max() < loss
    assert (Store(out).vectors() - expected).abs().max() < 0.2


def test_unit_float16_stays_the_same_bytes(out: Path) -> None:
    made = unit(some(500, 33)).half().numpy()
    import_array(made, out)
    assert stored_bytes(Store(out)) == made.tobytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_vectors_that_cannot_be_used(tmp_path: Path, out: Path, kind: Any) -> None:
    made = some(8, kind=kind)
    made[0], made[2], made[4, 1], made[5, 0] = 0, 0, np.nan, -np.inf
    report = import_array(made, out)
    assert (report.imported, len(report.skipped)) == (4, 4)
    assert Store(out).column("id") == ["000000001", "000000003", "000000006", "000000007"]
    assert report.skipped_file == str(tmp_path / "pairs.skipped.jsonl")
    listed = [json.loads(line) for line in Path(report.skipped_file).read_text().splitlines()]
    zeros, broken = "the vector is all zeros", "the vector has NaN, infinite or missing values"
    reasons = {"000000000": zeros, "000000002": zeros, "000000004": broken, "000000005": broken}
    assert {item["id"]: item["reason"] for item in listed} == reasons


@pytest.mark.usefixtures("small_blocks")
def test_rows_without_a_vector(tmp_path: Path, out: Path) -> None:
    """Whole blocks of them, at the beginning too, as null or as an empty list; and vectors of another tower."""
    cells = [None, None, [], [], [3.0, 4.0], None, [0.0, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0]]
    table = pa.table({"vector": cells, "n": range(9), "image_path": list("abcdefghi")})
    parquet.write_table(table, tmp_path / "a.parquet")
    report = import_vectors(tmp_path / "a.parquet", out, image_tower=ACME)
    assert (report.width, report.imported) == (2, 2)
    assert [row["n"] for row in Store(out).rows()] == [4, 6]
    assert torch.allclose(Store(out).vectors(), torch.tensor([[0.6, 0.8], [0.0, 1.0]]), atol=ONE_FP16_STEP)
    assert {item.path: item.reason for item in report.skipped} == {
        **dict.fromkeys("abcdf", "no vector"),
        "h": "the vector is 3 wide; the first is 2 wide",
        "i": "the vector is all zeros",
    }


def test_nothing_usable_is_an_error(tmp_path: Path, out: Path) -> None:
    with pytest.raises(StoreError, match=r"no vector of .* can be used of 5; reasons in .*pairs\.skipped\.jsonl"):
        import_array(np.zeros((5, 3), np.float32), out)
    with pytest.raises(StoreError, match="nothing to import"):
        import_array(np.zeros((0, 3), np.float32), out)
    assert not Store.exists(out)


# whole or not at all


@pytest.mark.usefixtures("small_blocks")
def test_error_on_the_way_leaves_no_store(tmp_path: Path, out: Path) -> None:
    np.save(tmp_path / "a.npy", some(10))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one"}\n' * 9)
    with pytest.raises(PairsError, match=r"10 vectors, but .* 9 rows"):
        import_vectors(tmp_path / "a.npy", out, image_tower=ACME, pairs=texts)
    assert not Store.exists(out)
    texts.write_text('{"text": "one"}\n' * 10)
    assert import_vectors(tmp_path / "a.npy", out, image_tower=ACME, pairs=texts).imported == 10
    assert len(Store(out)) == 10


@pytest.mark.usefixtures("small_blocks")
def test_rows_more(tmp_path: Path, out: Path) -> None:
    """A source that has grown, with a row that cannot be used and a column that is new."""
    made = some(12, kind=np.float16)
    made[4] = 0
    write_part(tmp_path / "clip", "0", made[:7], image_path=list("abcdefg"), n=[*range(7)], caption=["old"] * 7)
    import_vectors(tmp_path / "clip", out, image_tower=ACME)
    write_part(tmp_path / "clip", "0", made[:7], image_path=list("abcdefg"), n=[*range(7)], caption=["new"] * 7)
    write_part(tmp_path / "clip", "1", made[7:], image_path=list("hijkl"), n=[*range(7, 12)], late=[*"vwxyz"])
    report = import_vectors(tmp_path / "clip", out, image_tower=ACME)
    assert (report.imported, report.known, len(report.skipped)) == (5, 6, 1)
    store = Store(out)
    assert store.column("path") == list("abcdfghijkl")
    assert store.column("id")[-2:] == ["000000011", "000000012"], "a vector that cannot be used has a number, too"
    assert store.column("n") == [0, 1, 2, 3, 5, 6, *range(7, 12)]
    assert store.column("late") == [None] * 6 + [*"vwxyz"]
    assert store.texts() == [["old"]] * 6 + [[]] * 5
    before = store.version_digest
    again = import_vectors(tmp_path / "clip", out, image_tower=ACME)
    assert (again.imported, again.known) == (0, 11)
    assert Store(out).version_digest == before


def test_rows_of_another_source_more(tmp_path: Path, out: Path) -> None:
    """Rows of the new source that are equal to each other all come in, as in a first import."""
    first, second = some(3), some(4, seed=1)[[0, 1, 1, 2]]
    import_array(first, out)
    np.save(tmp_path / "other.npy", np.concatenate([second, first[2:]]))
    report = import_vectors(tmp_path / "other.npy", out, image_tower=ACME)
    assert (report.imported, report.known) == (4, 1)
    assert Store(out).column("id") == [f"{number:09}" for number in range(7)]
    assert (Store(out).vectors() - unit(np.concatenate([first, second]))).abs().max() < ONE_FP16_STEP


def test_rows_more_that_do_not_fit(tmp_path: Path, out: Path) -> None:
    cells = pa.array(some(4).tolist())
    parquet.write_table(pa.table({"vector": cells[:2], "n": [1, 2]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"vector": cells[2:], "n": [3.0, 3.5]}), tmp_path / "b.parquet")
    import_vectors(tmp_path / "a.parquet", out, image_tower=ACME)
    report = import_vectors(tmp_path / "b.parquet", out, image_tower=ACME)
    assert report.not_kept == {"n": 1}
    assert Store(out).column("n") == [1, 2, 3, None]
    with pytest.raises(StoreError, match=r"was imported, made by acme:.*, not by acme:v4"):
        import_vectors(tmp_path / "b.parquet", out, image_tower="acme:v4")
    parquet.write_table(pa.table({"vector": pa.array([[1.0, 2, 3, 4], [1.0]])}), tmp_path / "c.parquet")
    [skipped] = import_vectors(tmp_path / "c.parquet", out, image_tower=ACME).skipped
    assert skipped.reason == "the vector is 1 wide; the first is 4 wide"
    assert len(Store(out)) == 5


def test_tower_without_a_name(out: Path) -> None:
    np.save(out.with_suffix(".npy"), some(3))
    with pytest.raises(UsageError, match="needs a name"):
        import_vectors(out.with_suffix(".npy"), out, image_tower=" ")


@pytest.mark.slow
def test_killed_import_leaves_no_store(tmp_path: Path, out: Path) -> None:
    """Killed by the system in the middle of Lance's first file.

    What it left may be another writer's, so it stays; Lance deletes it when it is a week old.
    """
    np.save(tmp_path / "a.npy", some(60_000, 64, kind=np.float16))
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
    )
    code = f"import sys, lamplit; {limit}lamplit.import_vectors(sys.argv[1], sys.argv[2], image_tower='a:b')"
    process = subprocess.run([sys.executable, "-c", code, tmp_path / "a.npy", out], check=False)
    assert process.returncode == -signal.SIGXFSZ
    assert list(out.glob("data/*"))
    assert not Store.exists(out)
    report = import_vectors(tmp_path / "a.npy", out, image_tower="a:b")
    assert report.imported == len(Store(out)) == 60_000


# tuning and asking without an image tower


@pytest.fixture(scope="module")
def imported(words_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of made-up vectors, out and in again."""
    folder = tmp_path_factory.mktemp("imported")
    export_vectors(words_path, folder / "clip", part_rows=100)
    import_vectors(folder / "clip", folder / "words.lance", image_tower=ACME)
    return folder / "words.lance"


@pytest.fixture(scope="module")
def run(imported: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    lamplit.tune(imported, out, lamplit.TuneSettings(f"hf:{text_folder}", epochs=4, batch_size=64, lr=1e-3))
    return out


def test_tuned_as_from_the_store_it_came_of(words_path: Path, text_folder: Path, run: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    report = lamplit.tune(
        words_path, again, lamplit.TuneSettings(f"hf:{text_folder}", epochs=4, batch_size=64, lr=1e-3)
    )
    found = json.loads((run / "report.json").read_text())
    assert found["best"] == report.best
    assert (run / "text_tower.safetensors").read_bytes() == (again / "text_tower.safetensors").read_bytes()
    assert report.best["text_to_image/recall@5"] > 0.3


def test_report_and_info_say_which_tower(run: Path, imported: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["image_tower"] == ACME
    found = describe(run)
    assert (found["image tower"], found["fingerprint"]) == (ACME, Store(imported).tower.fingerprint)
    assert found["files"] == "split.safetensors, text_tower.safetensors"
    assert found["vectors"].startswith("imported")


def test_notes_of_the_table_are_the_imports(out: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", some(2, 8))
    (tmp_path / "t.csv").write_bytes("caption;n\nKäse;1\nBrot\n".encode("latin-1"))
    report = import_vectors(tmp_path / "a.npy", out, image_tower=ACME, pairs=tmp_path / "t.csv")
    assert [note.partition(";")[0] for note in report.notes] == [
        "t.csv is not UTF-8 and is read as Windows-1252 (Latin-1)",
        "t.csv is separated by semicolons",
        "1 row of t.csv has fewer cells than the header",
    ]


def test_tune_tries_to_open_nothing(
    out: Path, text_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even a tower that could be opened: nothing says that it made these vectors."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"caption": f"a ring {i}"}) + "\n" for i in range(12)))
    np.save(tmp_path / "a.npy", some(12, 64))
    import_vectors(tmp_path / "a.npy", out, image_tower="timm:test_vit", pairs=tmp_path / "t.jsonl")
    with caplog.at_level("INFO", "lamplit"):
        lamplit.tune(out, tmp_path / "run", lamplit.TuneSettings(f"hf:{text_folder}", epochs=1, batch_size=4))
    said = [record for record in caplog.records if "imported" in record.getMessage()]
    assert [(record.levelname, record.args) for record in said] == [("INFO", ("timm:test_vit",))]
    assert not [record for record in caplog.records if "cannot be opened" in record.getMessage()]


def test_search_and_evaluate(run: Path, imported: Path) -> None:
    for towers in ("text", "both"):
        model = lamplit.load(run, towers=towers)
        hits = lamplit.search(model, Store(imported), "small red ring on blue", k=3)
        assert len(hits) == 3
        assert hits[0].score > 0.5
    retrieval, zero_shot = lamplit.evaluate(model, imported, label_column="shape")
    assert retrieval.metrics["text_to_image/recall@5"].value > 0.3
    assert zero_shot.metrics["accuracy@1"].value > 0.5


def test_stores_of_one_tower_fit_each_other(run: Path, tmp_path: Path, words_path: Path) -> None:
    model = lamplit.load(run)
    np.save(tmp_path / "more.npy", some(5, 32))
    import_vectors(tmp_path / "more.npy", tmp_path / "more.lance", image_tower=ACME)
    assert len(lamplit.search(model, Store(tmp_path / "more.lance"), "ring")) == 5
    import_vectors(tmp_path / "more.npy", tmp_path / "other.lance", image_tower="acme:v4")
    with pytest.raises(
        StoreError, match=r"was imported, made by acme:v4 .* lamplit import SOURCE --image-tower acme:path"
    ):
        lamplit.search(model, Store(tmp_path / "other.lance"), "ring")
    with pytest.raises(StoreError, match=r"was embedded by module:made.up .* lamplit import SOURCE"):
        lamplit.search(model, Store(words_path), "ring")


def test_embed_does_not_add_to_imported_vectors(out: Path, image_folder: Path, image_tower: ImageTower) -> None:
    import_array(some(3, image_tower.width), out)
    with pytest.raises(StoreError, match=r"was imported, made by acme:.*, not by timm:test_vit"):
        lamplit.embed(image_folder / "pairs.csv", out, image_tower=image_tower)


def test_without_an_image_tower(run: Path, image_folder: Path, tmp_path: Path) -> None:
    image_file = next(image_folder.glob("*.png"))
    model = lamplit.load(run)
    for ask in (
        lambda: model.encode_images([image_file]),
        lambda: lamplit.classify(model, [image_file], ["ring", "cross"]),
        lambda: lamplit.load(run, towers="image"),
        lambda: lamplit.load(run, image_tower=torch.nn.Flatten()),
    ):
        with pytest.raises(TowerError, match=r"imported vectors, made by acme:.*lamplit\.load\(FOLDER, image_tower="):
            ask()
    with pytest.raises(TowerError, match="without its image tower to embed it"):
        lamplit.evaluate(model, image_folder / "pairs.csv")


class Colors(torch.nn.Module):
    """Two numbers for each cell of a grid: 32 of 4 × 4 cells."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pixels, 4)[:, :2].flatten(1)


def test_given_an_image_tower(
    run: Path, image_folder: Path, image_tower: ImageTower, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = (0.5, 0.5, 0.5)
    tower = open_image_tower(Colors(), preprocessing=Preprocessing((8, 8), half, half))
    model = lamplit.load(run, image_tower=tower)
    assert "nothing can prove" in caplog.text
    image_file = next(image_folder.glob("*.png"))
    zimg = model.encode_images([image_file])
    assert zimg.shape == (1, 32)
    assert torch.isclose(zimg.norm(), torch.tensor(1.0))
    predictions = lamplit.classify(model, [image_file], ["ring", "cross"])
    assert len(predictions) == 1
    with pytest.raises(ImageError):
        model.encode_images([b"no image"])
    model.save(tmp_path / "saved")  # the tower is not the model's to keep
    assert describe(tmp_path / "saved")["files"] == "split.safetensors, text_tower.safetensors"
    assert lamplit.load(tmp_path / "saved").identity.imported
    with pytest.raises(TowerError, match=r"test_vit gives vectors 64 wide, but .* acme:.* are 32 wide"):
        lamplit.load(run, image_tower=image_tower)


# and out again


@pytest.mark.usefixtures("small_blocks")
def test_layout(tmp_path: Path, store: Store) -> None:
    report = export_vectors(store, tmp_path / "clip", part_rows=25)
    assert (report.folder, report.image_tower) == (str(tmp_path / "clip"), "timm:test_vit")
    assert (report.width, report.images, report.parts) == (64, 60, 3)
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    names = (
        [f"clip/img_emb/img_emb_{n}.npy" for n in range(3)],
        [f"clip/metadata/metadata_{n}.parquet" for n in range(3)],
    )
    assert found == [*names[0], *names[1]]
    arrays = [np.load(tmp_path / name, allow_pickle=False) for name in names[0]]
    assert [(array.shape, array.dtype) for array in arrays] == [((n, 64), np.float16) for n in (25, 25, 10)]
    assert np.concatenate(arrays).tobytes() == stored_bytes(store)
    tables = [parquet.read_table(tmp_path / name) for name in names[1]]
    table = pa.concat_tables(tables).to_pydict()
    assert list(table) == ["image_path", "caption", "texts", "german", "shape"]
    assert table["image_path"] == store.column("path")
    assert table["texts"] == store.texts()
    assert table["caption"] == [texts[0] for texts in store.texts()]
    assert table["shape"] == store.column("shape")
    said = json.loads(tables[0].schema.metadata[b"lamplit"])
    assert said == {"tower": "timm:test_vit", "fingerprint": store.tower.fingerprint}


def test_numbers_of_parts_sort_as_text(tmp_path: Path, store: Store) -> None:
    """embedding-reader and clip-retrieval's own server take the files in the order of their names."""
    export_vectors(store, tmp_path / "clip", part_rows=5)
    files = sorted((tmp_path / "clip" / "img_emb").iterdir())
    assert files[2].name == "img_emb_02.npy"
    assert np.concatenate([np.load(file) for file in files]).tobytes() == stored_bytes(store)


def test_columns_whose_names_the_layout_has(tmp_path: Path) -> None:
    metadata = [{"caption": "mine", "image_path": "mine", "n": 1}]
    store = write_store(tmp_path / "a.lance", torch.ones(1, 3), [["a", "b"]], metadata)
    export_vectors(store, tmp_path / "clip")
    [row] = parquet.read_table(tmp_path / "clip" / "metadata" / "metadata_0.parquet").to_pylist()
    assert row == {
        "image_path": "0.png", "caption": "a", "texts": ["a", "b"], "caption_": "mine", "image_path_": "mine", "n": 1,
    }  # fmt: skip


def test_folder_with_something_in_it(tmp_path: Path, store: Store) -> None:
    (tmp_path / "clip").mkdir()
    export_vectors(store, tmp_path / "clip")
    with pytest.raises(UsageError, match="is not an empty folder"):
        export_vectors(store, tmp_path / "clip")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not an empty folder"):
        export_vectors(store, tmp_path / "file")


def test_interrupted_export_leaves_no_folder(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".clip.{_machine()}.999999999.00.partial" / "img_emb"  # as a killed one leaves it
    left.mkdir(parents=True)
    (left / "img_emb_7.npy").touch()
    with monkeypatch.context() as patch:
        patch.setattr(store, "take", _pull_the_plug)
        with pytest.raises(StoreError, match="pulled out"):
            export_vectors(store, tmp_path / "clip")
    assert not (tmp_path / "clip").exists()
    assert export_vectors(store, tmp_path / "clip").parts == 1
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    assert len(list((tmp_path / "clip" / "img_emb").iterdir())) == 1


def _pull_the_plug(*_: Any) -> Any:
    raise StoreError("pulled out")


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), max_size=8)
CELLS = {
    "words": st.none() | TEXT,
    "whole": st.none() | st.integers(-(2**63), 2**63 - 1),
    "number": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "truth": st.none() | st.booleans(),
    "many": st.none() | st.lists(TEXT, max_size=3),
    "inner": st.none() | st.fixed_dictionaries({"a": st.integers(0, 9), "b": TEXT}),
}
ROW = st.fixed_dictionaries({
    "texts": st.lists(TEXT.filter(bool), max_size=3),
    "metadata": st.fixed_dictionaries(CELLS),
    "vector": st.lists(st.floats(-1, 1, width=16), min_size=3, max_size=3).filter(lambda v: math.hypot(*v) > 1e-3),
})  # fmt: skip


@settings(max_examples=25)
@given(st.lists(ROW, min_size=1, max_size=8), st.integers(1, 9))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], part_rows: int) -> None:
    folder = tmp_path_factory.mktemp("round")
    vectors = torch.tensor([row["vector"] for row in rows])
    before = write_store(folder / "a.lance", vectors, [row["texts"] for row in rows], [row["metadata"] for row in rows])
    export_vectors(before, folder / "clip", part_rows=part_rows)
    import_vectors(folder / "clip", folder / "b.lance", image_tower=ACME)
    after = Store(folder / "b.lance")
    assert stored_bytes(after) == stored_bytes(before)
    for name in ("path", "texts", *before.metadata_columns):
        assert after.column(name) == before.column(name), name
    assert after.metadata_columns == before.metadata_columns


@settings(max_examples=10)
@given(
    st.lists(
        st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
        | st.lists(st.integers(0, 3) | st.text("ab", max_size=2), max_size=2),
        min_size=1, max_size=9,
    )
)  # fmt: skip
def test_values_of_any_kind_in_any_block(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    """The types are those of all rows, not of the first block."""
    folder = tmp_path_factory.mktemp("mixed")
    np.save(folder / "vectors.npy", np.eye(9, dtype=np.float32)[: len(values)])
    lines = [{"image": f"{row}.png", "text": "x", "value": value} for row, value in enumerate(values)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors_of, "BLOCK_ROWS", 2)
        report = import_vectors(
            folder / "vectors.npy", folder / "a.lance", image_tower="any", pairs=folder / "pairs.jsonl"
        )
    assert report.not_kept == {}
    stored = Store(folder / "a.lance").column("value")
    for value, back in zip(values, stored, strict=True):
        if isinstance(back, str) and not isinstance(value, list):
            assert back == as_text(value)
        elif isinstance(back, str):
            assert json.loads(back) == value
        elif isinstance(value, list):
            assert back in (value, list(map(str, value)))
        else:
            assert back == value
