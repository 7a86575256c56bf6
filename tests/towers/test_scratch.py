from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplit.errors import TowerError, UsageError
from lamplit.towers.texts.scratch import SIZES, ScratchEncoder, open_vocabulary, train_sentencepiece
from lamplit.towers.tokens.tokenizers import SentencePiece
from lamplit.towers.tokens.wordpiece import CLASS, PAD, UNKNOWN, WordPiece, split_words

CAPTIONS = [
    "A small red circle.",
    "A large green square, and a cross.",
    "小さな赤い円。",
    "دائرة حمراء صغيرة",
    "маленький красный круг",
    "café — naïve №1",
    "👩‍🚀 🇯🇵",
]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePiece:
    return train_sentencepiece(CAPTIONS * 3)


@pytest.fixture(scope="module")
def wordpiece() -> WordPiece:
    words = dict.fromkeys(word for caption in CAPTIONS for word in split_words(caption))
    return WordPiece([PAD, UNKNOWN, CLASS, *words], fill=True)


def encoder(width: int = 32, context_length: int = 16) -> ScratchEncoder:
    torch.manual_seed(0)
    return ScratchEncoder(50, width, num_layers=2, num_heads=4, context_length=context_length).eval()


# vocabularies


@pytest.mark.parametrize("text", ["خط غريب تماما", "見たことのない文字列", "ᚠᛇᚻ", "𝔘𝔫𝔦", "zq" * 90])
def test_no_script_is_unknown_to_sentencepiece(tokenizer: SentencePiece, text: str) -> None:
    """It has never seen these."""
    [row], [other] = tokenizer.encode([text], None), tokenizer.encode([text[:-1]], None)
    assert 0 not in row  # <unk>
    assert row != other  # nothing is dropped in silence


def test_frequent_words_become_one_token(tokenizer: SentencePiece) -> None:
    assert len(tokenizer.encode(["a small red circle."], None)[0]) <= 6


def test_upper_case_reads_as_lower(tokenizer: SentencePiece) -> None:
    upper, lower = tokenizer.encode(["A SMALL Red ﬁg", "a small red fig"], 16)
    assert upper == lower


def test_size_is_bounded() -> None:
    captions = [f"{'abcdefgh'[i % 8]}{'ijklmnop'[i // 8 % 8]}{'qrstuvwx'[i // 64]} word" for i in range(512)]
    assert 258 < len(train_sentencepiece(captions, vocab_size=300)) <= 300


@given(st.lists(st.text(st.sampled_from("abc дж中,.ßÉ"), min_size=1), min_size=1, max_size=8))
@settings(max_examples=40)
def test_any_captions_make_a_vocabulary_that_reads_them(captions: list[str]) -> None:
    if not any(split_words(caption) for caption in captions):
        return
    assert not any(0 in row for row in train_sentencepiece(captions).encode(captions, None))


@pytest.mark.parametrize("texts", [[], [""], [" \n"]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(UsageError, match=r"no vocabulary can be trained on these captions .*scratch:small@FILE.model"):
        open_vocabulary("sentencepiece", texts)


def train_again() -> str:
    texts = [f"{a}{b}, {b}{a} {a}" for a in "abcdeж中" for b in "fghijßé"]
    return hashlib.md5(train_sentencepiece(texts, 300).model).hexdigest()


@pytest.mark.slow
def test_training_is_the_same_in_every_process() -> None:
    """A run that is resumed trains its vocabulary again."""
    command = [sys.executable, "-c", "import test_scratch; print(test_scratch.train_again())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == train_again()


def test_vocabulary_from_a_file(tokenizer: SentencePiece, wordpiece: WordPiece, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    wordpiece.save(tmp_path)
    again = open_vocabulary(str(tmp_path / "sentencepiece.model"), [])
    assert again.encode(CAPTIONS, 16) == tokenizer.encode(CAPTIONS, 16)
    words = open_vocabulary(str(tmp_path / "vocab.txt"), [])
    assert words.encode(CAPTIONS, 16) == wordpiece.encode(CAPTIONS, 16)
    assert {len(row) for row in words.encode(CAPTIONS, 16)} == {16}  # filled: the tower has no masks
    with pytest.raises(TowerError, match="spm is not a vocabulary"):
        open_vocabulary("spm", CAPTIONS)


# the encoder


def test_encoder_shapes_and_padding() -> None:
    model = encoder()
    ids = torch.randint(2, 50, (3, 9))
    hidden = model(ids).last_hidden_state
    assert hidden.shape == (3, 9, 32)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = torch.arange(13)[None] < torch.full((3, 1), 9)
    assert torch.allclose(model(padded, mask).last_hidden_state[:, :9], hidden, atol=1e-6)
    assert not torch.allclose(model(padded).last_hidden_state[:, :9], hidden, atol=1e-3)  # the mask is what does it


def test_encoder_reads_the_order() -> None:
    model = encoder()
    forward, backward = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[7, 6, 5, 1]])
    assert not torch.allclose(model(forward).last_hidden_state[:, -1], model(backward).last_hidden_state[:, -1])


def test_every_token_sees_every_other() -> None:
    model = encoder()
    ids = torch.tensor([[5, 6, 7, 1]])
    before = model(ids).last_hidden_state
    ids[0, -1] = 2
    assert ((model(ids).last_hidden_state - before).abs().amax(-1) > 1e-3).all()  # the first sees the last, too


def test_encoder_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = ScratchEncoder(8192, 192, num_layers=2, num_heads=3, context_length=64)
    assert model.token_embedding.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert model.position_embedding.std().item() == pytest.approx(192**-0.5, rel=0.05)
    for block in model.blocks:
        xavier = {block.mlp.fc1: 192 + 768, block.mlp.fc2: 192 + 768, block.attn.proj: 192 + 192}
        for linear, fans in xavier.items():
            assert linear.weight.abs().max().item() == pytest.approx((6 / fans) ** 0.5, rel=0.02)
        for part in block.attn.qkv.weight.chunk(3):  # each a matrix of its own
            assert part.abs().max().item() == pytest.approx((6 / (192 + 192)) ** 0.5, rel=0.02)
        assert not block.attn.qkv.bias.any()
        assert not block.attn.proj.bias.any()
        for linear in (block.mlp.fc1, block.mlp.fc2):
            assert linear.bias.std().item() == pytest.approx(1e-6, rel=0.2)


def test_gradients_reach_every_weight() -> None:
    model = encoder().train()
    model(torch.randint(0, 50, (4, 16))).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Table 7's "Param (M)" of the precomputed column with a B/32 image tower, 768 wide; the table's unit is 2^20, and its
# vocabulary 32,000. Ti and S are the published L16Ti and L16S: 16,000 tokens, and a head to 1024.
@pytest.mark.parametrize(
    ("size", "vocab_size", "head_width", "millions"),
    [
        ("tiny", 16_000, 1024, 8_611_456 / 2**20),
        ("small", 16_000, 1024, 27_838_720 / 2**20),
        ("base", 32_000, 768, 105.1),
        ("large", 32_000, 768, 320.3),
        ("huge", 32_000, 768, 640.5),
        ("giant", 32_000, 768, 1007.2),
    ],
)
def test_sizes_have_the_paper_s_parameters(size: str, vocab_size: int, head_width: int, millions: float) -> None:
    width, num_layers, num_heads, mlp_width = SIZES[size]
    assert width % num_heads == 0
    with torch.device("meta"):
        model = ScratchEncoder(vocab_size, width, num_layers, num_heads, 16, mlp_width)
    assert model.blocks[0].mlp.fc1.out_features == mlp_width
    count = sum(parameter.numel() for parameter in model.parameters()) + (width + 1) * head_width
    assert count / 2**20 == pytest.approx(millions, abs=1e-9 if vocab_size == 16_000 else 0.05)
