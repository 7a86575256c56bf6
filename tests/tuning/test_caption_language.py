"""The log says so where captions are not English, and does not cry wolf where they are."""

from __future__ import annotations

import csv
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import write_store
from documents import USER_CACHE, need_stamps
from text_families import xlm_unigram

import lamplit
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.caption_language import MULTILINGUAL, SAMPLE, advise, find_language, sample

GREEK = ["Ένας βάτραχος.", "Μια γάτα και ένας σκύλος.", "Το καπέλο.", "Ένα πλοίο στη θάλασσα.", "Ο ήλιος."] * 4
UNKNOWN = [  # captions of the stamps in eight languages
    "Ein Frosch.", "Una rana.", "Лягушка.", "カエル", "Sammakko.", "Bir kurbağa.", "Ixoxo.", "Con ếch.",
    "Ein Erpel.", "Un pato.", "Селезень.", "おすガモ", "Sinisorsa.", "Bir erkek kaz.", "Inkukhu ensundu.",
    "Con ngỗng đực.", "Ein Nandu.", "Un ñandú.", "Нанду.", "レア", "Nandu-lintu.", "Bir baykuş.", "Iphengwini.",
    "Con cú.", "Eine Silbermöve.", "Una gaviota plateada.", "Серебристая чайка.", "ギンカモメ", "Hopealokki.",
    "Bir tukan.", "umfunda wenhlanzi.", "Chim tucăng.", "Eine Languste aus Hawaii.", "Лангуст с Гавайских островов.",
    "イセエビ", "Piikkihummeri, Havaijin saarilta.", "Bir denizatı.", "Impukane.", "Cá ngựa.",
]  # fmt: skip


def drawn(image_folder: Path, column: str) -> list[str]:
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        return [row[column] for row in csv.DictReader(file)]


def save_many_languages(folder: Path) -> None:
    """Save a tiny random tower of the kind that the log names: a BERT with the tokenizer of XLM-R."""
    tokenizer = xlm_unigram()
    tokenizer.save_pretrained(folder)
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=48, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.BertModel(config).save_pretrained(folder)


def test_language_is_found(image_folder: Path) -> None:
    assert find_language(drawn(image_folder, "caption")) is None
    assert find_language(drawn(image_folder, "german")) == "de"
    assert find_language(GREEK) == "el"
    assert find_language(UNKNOWN) == "und"
    german, english = drawn(image_folder, "german") * 9, drawn(image_folder, "caption") * 9
    assert find_language(english[:500] + german[:499]) == find_language(german[:499] + english[:500]) is None


@pytest.mark.parametrize("size", [0, 1, 499, 500, 501, 999, 1000, 1234])
def test_sample_lies_at_even_distances(size: int) -> None:
    found = [int(text) for text in sample([str(number) for number in range(size)])]
    assert min(size, SAMPLE) / 2 <= len(found) <= SAMPLE
    assert len({after - before for before, after in pairwise(found)}) <= 1
    assert size - (found or [0])[-1] <= 3


def test_what_says_too_little_is_no_language(image_folder: Path) -> None:
    assert find_language([]) is None
    assert find_language(GREEK[:3]) is None
    assert find_language([f"IMG_{number:05}.JPG" for number in range(300)]) is None
    mixed = [*drawn(image_folder, "caption"), *drawn(image_folder, "german")]
    assert find_language(mixed) is None


def test_advice_names_a_tower_of_many_languages(image_folder: Path, text_folder: Path) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=8)
    assert advise(drawn(image_folder, "caption"), tower) is None
    advice = advise(drawn(image_folder, "german"), tower)
    assert advice is not None
    assert "they look like de (ISO 639)" in advice
    assert f"--text-tower {MULTILINGUAL}" in advice
    assert "they are of several languages" in str(advise(UNKNOWN, tower))
    tower.tokenizer.tokenizer.add_tokens([f"word{number}" for number in range(100_000)])
    assert advise(drawn(image_folder, "german"), tower) == advice.partition(".")[0]


def test_tune_says_so_and_reads_such_a_tower(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_many_languages(tmp_path / "many")
    german = drawn(image_folder, "german")
    rows = [{"german": text} for text in german]
    store = write_store(
        tmp_path / "some.lance", torch.randn(60, 8, generator=torch.Generator().manual_seed(0)),
        [[text] for text in drawn(image_folder, "caption")], rows,
    )  # fmt: skip
    for column, told in (("texts", 0), ("german", 1)):
        caplog.clear()
        settings = lamplit.TuneSettings(f"hf:{tmp_path / 'many'}", text_column=column, steps=1, num_evals=1)
        with caplog.at_level(logging.WARNING, "lamplit"):
            report = lamplit.tune(store, tmp_path / column, settings, device="cpu")
        assert sum("not English" in record.getMessage() for record in caplog.records) == told
        assert report.training_pairs == 48
    assert lamplit.load(tmp_path / "german", towers="text", device="cpu").encode_texts(german[:2]).shape == (2, 8)


def texts_of(name: str) -> dict[str, list[str]]:
    """All texts of a data set in the user's cache, by the name of their column."""
    if USER_CACHE is None or not (pairs := Path(USER_CACHE) / name / "pairs.jsonl").is_file():
        pytest.skip(f"{name} is not in the cache")
    found: dict[str, list[str]] = {}
    for line in pairs.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        for column, value in row.items():
            if column.startswith(("text", "keywords")) and value:
                found.setdefault(column, []).extend([value] if isinstance(value, str) else value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openclipart", "emoji"])
def test_no_false_alarm(name: str) -> None:
    found = {column: find_language(texts) for column, texts in texts_of(name).items()}
    assert set(found.values()) == {None}


@pytest.mark.slow
def test_languages_of_the_stamps() -> None:
    need_stamps()
    found = {column: find_language(texts) for column, texts in texts_of("stamps").items() if len(texts) > 300}
    assert sorted(column for column, language in found.items() if language is None) == [
        "text", "text_en_AU", "text_en_GB"
    ]  # fmt: skip
    right = {"text_de": "de", "text_ja": "ja", "text_ru": "ru", "text_ar": "ar", "text_hi": "hi", "text_fi": "fi"}
    assert {column: found[column] for column in right} == right
