"""A store of texts, read by a model's own text tower, teaches another one their translations."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import write_store
from torch import nn
from torch.nn import functional as F
from two_tower_families import families

import lamplit
from lamplit.errors import PairsError, StoreError, TowerError, UsageError
from lamplit.inspection import describe
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower
from lamplit.tuning.text_teacher import before_centring, embed_texts

ROUNDING = 1e-3  # of unit vectors to float16


@pytest.fixture
def translations(image_folder: Path, tmp_path: Path) -> Path:
    """The captions of the 60 drawings with their translations, and no images."""
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        rows = [{"english": row["caption"], "german": row["german"]} for row in csv.DictReader(file)]
    table = tmp_path / "translations.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_teacher(model_path: Path) -> LiT:
    return lamplit.load(model_path, towers="text", device="cpu")


def test_texts_have_the_vectors_of_their_tower(model_path: Path, translations: Path, tmp_path: Path) -> None:
    report = embed_texts(model_path, translations, tmp_path / "taught.lance", text_column="english", device="cpu")
    store, teacher = Store(tmp_path / "taught.lance"), open_teacher(model_path)
    assert (report.embedded, report.known, report.skipped, report.text_columns) == (60, 0, [], ("english",))
    english = [texts[0] for texts in store.texts()]
    assert torch.allclose(store.vectors(), teacher.encode_texts(english), atol=ROUNDING)
    assert store.texts("german")[0] == ["rot, klein: Kreis"]
    assert store.tower == teacher.identity
    assert describe(store)["vectors"] == "of texts, by the text tower of a model"
    again = embed_texts(teacher, translations, tmp_path / "taught.lance", text_column="english")
    assert (again.embedded, again.known) == (0, 60)


def test_another_tower_learns_the_translations_and_finds_the_images(
    model_path: Path, translations: Path, text_folder: Path, store_path: Path, tmp_path: Path
) -> None:
    embed_texts(model_path, translations, tmp_path / "taught.lance", text_column="english", device="cpu")
    settings = lamplit.TuneSettings(f"hf:{text_folder}", text_column="german", epochs=1, num_evals=1, val_fraction=0.0)
    lamplit.tune(tmp_path / "taught.lance", tmp_path / "german", settings, device="cpu")
    german, images = lamplit.load(tmp_path / "german", device="cpu"), Store(store_path)
    assert german.space == images.tower.fingerprint
    teacher = open_teacher(model_path)

    def found(model: LiT, column: str) -> float:
        """How many of the 60 captions find their drawing among the first five."""
        texts = [row[0] for row in images.texts(column)]
        near = (model.encode_texts(texts) @ images.vectors().T).topk(5).indices
        return float((near == torch.arange(60)[:, None]).any(1).float().mean())

    english = found(teacher, "texts")
    assert english > 0.25  # by chance 0.083
    assert found(german, "german") > 0.6 * english
    assert found(teacher, "german") < 0.2  # a control


def test_several_texts_have_their_mean_and_rows_without_are_skipped(model_path: Path, tmp_path: Path) -> None:
    rows = write(
        tmp_path / "rows.jsonl",
        {"english": ["a small red ring", "a large blue cross"], "german": "zwei"},
        {"english": None, "german": "nichts"},
        {"english": "a ring", "german": None},
    )
    report = embed_texts(model_path, rows, tmp_path / "some.lance", text_column="english", device="cpu")
    assert report.embedded == 2
    assert [each.reason for each in report.skipped] == ["there is no text in english"]
    ztxt = open_teacher(model_path).encode_texts(["a small red ring", "a large blue cross", "a ring"])
    expected = torch.stack([F.normalize(ztxt[0] + ztxt[1], dim=0), ztxt[2]])
    assert torch.allclose(Store(tmp_path / "some.lance").vectors(), expected, atol=ROUNDING)


def test_centre_of_the_teacher_is_that_of_the_store(
    model_path: Path, translations: Path, text_folder: Path, tmp_path: Path
) -> None:
    plain = open_teacher(model_path)
    center = F.normalize(torch.randn(plain.width, generator=torch.Generator().manual_seed(0)), dim=0) * 0.9
    centred = LiT(plain.text_tower, plain.identity, center=center)
    embed_texts(centred, translations, tmp_path / "taught.lance", text_column="english")
    store = Store(tmp_path / "taught.lance")
    assert store.center is not None
    english = [texts[0] for texts in store.texts()]
    assert torch.allclose(store.vectors(store.center), centred.encode_texts(english), atol=10 * ROUNDING)
    settings = lamplit.TuneSettings(f"hf:{text_folder}", text_column="german", steps=1, num_evals=1)
    lamplit.tune(store, tmp_path / "german", settings, device="cpu")
    assert lamplit.load(tmp_path / "german", towers="text", device="cpu").space == centred.space


def test_centring_is_undone() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(50, 8, generator=generator, dtype=torch.float64), dim=-1)
    center = torch.full((8,), 0.3, dtype=torch.float64)
    before = before_centring(vectors, center)
    assert torch.allclose(before.norm(dim=-1), torch.ones(50, dtype=torch.float64))
    assert torch.allclose(F.normalize(before - center, dim=-1), vectors)


def test_model_of_another_library_teaches(translations: Path, tmp_path: Path) -> None:
    [family] = [family for family in families() if family.name == "CLIP"]
    with torch.random.fork_rng():
        family.save(tmp_path / "clip")
    name = f"hf:{tmp_path / 'clip'}"
    report = embed_texts(name, translations, tmp_path / "taught.lance", text_column="english", device="cpu")
    store = Store(tmp_path / "taught.lance")
    expected = lamplit.load(name, device="cpu", towers="text").encode_texts([texts[0] for texts in store.texts()])
    assert torch.allclose(store.vectors(), expected, atol=ROUNDING)
    assert (report.model, report.image_tower, store.tower.spec) == (name, name, name)


def test_what_cannot_teach(model_path: Path, translations: Path, image_tower: ImageTower, tmp_path: Path) -> None:
    teacher = open_teacher(model_path)
    headed = LiT(teacher.text_tower, teacher.identity, image_head=nn.Linear(teacher.width, teacher.width))
    with pytest.raises(TowerError, match="has an image head"):
        embed_texts(headed, translations, tmp_path / "no.lance", text_column="english")
    with pytest.raises(TowerError, match="has no text tower"):
        embed_texts(LiT(None, teacher.identity), translations, tmp_path / "no.lance", text_column="english")
    with pytest.raises(UsageError, match="has no column 'englsh'; it has english"):
        embed_texts(teacher, translations, tmp_path / "no.lance", text_column="englsh")
    with pytest.raises(UsageError, match="--text-column NAME"):
        embed_texts(teacher, translations, tmp_path / "no.lance")
    with pytest.raises(PairsError, match="does not exist"):
        embed_texts(teacher, tmp_path / "nothing.csv", tmp_path / "no.lance")
    blank = write(tmp_path / "blank.jsonl", {"text": " "}, {"text": None})
    with pytest.raises(StoreError, match=r"no row of .* has a text in text"):
        embed_texts(teacher, blank, tmp_path / "no.lance")
    assert not Store.exists(tmp_path / "no.lance")


def test_texts_and_images_do_not_mix(
    model_path: Path, translations: Path, image_folder: Path, image_tower: ImageTower, tmp_path: Path
) -> None:
    teacher = open_teacher(model_path)
    embed_texts(teacher, translations, tmp_path / "taught.lance", text_column="english")
    with pytest.raises(StoreError, match="holds vectors of texts, and these are of images; give another --out"):
        lamplit.embed(image_folder / "pairs.csv", tmp_path / "taught.lance", image_tower=image_tower, backend="torch")
    made_up = write_store(tmp_path / "images.lance", torch.ones(2, 8), [["a"], ["b"]])
    small = LiT(teacher.text_tower, made_up.tower)
    with pytest.raises(StoreError, match="holds vectors of images, and these are of texts"):
        embed_texts(small, translations, tmp_path / "images.lance", text_column="english")
