from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplit.errors import TowerError
from lamplit.towers.tokens.saved_tokenizers import load_tokenizer
from lamplit.towers.tokens.wordpiece import CLASS, PAD, UNKNOWN, WordPiece, split_words

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-[]中д"
PIECES = ["cat", "cats", "##ch", "##ing", "catch", "##at", "sch", "##sch", "##schi", "ff", "##ff", "##fahrt", "strasse"]
TOKENS = [PAD, UNKNOWN, CLASS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *PIECES]


@pytest.fixture(scope="module")
def tokenizer() -> WordPiece:
    return WordPiece(TOKENS)


def pieces(tokenizer: WordPiece, text: str) -> list[str]:
    [row] = tokenizer.encode([text], None)
    return [tokenizer.tokens[number] for number in row]


# the words of a text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World!", "hello , world !"),
        ("don't_stop-me", "don ' t _ stop - me"),
        ("$5 + 3^2 = `x` ~ <|>", "$ 5 + 3 ^ 2 = ` x ` ~ < | >"),  # ASCII's symbols count as punctuation
        ("€5 ©x 3×2 ½→x", "€5 ©x 3×2 1⁄2→x"),  # others do not, the fraction's stroke neither
        ("“so” – said… ¿he‽", "“ so ” – said . . . ¿ he ‽"),
        ("Straße GROẞ", "strasse gross"),
        ("ﬁsh ﬃne ſo ǅ", "fish ffine so dz"),
        ("¼¾ x² № ™ ㎏ Å K µ ŉ ʰ", "1⁄43⁄4 x2 no tm kg a k μ ʼn h"),
        ("ＡＢＣ！ ｶﾞ", "abc ! カ"),
        ("Café CAFE\u0301 naïve Ñ", "cafe cafe naive n"),
        ("Σίσυφος İ ı Ǆ", "σισυφοσ i ı dz"),
        ("a\u0345 α\u0345", "aι αι"),  # the iota below is folded to a letter before accents go
        ("Ёлка й", "елка и"),
        ("हिन्दी", "हिनदी"),  # the virama is a mark without width, the vowel signs have some
        ("שָׁלוֹם", "שלום"),
        ("한", "\u1112\u1161\u11ab"),  # taken apart, and not put together again
        ("中国a我 人々", "中 国 a 我 人 々"),
        ("㍿ 〇 ㍻", "株 式 会 社 〇 平 成"),
        ("\uf900 \U0002f800", "豈 丽"),
        ("ひらがな カタカナ", "ひらかな カタカナ"),
        ("𠀀x𪜀", "𠀀 x 𪜀"),
        ("co\u00adop a\u200bb a\u2060b \ufeffc a\u200db", "coop ab ab c ab"),  # what cannot be seen is dropped
        ("❤\ufe0f 👩\u200d🚀 🇯🇵", "❤ 👩🚀 🇯🇵"),
        ("a\u115fb \u3164 \uffa0 c\u034fd \U000e0041e", "ab cd e"),
        ("\u0600x \u06ddy a\u070fb \ufff9c", "x y a b c"),  # other format characters are spaces
        ("a\x00b c\x07d\x1fe\x7ff\x85g\x0bh", "a b c d e f g h"),
        ("a\tb\nc\r\nd  e", "a b c d e"),
        ("a\u00a0b\u3000c\u2003d\u202fe", "a b c d e"),  # spaces by compatibility
        ("a\u2028b \u1680c", "a\u2028b \u1680c"),  # white space that ASCII has not is part of a word
        ("[CLS] [SEP] [UNK]x [PAD]", "[ cls ] [ sep ] [ unk ] x [ pad ]"),
        ("##ing", "# # ing"),
        ("ﷺ", "صلى الله عليه وسلم"),
        ("ⅷ ① ⒈ ㈠", "viii 1 1 . ( 一 )"),
        ("", ""),
        (" \t\u00ad\u0301 ", ""),
    ],
)
def test_words(text: str, words: str) -> None:
    assert split_words(text) == ([word for word in words.split(" ") if word])


@given(st.text())
def test_words_of_words_are_the_words(text: str) -> None:
    words = split_words(text)
    assert split_words(" ".join(words)) == words
    assert all(word and " " not in word for word in words)


@given(st.text())
def test_composition_does_not_matter(text: str) -> None:
    words = split_words(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert split_words(unicodedata.normalize(form, text)) == words


@given(st.text(st.sampled_from("abcxyzäöüßéñçøåжщλ ,.-中1")))
def test_case_does_not_matter(text: str) -> None:
    words = split_words(text)
    for other in (text.upper(), text.casefold(), text.swapcase()):
        assert split_words(other) == words


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_has_no_way_of_its_own(text: str) -> None:
    """A letter that is not ASCII sends the same text the long way."""
    assert split_words(text + " д") == [*split_words(text), "д"]


# their pieces


def slow_pieces(word: str, vocabulary: list[str]) -> list[str]:
    """Take the longest token that goes on, by trying every token."""
    if len(word.encode()) > 100:
        return [UNKNOWN]
    found: list[str] = []
    rest = word
    while rest:
        begins = [t.removeprefix("##") for t in vocabulary if t.startswith("##") == bool(found)]
        fitting = [piece for piece in begins if piece and rest.startswith(piece)]
        if not fitting:
            return [UNKNOWN]
        longest = max(fitting, key=len)
        found.append(f"##{longest}" if found else longest)
        rest = rest[len(longest) :]
    return found


@given(st.text(st.sampled_from("catsching.дж"), max_size=60))
def test_longest_match_first(tokenizer: WordPiece, text: str) -> None:
    vocabulary = [token for token in TOKENS if token not in (PAD, UNKNOWN, CLASS)]
    expected = [piece for word in split_words(text) for piece in slow_pieces(word, vocabulary)]
    assert pieces(tokenizer, text) == [CLASS, *expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cats catching", "cats catch ##ing"),
        ("Schifffahrt", "sch ##i ##ff ##fahrt"),  # greedy: ##ff is taken as soon as it can be
        ("catжs cat", "[UNK] cat"),  # one letter that is not known makes the word unknown
        ("[CLS]", "[ c ##l ##s ]"),
        ("Straße", "strasse"),
        ("中д", "中 д"),
        ("", ""),
    ],
)
def test_pieces(tokenizer: WordPiece, text: str, expected: str) -> None:
    assert pieces(tokenizer, text) == [CLASS, *expected.split()]


@pytest.mark.parametrize(("letter", "most"), [("a", 100), ("д", 50)])
def test_a_word_of_more_than_100_bytes_is_unknown(tokenizer: WordPiece, letter: str, most: int) -> None:
    assert len(pieces(tokenizer, letter * most)) == 1 + most
    assert pieces(tokenizer, letter * (most + 1)) == [CLASS, UNKNOWN]
    assert pieces(tokenizer, "\u0301".join(letter * most)) == pieces(tokenizer, letter * most)  # counted when cleaned


@given(st.text(), st.integers(1, 20))
def test_rows(tokenizer: WordPiece, text: str, context_length: int) -> None:
    [row], [whole] = tokenizer.encode([text], context_length), tokenizer.encode([text], None)
    assert row == whole[:context_length]
    assert len(row) <= context_length
    assert all(0 <= number < len(tokenizer) for number in row)
    special = {TOKENS.index(token) for token in (PAD, CLASS)}
    assert row[0] == TOKENS.index(CLASS)
    assert not special & set(whole[1:])  # a text cannot say them


@given(st.text(), st.integers(1, 20))
def test_filled_rows(tokenizer: WordPiece, text: str, context_length: int) -> None:
    filling = WordPiece(TOKENS, fill=True)
    [row], [plain] = filling.encode([text], context_length), tokenizer.encode([text], context_length)
    assert row == plain + [tokenizer.pad_id] * (context_length - len(plain))
    assert filling.encode([text], None) == tokenizer.encode([text], None)


def test_half_a_surrogate_pair_is_a_word_like_any_other(tokenizer: WordPiece) -> None:
    assert pieces(tokenizer, "a \ud800") == [CLASS, "a", UNKNOWN]


def test_many_texts(tokenizer: WordPiece) -> None:
    texts = ["cats", "", "Cats catching"]
    assert tokenizer.encode(texts, 16) == [row for text in texts for row in tokenizer.encode([text], 16)]
    assert tokenizer.encode([], 16) == []


# its file


@pytest.mark.parametrize("fill", [False, True])
def test_round_trip(fill: bool, tmp_path: Path) -> None:
    tokenizer = WordPiece([*TOKENS, "\u2028", "\x85"], fill=fill)  # tokens that look like ends of lines are none
    tokenizer.save(tmp_path / "tokenizer")
    again = load_tokenizer(tokenizer.describe(), tmp_path / "tokenizer")
    assert isinstance(again, WordPiece)
    assert again.tokens == tokenizer.tokens
    assert again.encode(["Cats, \u2028"], 8) == tokenizer.encode(["Cats, \u2028"], 8)


def test_last_line_may_end_or_not(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    for end in ("", "\n"):
        file.write_text("\n".join(TOKENS) + end, encoding="utf-8")
        assert len(WordPiece.read(file)) == len(TOKENS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[UNK]\n[CLS]\na\n", r"lacks \[PAD\]"),
        (b"", r"lacks \[PAD\], \[UNK\], \[CLS\]"),
        (b"[PAD]\n[UNK]\n[CLS]\na\nb\na\n", "has a token twice"),
        (b"[PAD]\n[UNK]\n[CLS]\n\xff\n", "utf-8"),
        (None, "No such file"),
    ],
)
def test_not_a_vocabulary(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TowerError, match=rf"vocab.txt cannot be read as a vocabulary, one token a line: .*{reason}"):
        WordPiece.read(file)
