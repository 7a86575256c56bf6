"""How often `--min-score auto` gives an answer to words that nothing shows, and how often it keeps one for words shown.

    python benchmarks/irrelevant.py [--folder runs/irrelevant] [--quick]
    python benchmarks/irrelevant.py --store icons.lance --model runs/icons

On the stamps, with the demo towers tuned at the defaults (with `--quick` alone) and with a linear head; or on a store
and a model that there are. Words that nothing shows are names of classes of public data sets of which no word is in any
caption; some of them are shown under another name (a motorcycle is "A motor bike."), so their share is a little too
high. Words that are shown are captions of one word, and the nouns at the end of captions such as "A red hat." (of a
thousand or more, 400); their images are those whose captions have the word. A shown word keeps its answer if one of its
images is at or above the lowest score. "Not tuned on" are words whose images were all held out. "By names" is what a
store without captions would get.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from timing import console, filled, finish, parser

import lamplit
from lamplit.data.caption_hash import hash_captions
from lamplit.data.split_record import is_in
from lamplit.retrieval.model_reader import as_reader
from lamplit.retrieval.relevance import SAMPLE, Law, Relevance, law_of_names, measure_law, spread
from lamplit.zeroshot.names import class_names

DATA_SETS = ("imagenet", "sun397", "caltech101", "flowers102", "pets", "resisc45", "cifar100", "fashion-mnist")
NOUN = re.compile(r"^(?:(?:A|An|The|Some) (?:[\w-]+ )*?)?([A-Za-z][a-z]{2,})[.!]?$")
MOST = 400  # words shown
FIRST = 10  # hits among which an answer could be seen without a lowest score


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, default=Path("runs/irrelevant"), help="the stamps and their models")
    options.add_argument("--store", type=Path, help="a store with captions, in place of the stamps")
    options.add_argument("--model", type=Path, help="a model that reads it")
    options = filled(options.parse_args())
    if bool(options.store) != bool(options.model):
        raise SystemExit("error: --store and --model go together: a model that reads the store")
    figures = []
    for name, model, store in [(options.model, options.model, options.store)] if options.store else on_stamps(options):
        figures.append({"title": f"{store.name}, {name}", "sides": measure(model, store)})
        show(figures[-1])
    finish(options, figures)


def on_stamps(options: Any) -> Iterator[tuple[str, Path, Path]]:
    store = options.folder / "stamps.lance"
    lamplit.embed(lamplit.fetch("stamps"), store, image_tower="demo:efficientnet-lite0", progress=True)
    for head in ("auto",) if options.quick else ("auto", "linear"):
        settings = lamplit.TuneSettings("demo:minilm", head=head, epochs=4)  # type: ignore[arg-type]
        lamplit.tune(store, options.folder / head, settings, progress=True)
        yield f"{head} head", options.folder / head, store


def measure(folder: Path, store: Path) -> dict[str, dict[str, float]]:
    """Both laws of a model and a store, and what they do to words that are shown and that are not."""
    model = lamplit.load(folder, device="cpu")
    searcher = lamplit.Searcher(model, store)
    reader, vectors = as_reader(model), np.asarray(searcher.collection.vectors[:], np.float32)
    sample = vectors[spread(len(vectors), SAMPLE)]
    captions = [texts[0] if texts else "" for texts in searcher.store.texts()]
    told = [{stem(word) for word in re.findall(r"[a-z]+", caption.lower())} for caption in captions]
    absent = words_not_in(set().union(*told))
    shown = sorted({found[1].lower() for caption in captions if (found := NOUN.match(caption))})
    shown = [shown[place] for place in spread(len(shown), MOST)]
    truth = np.array([[stem(word) in words for words in told] for word in shown])  # (words, N)
    assert model.tuned_on is not None
    held_out = is_in(hash_captions(captions), model.tuned_on.captions("held_out"))
    new = np.array([held_out[row].all() for row in truth])
    zabsent, zshown = (reader.encode_texts([with_article(word) for word in words]) for words in (absent, shown))
    scores = zshown @ vectors.T
    first = np.take_along_axis(truth, np.argpartition(-scores, FIRST, axis=1)[:, :FIRST], axis=1).any(1)
    highest = np.array([(vectors @ vector).max() for vector in zabsent])
    found: dict[str, dict[str, float]] = {}
    for name, law in (
        ("by captions", measure_law(searcher.store, reader, sample, searcher.find)),
        ("by names", law_of_names(reader, sample, searcher.find)),
    ):
        relevance = Relevance(law, sample)
        false = highest >= [relevance.min_score(vector) for vector in zabsent]
        kept = scores >= np.array([relevance.min_score(vector) for vector in zshown])[:, None]
        answered = (kept & truth).any(1)
        found[name] = figures_of(law, false, answered, first, new) | {
            "images kept that have the word": float((kept & truth).sum() / max(kept.sum(), 1))
        }
    return found


def figures_of(law: Law, false: Any, answered: Any, first: Any, new: Any) -> dict[str, float]:
    return {
        "deviations": law.deviations,
        "words that nothing shows": len(false),
        "false answers": float(false.mean()),
        "words shown": len(first),
        f"a true image among the first {FIRST}": float(first.mean()),
        "a true image kept": float(answered.mean()),
        "words not tuned on": int(new.sum()),
        f"of these, a true image among the first {FIRST}": float(first[new].mean()),
        "of these, a true image kept": float(answered[new].mean()),
    }


def words_not_in(told: set[str]) -> list[str]:
    """Names of classes of which no word is among those of the captions."""
    every = {names[0].replace("_", " ").lower() for data in DATA_SETS for names in class_names(data)}
    return sorted(n for n in every if not any(stem(w) in told for w in re.findall(r"[a-z]+", n) if len(w) > 2))


def stem(word: str) -> str:
    return re.sub(r"(es|s)$", "", word)


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def show(figures: dict[str, Any]) -> None:
    table = Table("", *figures["sides"], title=figures["title"])
    for name in next(iter(figures["sides"].values())):
        values = [side[name] for side in figures["sides"].values()]
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for value in values))
    console.print(table)


if __name__ == "__main__":
    main()
