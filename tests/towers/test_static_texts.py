"""Static embeddings as text towers: the vectors of model2vec and sentence-transformers, saved, tuned and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import wordpiece_tokenizer
from model2vec import StaticModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from text_families import TEXTS
from torch import Tensor
from torch.nn import functional as F

from lamplit.errors import TowerError, UsageError
from lamplit.exports.text_graph import write_words
from lamplit.model import load
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.towers.texts.word_reader import WordReader
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

SENTENCES = [*TEXTS, "zebra 動物 red", "red green " * 40]
WIDTH = 12


def backend() -> Any:
    return wordpiece_tokenizer(10**30).backend_tokenizer


def table(rows: int | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows = backend().get_vocab_size() if rows is None else rows
    return np.random.default_rng(0).standard_normal((rows, WIDTH), dtype=np.float32)


def features(tower: TextTower, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return tower.features(tower.tokenize(texts))


def save_model2vec(folder: Path, **options: Any) -> StaticModel:
    vectors = options.pop("vectors", table())
    model = StaticModel(vectors, backend(), config={"model_type": "model2vec"}, max_length=None, **options)
    model.save_pretrained(folder)
    return StaticModel.from_pretrained(folder)


def save_sentences(folder: Path) -> SentenceTransformer:
    modules = [StaticEmbedding(backend(), embedding_weights=table()), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def static_folder(tmp_path: Path) -> Path:
    save_sentences(tmp_path / "static")
    return tmp_path / "static"


def test_vectors_are_those_of_sentence_transformers(static_folder: Path) -> None:
    owner = SentenceTransformer(str(static_folder), device="cpu")
    texts = [text for text in SENTENCES if text]
    found = F.normalize(features(open_text_tower(f"hf:{static_folder}", width=8), texts), dim=-1)
    assert (found - owner.encode(texts, convert_to_tensor=True)).abs().max() <= 1e-6


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_model2vec(normalize: bool, tmp_path: Path) -> None:
    owner = save_model2vec(tmp_path, normalize=normalize)
    found = features(open_text_tower(f"hf:{tmp_path}", width=8), SENTENCES)
    expected = torch.as_tensor(owner.encode(SENTENCES))
    read = [number for number, text in enumerate(SENTENCES) if text]  # an empty text has no vector there
    assert (F.normalize(found, dim=-1) - F.normalize(expected, dim=-1))[read].abs().max() <= 1e-6


@pytest.mark.parametrize("kind", [np.float16, np.int8])
def test_shared_vectors_and_weights_of_model2vec(kind: Any, tmp_path: Path) -> None:
    size = backend().get_vocab_size()
    generator = np.random.default_rng(1)
    mapping, weights = generator.integers(0, 10, size), generator.random(size, dtype=np.float32) + 0.1
    vectors = (table(10) * (20 if kind is np.int8 else 1)).astype(kind)
    owner = save_model2vec(tmp_path, vectors=vectors, weights=weights, token_mapping=mapping, normalize=True)
    texts = [text for text in SENTENCES if text]
    found = F.normalize(features(open_text_tower(f"hf:{tmp_path}", width=8), texts), dim=-1)
    assert (found - torch.as_tensor(owner.encode(texts))).abs().max() <= 1e-3  # half precision, in which it sums


def test_unknown_tokens_are_left_out_by_model2vec_alone(static_folder: Path, tmp_path: Path) -> None:
    save_model2vec(tmp_path / "m2v", normalize=True)
    kept, left_out = (open_text_tower(f"hf:{folder}", width=8) for folder in (static_folder, tmp_path / "m2v"))
    assert len(kept.tokenize(["動物"])[0]) > 0 == len(left_out.tokenizer.encode(["動物"], None)[0])
    assert len(left_out.tokenize(["動物"])[0]) == 1, "an empty text has one token here"


def test_many_texts_are_those_one_by_one(static_folder: Path) -> None:
    tower = open_text_tower(f"hf:{static_folder}", width=8)
    together = features(tower, SENTENCES)
    assert torch.equal(together, torch.cat([features(tower, [text]) for text in SENTENCES]))
    [ids] = tower.tokenize(["red green"])
    assert torch.allclose(tower.encoder(torch.tensor([ids])).last_hidden_state.mean(1), features(tower, ["red green"]))


def test_context_length_cuts(static_folder: Path) -> None:
    tower = open_text_tower(f"hf:{static_folder}", width=8, context_length=3)
    assert [len(ids) for ids in tower.tokenize(["red", "red green " * 40])] == [1, 3]
    assert tower.count_truncated(["red green " * 40]) == 1


def test_tuned_saved_and_searched(static_folder: Path, store_path: Path, tmp_path: Path) -> None:
    settings = TuneSettings(text_tower=f"hf:{static_folder}", epochs=5, batch_size=16, lr=1e-2, closed_form=False)
    before = open_text_tower(f"hf:{static_folder}", width=8).encoder.state_dict()["embedding.weight"]
    tune(store_path, tmp_path / "run", settings, device="cpu")
    model = load(tmp_path / "run", device="cpu")
    assert model.text_tower is not None
    assert not torch.equal(model.text_tower.encoder.state_dict()["embedding.weight"], before), "it is tuned"
    write_words(tmp_path / "run")
    found = WordReader(tmp_path / "run").encode_texts(SENTENCES)
    assert (torch.as_tensor(found) - model.encode_texts(SENTENCES)).abs().max() <= 1e-5
    again = open_text_tower(f"model:{tmp_path / 'run'}", width=5)
    assert again.tokenize(SENTENCES) == model.text_tower.tokenize(SENTENCES)


def test_lora_has_nothing_to_change(static_folder: Path) -> None:
    with pytest.raises(UsageError, match="LoRA needs a pre-trained text tower"):
        open_text_tower(f"hf:{static_folder}", width=8).add_lora(2)


def test_damaged_files(static_folder: Path) -> None:
    place = static_folder / "0_StaticEmbedding"
    place = place if place.is_dir() else static_folder
    state = load_file(place / "model.safetensors")
    save_file({"embedding.weight": state["embedding.weight"][:5].clone()}, place / "model.safetensors")
    with pytest.raises(TowerError, match="has vectors of 5 tokens, but its tokenizer knows"):
        open_text_tower(f"hf:{static_folder}", width=8)
    save_file({"other": torch.zeros(2, 2)}, place / "model.safetensors")
    with pytest.raises(TowerError, match="holds no static embeddings"):
        open_text_tower(f"hf:{static_folder}", width=8)
    save_file(state | {"mapping": torch.tensor([10**6])}, place / "model.safetensors")
    with pytest.raises(TowerError, match="its mapping is damaged"):
        open_text_tower(f"hf:{static_folder}", width=8)
    (place / "tokenizer.json").write_text("{}")
    save_file(state, place / "model.safetensors")
    with pytest.raises(TowerError, match="is missing or damaged"):
        open_text_tower(f"hf:{static_folder}", width=8)
    (place / "tokenizer.json").write_text(json.dumps({"model": {}, "version": "1.0"}))
    with pytest.raises(TowerError, match="is missing or damaged"):
        open_text_tower(f"hf:{static_folder}", width=8)
