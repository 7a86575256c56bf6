"""Two-tower models of transformers as models here: equal to their own library, saved, and used by every function."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from text_families import TEXTS
from torch.nn import functional as F
from two_tower_families import SQUARE, VISION, Family, families, image_processor, sized, wordpiece

import lamplit
from lamplit.app.server import make_app
from lamplit.errors import StoreError, TowerError
from lamplit.exports.sample import _pattern
from lamplit.exports.text_graph import write_words
from lamplit.inspection import describe
from lamplit.model import LiT, load
from lamplit.retrieval.searcher import Searcher
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import open_image_tower
from lamplit.towers.images.pooling import pool_features
from lamplit.towers.texts.word_reader import WordReader
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

FAMILIES = {family.name: family for family in families()}
ALLOWED = 1e-5  # largest difference of any number of a unit vector from the owner's library
SENTENCES = [*TEXTS, "red green " * 30]
IMAGES = [_pattern(number) for number in range(3)]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Any, Path]:
    """Save a model of each family with its own library."""
    folder = tmp_path_factory.mktemp("two-towers")
    family = FAMILIES[request.param]
    return family, family.save(folder), folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    FAMILIES["CLIP"].save(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, LiT]:
    """Save a tiny SigLIP, and load its text tower."""
    folder = tmp_path_factory.mktemp("siglip")
    owner = FAMILIES["SigLIP"].save(folder)
    return owner, folder, load(f"hf:{folder}", device="cpu", towers="text")


@pytest.fixture(scope="module")
def clip_store(clip: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embed the 60 drawings by the image side of the tiny CLIP."""
    path = tmp_path_factory.mktemp("store") / "drawings.lance"
    embed(image_folder / "pairs.csv", path, image_tower=f"hf:{clip}", backend="torch")
    return path


@torch.no_grad()
def test_features_and_scalars_are_the_owners(saved: tuple[Family, Any, Path]) -> None:
    family, owner, folder = saved
    model = load(f"hf:{folder}", device="cpu")
    ztxt = F.normalize(family.texts(owner, folder, SENTENCES), dim=-1)
    zimg = F.normalize(family.images(owner, folder, IMAGES), dim=-1)
    tower = model.unlocked_image_tower
    pixels = torch.stack([tower.preprocessing.reference(image) for image in IMAGES])
    assert (model.encode_texts(SENTENCES) - ztxt).abs().max() <= ALLOWED
    assert (F.normalize(pool_features(tower.backbone, pixels), dim=-1) - zimg).abs().max() <= ALLOWED
    assert (model.encode_images(IMAGES) - zimg).abs().max() <= 5e-3  # resized by torchvision instead of PIL
    assert math.isclose(float(model.logit_multiplier), family.multiplier(owner), rel_tol=1e-6)
    bias = getattr(owner, "logit_bias", None)
    assert (model.logit_bias is None) == (bias is None)
    assert bias is None or float(model.logit_bias) == float(bias)


def test_preprocessing_is_the_owners(saved: tuple[Family, Any, Path]) -> None:
    _, _, folder = saved
    processor = hf.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    preprocessing = load(f"hf:{folder}", device="cpu", towers="image").image_preprocessing()
    for image in IMAGES:
        expected = torch.as_tensor(processor(images=image)["pixel_values"][0])
        assert (preprocessing.reference(image) - expected).abs().max() <= ALLOWED


def test_saved_model_is_the_same(saved: tuple[Family, Any, Path], tmp_path: Path) -> None:
    _, _, folder = saved
    model = load(f"hf:{folder}", device="cpu")
    model.save(tmp_path)
    again = load(tmp_path, device="cpu")
    assert torch.equal(again.encode_texts(SENTENCES), model.encode_texts(SENTENCES))
    assert torch.equal(again.encode_images(IMAGES), model.encode_images(IMAGES))
    assert again.space == model.space == open_image_tower(f"hf:{folder}").identity().fingerprint
    assert float(again.logit_multiplier) == float(model.logit_multiplier)


@pytest.mark.parametrize(
    "name", ["SigLIP", *(pytest.param(name, marks=pytest.mark.slow) for name in ("CLIP", "Dual encoder, ViT and BERT"))]
)
def test_words_are_read_without_torch(name: str, tmp_path: Path) -> None:
    FAMILIES[name].save(tmp_path / "owner")
    model = load(f"hf:{tmp_path / 'owner'}", device="cpu")
    model.save(tmp_path / "saved")
    write_words(tmp_path / "saved")
    found = WordReader(tmp_path / "saved").encode_texts(SENTENCES)
    assert (torch.as_tensor(found) - model.encode_texts(SENTENCES)).abs().max() <= 1e-4


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
@torch.no_grad()
def test_any_text_is_read_as_siglip_reads_it(siglip: tuple[Any, Path, LiT], texts: list[str]) -> None:
    owner, folder, model = siglip
    expected = F.normalize(FAMILIES["SigLIP"].texts(owner, folder, texts), dim=-1)
    assert (model.encode_texts(texts) - expected).abs().max() <= ALLOWED


def test_one_side_alone(clip: Path) -> None:
    whole = load(f"hf:{clip}", device="cpu")
    texts, images = (load(f"hf:{clip}", device="cpu", towers=towers) for towers in ("text", "image"))
    assert torch.equal(texts.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    assert torch.equal(images.encode_images(IMAGES), whole.encode_images(IMAGES))
    with pytest.raises(TowerError, match="open without its image tower"):
        texts.encode_images(IMAGES)
    with pytest.raises(TowerError, match="open without its text tower"):
        images.encode_texts(TEXTS)


def test_every_function_takes_it(clip: Path, clip_store: Path, image_folder: Path) -> None:
    spec = f"hf:{clip}"
    store = Store(clip_store)
    assert load(spec, device="cpu", towers="image").read_store(store).shape == (60, 16)
    hits = Searcher(spec, clip_store, device="cpu").search("a red circle", k=3)
    assert len(hits) == 3
    [result] = lamplit.evaluate(spec, clip_store, device="cpu")
    assert result.metrics["image_to_text/recall@1"].value >= 0
    [alike] = lamplit.evaluate(spec, image_folder / "pairs.csv", device="cpu")
    assert alike.metrics["image_to_text/recall@1"].value == result.metrics["image_to_text/recall@1"].value
    found = lamplit.classify(spec, [image_folder / "small_red_circle.jpg"], ["circle", "square"], device="cpu")
    assert found.probabilities.shape == (1, 2)
    described = describe(spec)
    assert described["model"] == spec
    assert described["fingerprint"] == store.tower.fingerprint
    app = make_app(load(spec, device="cpu"), store, name=spec)
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        about = client.get("/about").json()
    assert about["model"] == clip.name
    assert str(clip.parent) not in json.dumps(about["model"])


def test_store_of_another_tower_is_refused(clip: Path, store_path: Path) -> None:
    with pytest.raises(StoreError, match="fingerprint"):
        lamplit.evaluate(f"hf:{clip}", store_path, device="cpu")


def test_own_text_tower_tuned_against_its_locked_image_tower(
    clip: Path, clip_store: Path, text_folder: Path, tmp_path: Path
) -> None:
    """A new text tower, and the model's own saved one with a new head, read the vectors of the same store."""
    theirs = load(f"hf:{clip}", device="cpu")
    theirs.save(tmp_path / "theirs")
    digest = theirs.space
    for number, text_tower in enumerate([f"hf:{text_folder}", f"model:{tmp_path / 'theirs'}"]):
        out = tmp_path / f"run{number}"
        tune(clip_store, out, TuneSettings(text_tower=text_tower, steps=2, batch_size=8), device="cpu")
        tuned = load(out, device="cpu")
        assert tuned.space == digest
        assert torch.equal(tuned.encode_images(IMAGES), theirs.encode_images(IMAGES))
        assert tuned.encode_texts(TEXTS).shape == (len(TEXTS), 16)
        [before] = lamplit.evaluate(theirs, clip_store)
        [after] = lamplit.evaluate(tuned, clip_store, split="all")
        assert after.metrics["image_to_text/recall@1"].value > before.metrics["image_to_text/recall@1"].value


def test_export_of_lamplit_comes_back(image_tower: Any, text_folder: Path, tmp_path: Path) -> None:
    """What lamplit writes for transformers, it reads: a VisionTextDualEncoder of timm's ViT and BERT."""
    text = lamplit.open_text_tower(f"hf:{text_folder}", width=image_tower.width)
    model = LiT(text, image_tower.identity(), image_tower)
    lamplit.export(model, tmp_path / "out", to="transformers")
    again = load(f"hf:{tmp_path / 'out'}", device="cpu")
    assert (again.encode_texts(TEXTS) - model.encode_texts(TEXTS)).abs().max() <= ALLOWED
    assert (again.encode_images(IMAGES) - model.encode_images(IMAGES)).abs().max() <= 1e-3


@pytest.mark.parametrize("path", ["", "0_CLIPModel"])
def test_clip_of_sentence_transformers(path: str, tmp_path: Path) -> None:
    """As its newer releases save it, and with the model in a folder of its own, as published models have it."""
    FAMILIES["CLIP"].save(tmp_path / "clip")
    clip = FAMILIES["CLIP"]
    tokenizer = clip.tokenizer()
    tokenizer.model_max_length = 20
    hf.CLIPProcessor(clip.image_processor(), tokenizer).save_pretrained(tmp_path / "clip")
    owner = SentenceTransformer(str(tmp_path / "clip"), device="cpu")
    owner.save(str(tmp_path / "st" / path), create_model_card=False)
    if path:
        modules = [{"idx": 0, "name": "0", "path": path, "type": "sentence_transformers.models.CLIPModel"}]
        (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    model = load(f"st:{tmp_path / 'st'}", device="cpu")
    ztxt = owner.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    assert (model.encode_texts(TEXTS) - ztxt).abs().max() <= ALLOWED
    zimg = owner.encode(IMAGES, convert_to_tensor=True, normalize_embeddings=True)
    assert (model.encode_images(IMAGES) - zimg).abs().max() <= 1e-3  # resized by another library
    assert model.space == open_image_tower(f"st:{tmp_path / 'st'}").identity().fingerprint
    assert model.space == open_image_tower(f"hf:{tmp_path / 'st' / path}").identity().fingerprint


@pytest.mark.parametrize("name", ["CLIP", "Dual encoder, ViT and BERT"])
def test_text_side_goes_to_sentence_transformers(name: str, tmp_path: Path) -> None:
    """Matrices and heads of two layers alike; the export itself compares."""
    FAMILIES[name].save(tmp_path / "owner")
    report = lamplit.export(f"hf:{tmp_path / 'owner'}", tmp_path / "out", to="sentence-transformers")
    assert report.differences["text vectors"] <= ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SigLIP", "Dual encoder, ViT and BERT"])
def test_both_sides_go_to_onnx(name: str, tmp_path: Path) -> None:
    FAMILIES[name].save(tmp_path / "owner")
    report = lamplit.export(f"hf:{tmp_path / 'owner'}", tmp_path / "out", to="onnx")
    assert set(report.differences) >= {"image vectors", "text vectors, padded"}


# What is refused


def test_sentence_transformers_folders_that_are_no_clip(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(TowerError, match=r"has no modules\.json; try hf:"):
        load(f"st:{clip}")
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(TowerError, match="has Pooling behind its model"):
        load(f"st:{tmp_path}")
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Router", "path": ""}]))
    with pytest.raises(TowerError, match="begins with Router; lamplit opens folders that begin with one model"):
        load(f"st:{tmp_path}")


def test_one_tower_alone_is_no_model(text_folder: Path) -> None:
    with pytest.raises(TowerError, match=r"\(bert\) is a tower, not a model of two.*tune STORE --text-tower hf:"):
        load(f"hf:{text_folder}")


def test_no_folder_there(tmp_path: Path) -> None:
    with pytest.raises(TowerError, match="could not be opened"):
        load(f"hf:{tmp_path / 'nothing'}")


@pytest.mark.parametrize("key", ["text_projection.weight", "visual_projection.weight", "logit_scale"])
def test_missing_weights_are_never_random(key: str, clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip, tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    del state[key]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TowerError, match=f"lacks weights for: {key}"):
        load(f"hf:{folder}")


def test_image_tower_given_beside_it(clip: Path, image_tower: Any) -> None:
    with pytest.raises(lamplit.UsageError, match="brings its own image tower"):
        load(f"hf:{clip}", image_tower=image_tower)


def test_text_features_that_nothing_explains(tmp_path: Path) -> None:
    """A text model whose pooled output is made in another way is refused, not guessed."""
    owner = hf.VisionTextDualEncoderModel(
        hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**VISION), hf.AlbertConfig(**sized(wordpiece, embedding_size=8)), projection_dim=16
        )
    )
    owner.save_pretrained(tmp_path)
    hf.ViTImageProcessorPil(**SQUARE).save_pretrained(tmp_path)
    wordpiece().save_pretrained(tmp_path)
    with pytest.raises(TowerError, match="reads texts in a way that lamplit does not know"):
        load(f"hf:{tmp_path}")


def test_segmentation_and_detection_are_refused(tmp_path: Path) -> None:
    for kind in ("CLIPSeg", "GroupViT", "OwlViT"):
        getattr(hf, f"{kind}Config")().save_pretrained(tmp_path)
        image_processor("CLIP")().save_pretrained(tmp_path)
        with pytest.raises(TowerError, match="finds things inside an image; lamplit opens models that compare whole"):
            load(f"hf:{tmp_path}", device="cpu")


def test_two_widths_are_no_model(tmp_path: Path) -> None:
    FAMILIES["ALIGN"].save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["projection_dim"] = 24  # ALIGN projects its texts alone
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    for key in ("text_projection.weight", "text_projection.bias"):
        state[key] = state[key][:24].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerError, match="32 numbers for images and 24 for texts"):
        load(f"hf:{tmp_path}", device="cpu")
