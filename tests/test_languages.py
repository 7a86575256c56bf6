"""One store, two languages: a second text tower reads the same vectors, and no picture is opened again."""

from __future__ import annotations

import lamplit


def test_second_language_on_the_same_store(words_path, text_folder, tmp_path):
    store = lamplit.Store(words_path)
    vectors, version = store.vectors(), lamplit.Store(words_path).column("hash")
    for name, column in (("english", "texts"), ("german", "german")):
        settings = lamplit.TuneSettings(
            text=f"hf:{text_folder}",
            text_column=column,
            epochs=30,
            batch_size=72,
            lr=3e-3,
            evaluations=1,
            head_start=False,
        )
        report = lamplit.tune(store, tmp_path / name, settings)
        assert report.last["image_to_text/recall@5"] > 10 * 5 / report.held_out_captions / 2, "no better than chance"
        searcher = lamplit.Searcher(lamplit.load(tmp_path / name, towers="text"), lamplit.Store(words_path))
        texts = [row[0] for row in store.texts(column)]
        found = [texts[int(searcher.search(text, k=1)[0].id)] == text for text in texts]
        assert sum(found) / len(found) > 0.5, name
    after = lamplit.Store(words_path)
    assert bool((after.vectors() == vectors).all())
    assert after.column("hash") == version


def test_each_language_reads_its_own_words(words_path, text_folder, tmp_path):
    """A control: the English model does not find by German words what the German one finds."""
    settings = lamplit.TuneSettings(
        text=f"hf:{text_folder}", epochs=30, batch_size=72, lr=3e-3, evaluations=1, head_start=False
    )
    lamplit.tune(words_path, tmp_path / "english", settings)
    store = lamplit.Store(words_path)
    searcher = lamplit.Searcher(lamplit.load(tmp_path / "english", towers="text"), store)
    german = [row[0] for row in store.texts("german")]
    found = [german[int(searcher.search(text, k=1)[0].id)] == text for text in german]
    assert sum(found) / len(found) < 0.2
