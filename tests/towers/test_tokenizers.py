from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.errors import TowerError
from lamplit.towers.texts.scratch import train_sentencepiece
from lamplit.towers.tokens.saved_tokenizers import load_tokenizer
from lamplit.towers.tokens.tokenizers import SentencePiece, read_vocabulary
from lamplit.towers.tokens.wordpiece import WordPiece

CAPTIONS = ["A small red circle.", "A large green square, and a cross.", "小さな赤い円。", "маленький красный круг"]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePiece:
    return train_sentencepiece(CAPTIONS * 3)


def ids(tokenizer: SentencePiece, text: str, context_length: int | None) -> list[int]:
    [row] = tokenizer.encode([text], context_length)
    return row


def test_short_texts_are_filled_with_ends_and_long_ones_keep_theirs(tokenizer: SentencePiece) -> None:
    end = tokenizer.pad_id
    pieces = ids(tokenizer, "a small red circle.", None)
    assert pieces[-1] == end
    assert pieces.count(end) == 1
    count = len(pieces) - 1
    for context_length in range(1, count + 5):
        row = ids(tokenizer, "a small red circle.", context_length)
        kept = min(count, context_length - 1)
        assert row == pieces[:kept] + [end] * (context_length - kept)


@given(st.text(max_size=40), st.integers(1, 20))
def test_the_last_token_is_always_the_end(tokenizer: SentencePiece, text: str, context_length: int) -> None:
    row, whole = ids(tokenizer, text, context_length), ids(tokenizer, text, None)
    assert len(row) == context_length
    assert row[-1] == whole[-1] == tokenizer.pad_id
    assert tokenizer.pad_id not in whole[:-1]  # a text cannot say it
    assert row[: len(whole)] == [*whole[:-1][: context_length - 1], *row[-1:]][: len(whole)]
    assert all(0 <= number < len(tokenizer) for number in row)


def test_the_name_of_the_end_in_a_text_is_no_end(tokenizer: SentencePiece) -> None:
    assert ids(tokenizer, "</s> a", None).count(tokenizer.pad_id) == 1


def test_many_texts(tokenizer: SentencePiece) -> None:
    assert tokenizer.encode(CAPTIONS, 9) == [ids(tokenizer, caption, 9) for caption in CAPTIONS]
    assert tokenizer.encode([], 9) == []


def test_lower_case_is_an_option_that_is_kept(tokenizer: SentencePiece, tmp_path: Path) -> None:
    as_it_comes = SentencePiece(tokenizer.model, lowercase=False)
    assert ids(tokenizer, "A RED", 9) == ids(tokenizer, "a red", 9) == ids(as_it_comes, "a red", 9)
    assert ids(as_it_comes, "A RED", 9) != ids(as_it_comes, "a red", 9)
    for each in (tokenizer, as_it_comes):
        each.save(tmp_path)
        again = load_tokenizer(each.describe(), tmp_path)
        assert again.encode(["A RED ring"], 9) == each.encode(["A RED ring"], 9)
        assert len(again) == len(each)


def test_half_a_surrogate_pair_is_a_question_mark(tokenizer: SentencePiece) -> None:
    assert ids(tokenizer, "a \ud800", 9) == ids(tokenizer, "a ?", 9)


def test_a_copy_is_as_good(tokenizer: SentencePiece) -> None:
    for again in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode(CAPTIONS, 9) == tokenizer.encode(CAPTIONS, 9)


def test_a_vocabulary_is_known_by_its_ending(tokenizer: SentencePiece, tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(tokenizer.model)
    (tmp_path / "a.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    assert isinstance(read_vocabulary(tmp_path / "a.model", fill=False), SentencePiece)
    for fill in (False, True):
        words = read_vocabulary(tmp_path / "a.txt", fill=fill)
        assert isinstance(words, WordPiece)
        assert words.fill == fill
    with pytest.raises(TowerError, match=r"a.json is not a vocabulary; expected FILE.txt .* or FILE.model"):
        read_vocabulary(tmp_path / "a.json", fill=False)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04]\x94.", None])
def test_not_a_sentencepiece_model(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "a.model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TowerError, match=r"a.model cannot be read as a SentencePiece model: "):
        SentencePiece.read(file)


def test_a_damaged_model_is_refused_or_read_but_nothing_else(tokenizer: SentencePiece) -> None:
    for cut in range(0, len(tokenizer.model), len(tokenizer.model) // 50):
        try:
            SentencePiece(tokenizer.model[:cut])
        except TowerError:
            continue
