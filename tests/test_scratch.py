from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lamplit.towers.scratch import END, PAD, SIZES, ScratchEncoder, train_tokenizer

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
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS * 3)


def encoder(width: int = 32, context_length: int = 16) -> ScratchEncoder:
    torch.manual_seed(0)
    return ScratchEncoder(50, width, num_layers=2, num_heads=4, context_length=context_length).eval()


def test_captions_come_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for caption in CAPTIONS:
        ids = tokenizer(caption)["input_ids"]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text.strip() == caption.lower().replace("№", "no")  # NFKC


@pytest.mark.parametrize("text", ["خط غريب تماما", "見たことのない文字列", "ᚠᛇᚻ", "\x00\x7f", "𝔘𝔫𝔦", "z" * 90])
def test_no_script_is_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """The tokenizer has never seen these."""
    assert tokenizer.unk_token is None
    ids = tokenizer(text)["input_ids"]
    assert all(isinstance(number, int) and number < len(tokenizer) for number in ids)
    other = tokenizer(text[:-1])["input_ids"]
    assert ids != other  # nothing is dropped in silence


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=100)
def test_end_is_the_last_token_and_only_there(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text.replace(END, "").replace(PAD, ""))["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END)
    assert ids[-1] == end
    assert ids.count(end) == 1


def test_end_survives_truncation(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" ".join(CAPTIONS), truncation=True, max_length=5)["input_ids"]
    assert len(ids) == 5
    assert ids[-1] == tokenizer.convert_tokens_to_ids(END)


def test_frequent_words_become_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("a small red circle")["input_ids"]) <= 6


def test_upper_case_reads_as_lower(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("A SMALL Red ﬁg").input_ids == tokenizer("a small red fig").input_ids


def test_vocabulary_is_bounded_and_holds_every_byte() -> None:
    tokenizer = train_tokenizer(["one two three four five six seven"] * 5, vocab_size=270)
    assert 258 <= len(tokenizer) <= 270
    assert tokenizer.pad_token == PAD
    assert tokenizer.eos_token == END


def test_training_is_deterministic() -> None:
    assert train_tokenizer(CAPTIONS).get_vocab() == train_tokenizer(CAPTIONS).get_vocab()


def test_round_trip(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.pad_token_id == tokenizer.pad_token_id
    for text in [*CAPTIONS, "unseen: ὕδωρ", ""]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


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


def test_encoder_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = ScratchEncoder(8192, 192, num_layers=2, num_heads=3, context_length=64)
    assert model.token_embedding.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert model.position_embedding.std().item() == pytest.approx(192**-0.5, rel=0.05)
    linear = model.blocks[0].mlp.fc1
    assert linear.weight.abs().max().item() == pytest.approx((6 / (192 + 768)) ** 0.5, rel=0.02)
    assert linear.bias.abs().max() == 0
    assert linear.out_features == 4 * 192


def test_gradients_reach_every_weight() -> None:
    model = encoder().train()
    model(torch.randint(0, 50, (4, 16))).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sizes_divide_into_heads_of_64() -> None:
    assert set(SIZES) == {"tiny", "small", "base"}
    assert all(width == 64 * num_heads for width, _, num_heads in SIZES.values())
