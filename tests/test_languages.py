"""One store, two languages: a second text tower reads the same vectors, and no image is opened again."""

from __future__ import annotations

import pytest

import lamplit


def tune(words_path, text_folder, out, column):
    settings = lamplit.TuneSettings(
        text_tower=f"hf:{text_folder}",
        text_column=column,
        epochs=30,
        batch_size=72,
        lr=3e-3,
        num_evals=1,
        closed_form=False,
    )
    lamplit.tune(words_path, out, settings)
    return lamplit.Searcher(lamplit.load(out, towers="text"), lamplit.Store(words_path))


def found_among_five(searcher, column):
    """Part of the store's texts whose own image is among the first five of 360 (chance: 0.014)."""
    texts = [row[0] for row in searcher.store.texts(column)]
    right = [text in [texts[int(hit.id)] for hit in searcher.search(text, k=5)] for text in texts]
    return sum(right) / len(right)


@pytest.mark.slow
def test_second_language_on_the_same_store(words_path, text_folder, tmp_path):
    before = lamplit.Store(words_path)
    vectors, hashes = before.vectors(), before.column("hash")
    english = tune(words_path, text_folder, tmp_path / "english", "texts")
    german = tune(words_path, text_folder, tmp_path / "german", "german")
    assert found_among_five(english, "texts") > 0.4
    assert found_among_five(german, "german") > 0.4
    # A control: neither finds by the other's words what the other finds.
    assert found_among_five(english, "german") < 0.2
    after = lamplit.Store(words_path)
    assert bool((after.vectors() == vectors).all())
    assert after.column("hash") == hashes
