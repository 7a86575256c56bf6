"""Models of open_clip as models here: equal to open_clip's own vectors, saved, and used by every function."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip_families import OpenClipFamily, open_clip_families, owners_images, owners_texts
from text_families import TEXTS
from torch.nn import functional as F

import lamplit
from lamplit.errors import TowerError, UsageError
from lamplit.exports.sample import _pattern
from lamplit.model import LiT, load
from lamplit.store.embed.embedding import embed
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.images.pooling import pool_features
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

FAMILIES = {family.name: family for family in open_clip_families()}
ALLOWED = 1e-5  # largest difference of any number of a unit vector from open_clip
SENTENCES = [*TEXTS, "red green " * 40, "a “quoted”  &amp; spaced\ttext"]
IMAGES = [_pattern(number) for number in range(3)]
Owner = tuple[Any, Any, Any]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Owner, Path]:
    """Save a model of each kind, and open it with open_clip."""
    folder = tmp_path_factory.mktemp("open-clip")
    return FAMILIES[request.param].save(folder), folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Owner, Path]:
    """Save a tiny model with open_clip's own towers, as a pickle."""
    folder = tmp_path_factory.mktemp("vit")
    return FAMILIES["ViT, OpenAI's GELU"].save(folder), folder


@pytest.fixture(scope="module")
def vit_texts(vit: tuple[Owner, Path]) -> LiT:
    """Load its text tower."""
    return load(f"open_clip:{vit[1]}", device="cpu", towers="text")


@torch.no_grad()
def test_features_preprocessing_and_scalars_are_the_owners(saved: tuple[Owner, Path]) -> None:
    owner, folder = saved
    model = load(f"open_clip:{folder}", device="cpu")
    tower = model.unlocked_image_tower
    pixels = torch.stack([tower.preprocessing.reference(image) for image in IMAGES])
    zimg = owners_images(owner, IMAGES)
    assert (model.encode_texts(SENTENCES) - owners_texts(owner, SENTENCES)).abs().max() <= ALLOWED
    assert (F.normalize(pool_features(tower.backbone, pixels), dim=-1) - zimg).abs().max() <= ALLOWED
    assert (model.encode_images(IMAGES) - zimg).abs().max() <= 1e-3  # resized by torchvision instead of PIL
    assert (pixels - torch.stack([owner[1](image) for image in IMAGES])).abs().max() <= ALLOWED
    assert float(model.logit_multiplier) == pytest.approx(float(owner[0].logit_scale.exp()), rel=1e-6)
    bias = owner[0].logit_bias
    assert (model.logit_bias is None) == (bias is None)
    assert bias is None or float(model.logit_bias) == float(bias)


def test_saved_model_is_the_same(saved: tuple[Owner, Path], tmp_path: Path) -> None:
    _, folder = saved
    model = load(f"open_clip:{folder}", device="cpu")
    model.save(tmp_path)
    again = load(tmp_path, device="cpu")
    assert torch.equal(again.encode_texts(SENTENCES), model.encode_texts(SENTENCES))
    assert torch.equal(again.encode_images(IMAGES), model.encode_images(IMAGES))
    assert again.space == model.space == open_image_tower(f"open_clip:{folder}").identity().fingerprint


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_is_read_as_open_clip_reads_it(vit: tuple[Owner, Path], vit_texts: LiT, texts: list[str]) -> None:
    owner, model = vit[0], vit_texts
    assert (model.encode_texts(texts) - owners_texts(owner, texts)).abs().max() <= ALLOWED


def test_name_and_file_of_weights(tmp_path: Path) -> None:
    """A name of open_clip's list, and a file for its weights; OpenAI's tags bring their GELU."""
    torch.manual_seed(0)
    owner = open_clip.create_model("ViT-S-32", pretrained=None).eval()
    torch.save({"state_dict": owner.state_dict()}, tmp_path / "epoch_3.pt")
    model = load(f"open_clip:ViT-S-32/{tmp_path / 'epoch_3.pt'}", device="cpu")
    expected = F.normalize(owner.encode_text(open_clip.get_tokenizer("ViT-S-32")(TEXTS)), dim=-1)
    assert (model.encode_texts(TEXTS) - expected).abs().max() <= ALLOWED
    assert model.name == "epoch_3.pt"


def test_store_search_and_tuning(
    vit: tuple[Owner, Path], image_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    spec = f"open_clip:{vit[1]}"
    embed(image_folder / "pairs.csv", tmp_path / "s.lance", image_tower=spec, backend="torch")
    [before] = lamplit.evaluate(spec, tmp_path / "s.lance", device="cpu")
    assert len(lamplit.search(spec, tmp_path / "s.lance", "a red circle", k=3)) == 3
    load(spec, device="cpu").save(tmp_path / "theirs")
    for number, text_tower in enumerate([f"hf:{text_folder}", f"model:{tmp_path / 'theirs'}"]):
        out = tmp_path / f"run{number}"
        tune(tmp_path / "s.lance", out, TuneSettings(text_tower=text_tower, steps=2, batch_size=8), device="cpu")
        assert load(out, device="cpu").space == load(spec, device="cpu").space
        [after] = lamplit.evaluate(out, tmp_path / "s.lance", device="cpu", split="all")
        assert after.metrics["image_to_text/recall@1"].value > before.metrics["image_to_text/recall@1"].value


def test_export_of_lamplit_comes_back(image_tower: ImageTower, text_folder: Path, tmp_path: Path) -> None:
    text = lamplit.open_text_tower(f"hf:{text_folder}", width=image_tower.width)
    model = LiT(text, image_tower.identity(), image_tower)
    lamplit.export(model, tmp_path / "out", to="open-clip")
    again = load(f"open_clip:{tmp_path / 'out'}", device="cpu")
    assert (again.encode_texts(TEXTS) - model.encode_texts(TEXTS)).abs().max() <= ALLOWED
    assert float(again.logit_multiplier) == pytest.approx(10)


# What is refused


def test_folder_without_weights(vit: tuple[Owner, Path], tmp_path: Path) -> None:
    shutil.copy(vit[1] / "open_clip_config.json", tmp_path)
    with pytest.raises(TowerError, match="could not be opened by open_clip: Required pretrained weights"):
        load(f"open_clip:{tmp_path}")


def test_pickled_code_is_never_run(vit: tuple[Owner, Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    shutil.copy(vit[1] / "open_clip_config.json", tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    with pytest.raises(TowerError, match="could not be opened by open_clip"):
        load(f"open_clip:{tmp_path}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ViT-B-32", UsageError, "names no weights; type open_clip:ViT-B-32/PRETRAINED, with one of: openai, laion"),
        ("ViT-B-32/nothing", TowerError, "could not be opened by open_clip: Pretrained value 'nothing'"),
        ("nobody/no-such-model", TowerError, "could not be opened by open_clip"),
        ("", UsageError, "is not a model; expected hf:NAME_OR_FOLDER, open_clip:"),
    ],
)
def test_no_such_model(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(f"open_clip:{name}")


@pytest.mark.parametrize(
    ("vision", "text", "preprocess", "message"),
    [
        ({}, {"pool_type": "none"}, {}, "reads the token 'none' of a text; expected one of argmax"),
        ({}, {}, {"resize_mode": "longest"}, "brings images to their size by 'longest'; expected shortest or squash"),
        ({"output_tokens": True}, {}, {}, "makes image features in a way that lamplit does not know"),
    ],
)
def test_what_lamplit_does_not_know(
    vision: dict[str, Any], text: dict[str, Any], preprocess: dict[str, Any], message: str, tmp_path: Path
) -> None:
    known = FAMILIES["ViT, OpenAI's GELU"]
    family = OpenClipFamily(
        "changed", known.vision | vision, known.text | text, preprocess=preprocess, more={"custom_text": True}
    )
    family.save(tmp_path)
    with pytest.raises(TowerError, match=message):
        load(f"open_clip:{tmp_path}")


def test_damaged_description(vit: tuple[Owner, Path], tmp_path: Path) -> None:
    load(f"open_clip:{vit[1]}", device="cpu").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_tower"]["config"]["quick_gelu"] = "yes"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TowerError, match=r"the description of open_clip:.* is damaged: config\.quick_gelu"):
        load(tmp_path)
