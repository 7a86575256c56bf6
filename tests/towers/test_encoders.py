"""What is no text encoder, or brings code of its own, is refused in one line; families are in test_text_families.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import wordpiece_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from text_families import DECODER, SMALL, TEXTS, byte_pairs, clip_pairs, llama_pairs, make, qwen_pairs
from torch.nn import functional as F

import lamplit
from lamplit.errors import TowerError
from lamplit.towers.texts.lora import add_lora
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer


@pytest.fixture
def folder(text_folder: Path, tmp_path: Path) -> Path:
    """A BERT's folder, to be changed."""
    return Path(shutil.copytree(text_folder, tmp_path / "folder"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(TowerError, match=reason) as caught:
        open_text_tower(f"hf:{folder}", width=16)
    assert len(str(caught.value).splitlines()) == 1


# code that comes with a model


class Bait:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trap,)


def lay_code(folder: Path, trap: Path) -> None:
    """Write the modules that an `auto_map` names; to import one leaves a file behind."""
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_own.py").write_text(
            f"from pathlib import Path\nPath({str(trap)!r}).touch()\n"
            "from transformers import BertConfig, BertModel, BertTokenizerFast\n"
            "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
            "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
            "class OwnTokenizer(BertTokenizerFast):\n    pass\n"
        )


MODEL_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
TOKENIZER_CODE = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}


def test_model_that_needs_its_own_code_is_refused_unasked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers would ask on stdin whether to run the code
    lay_code(folder, tmp_path / "trap")
    edit(folder / "config.json", model_type="own", auto_map=MODEL_CODE)
    refused(folder, "could not be opened: .*custom code")
    assert not (tmp_path / "trap").exists()


def test_known_model_with_code_beside_it_opens_without_the_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    lay_code(folder, tmp_path / "trap")
    edit(folder / "config.json", auto_map=MODEL_CODE)
    edit(folder / "tokenizer_config.json", auto_map=TOKENIZER_CODE)
    tower = open_text_tower(f"hf:{folder}", width=16)
    assert type(tower.encoder) is hf.BertModel
    assert not (tmp_path / "trap").exists()


def test_tokenizer_that_needs_its_own_code_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    lay_code(folder, tmp_path / "trap")
    edit(folder / "config.json", model_type="own", auto_map=MODEL_CODE)
    edit(folder / "tokenizer_config.json", auto_map=TOKENIZER_CODE, tokenizer_class="OwnTokenizer")
    with pytest.raises(TowerError, match="missing or damaged"):
        PretrainedTokenizer.load(folder)
    assert not (tmp_path / "trap").exists()


def test_saved_model_runs_no_code(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = Path(shutil.copytree(model_path, tmp_path / "model"))
    lay_code(folder / "tokenizer", tmp_path / "trap")
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map=TOKENIZER_CODE)
    expected = lamplit.load(model_path, towers="text").encode_texts(["a red ring"])
    assert torch.equal(lamplit.load(folder, towers="text").encode_texts(["a red ring"]), expected)
    assert not (tmp_path / "trap").exists()


def test_pickle_that_would_run_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Bait(tmp_path / "trap")}, folder / "pytorch_model.bin")
    refused(folder, "could not be opened: .*")
    assert not (tmp_path / "trap").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trap").exists(), "the trap was a real one"


def test_pickle_of_tensors_is_read(folder: Path, text_folder: Path) -> None:
    expected = open_text_tower(f"hf:{text_folder}", width=16).encoder.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(hf.BertModel.from_pretrained(text_folder).state_dict(), folder / "pytorch_model.bin")
    found = open_text_tower(f"hf:{folder}", width=16).encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# what is no text encoder


def test_unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="unheard-of")
    refused(folder, "could not be opened: .*unheard-of")


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_vision_model(tmp_path: Path) -> None:
    config = hf.ViTConfig(image_size=32, patch_size=16, **SMALL)
    refused(save(tmp_path, hf.ViTModel(config), wordpiece_tokenizer()), "does not read token ids alone")


def test_speech_model(tmp_path: Path) -> None:
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    config = hf.WhisperConfig(
        vocab_size=99, d_model=32, num_mel_bins=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0, **sides,
    )  # fmt: skip
    refused(save(tmp_path, hf.WhisperModel(config), wordpiece_tokenizer()), "does not read token ids alone")


def test_siglip_reads_padding_and_is_refused(tmp_path: Path) -> None:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    text = hf.SiglipTextConfig(vocab_size=600, max_position_embeddings=20, **ends, **SMALL)
    vision = hf.SiglipVisionConfig(image_size=32, patch_size=16, **SMALL)
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    refused(save(tmp_path, model, clip_pairs()), r"\(siglip\) reads more than text")


@pytest.mark.parametrize(
    "config",
    [
        hf.BertConfig(**SMALL),
        hf.T5Config(d_model=32, num_layers=1, d_ff=32, num_heads=2, d_kv=16),
        hf.GPT2Config(n_layer=1),
    ],
    ids=lambda config: str(config.model_type),
)
def test_model_without_its_tokenizer(tmp_path: Path, config: Any) -> None:
    """transformers makes a tokenizer of special tokens, to which any two texts of as many words are alike."""
    config.vocab_size = 200
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused(tmp_path, r"holds no tokenizer: .*tokenizer\.save_pretrained\(FOLDER\)")


def test_saved_tokenizer_without_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(TowerError, match="holds no tokenizer, only its special tokens: the model is not whole"):
        PretrainedTokenizer.load(tmp_path)


def test_quantised_weights(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(folder, "quantised weights, which cannot be tuned")


def test_adapter_alone(folder: Path) -> None:
    adapted: Any = add_lora(hf.BertModel.from_pretrained(folder), rank=2)
    adapted.save_pretrained(folder)
    refused(folder, "is an adapter of another model; merge it")


# tokenizers that lack something


def test_decoder_without_an_end_token_is_read_at_its_last_token(tmp_path: Path) -> None:
    tokenizer = byte_pairs("GPT2Tokenizer", eos_token="<|e|>", pad_token="<|e|>")
    plain = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert (plain.eos_token, plain.pad_token) == (None, None)
    sizes = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    model = hf.ModernBertDecoderModel(hf.ModernBertDecoderConfig(vocab_size=len(plain), **sizes, **ids))
    tower = open_text_tower(f"hf:{save(tmp_path, model, plain)}", width=16).eval()
    assert tower.pooling == "last"
    assert tower.tokenize(["red"]) == [plain("red")["input_ids"]]
    assert tower.tokenize(["", "red"])[0] == [0], "a text without a token is read as one of padding"
    with torch.no_grad():
        assert tower(tower.tokenize(["", "red", "a large ring"])).isfinite().all()


def test_sentence_transformers_decoder_is_left_as_it_is(tmp_path: Path) -> None:
    config = hf.Qwen2Config(vocab_size=len(qwen_pairs()), bos_token_id=0, eos_token_id=0, **DECODER)
    folder = save(tmp_path, hf.Qwen2Model(config), qwen_pairs())
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    pooling = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
    (folder / "modules.json").write_text(json.dumps([pooling]))
    tower = open_text_tower(f"hf:{folder}", width=16)
    assert tower.pooling == "last"
    assert tower.tokenize(["red ring"]) == [qwen_pairs()("red ring")["input_ids"]]


def test_end_token_is_added_once(tmp_path: Path) -> None:
    tokenizer = llama_pairs()
    config = hf.LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **DECODER)
    tower = open_text_tower(f"hf:{save(tmp_path / 'one', hf.LlamaModel(config), tokenizer)}", width=16)
    [ids] = tower.tokenize(["red"])
    assert (ids[0], ids[-1]) == (1, 2)
    tower.save_tokenizer(tmp_path / "two")
    save(tmp_path / "two", tower.encoder, hf.AutoTokenizer.from_pretrained(tmp_path / "two"))
    assert open_text_tower(f"hf:{tmp_path / 'two'}", width=16).tokenize(["red"]) == [ids]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_decoder_of_sentence_transformers_is_read_at_its_last_token(side: str, tmp_path: Path) -> None:
    """As Qwen3-Embedding and its like are saved: padded on the left there, on the right here."""
    make("Qwen3", tmp_path / "decoder")
    described = tmp_path / "decoder" / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"padding_side": side}))
    transformer = Transformer(str(tmp_path / "decoder"))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(str(tmp_path / "saved"))
    owner = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert owner.tokenizer.padding_side == side
    tower = open_text_tower(f"hf:{tmp_path / 'saved'}", width=16).eval()
    texts = [text for text in TEXTS if text]
    expected = owner.encode(texts, convert_to_tensor=True)
    found = F.normalize(tower.features(tower.tokenize(texts)), dim=-1)
    assert tower.pooling == "last"
    assert (found - expected).abs().max() <= 1e-5
    tower.add_lora(2)
    assert (F.normalize(tower.features(tower.tokenize(texts)), dim=-1) - expected).abs().max() <= 1e-5
