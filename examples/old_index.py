"""Teach an old index new languages: from its vectors alone, and from texts alone, without a picture.

Run with: python examples/old_index.py [TEXT_TOWER] (it uses the store of `make quickstart`)

A fifth of the stamps is held out: no picture and no caption of theirs, in any language, is tuned on. What is left plays
two parts. From vectors: all that is known of an index are its vectors and translated captions. From texts: all that
is there is a model that reads English, and a table of English captions with their translations. Each gives one model
of six languages, which is measured by searching the held-out pictures.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import lamplit

QUICKSTART, OUT = Path("runs/quickstart"), Path("runs/old_index")
ELSEWHERE = "acme:clip-2021"  # who made the vectors of the old index, by name alone
LANGUAGES = {
    "German": "text_de",
    "Spanish": "text_es",
    "Russian": "text_ru",
    "Hindi": "text_hi",
    "Japanese": "text_ja",
    "Arabic": "text_ar",
}
HELD_OUT = 0.2  # of the stamps


def main() -> None:
    """Make both models that are missing, and print what they find in each language."""
    text_tower = sys.argv[1] if len(sys.argv) > 1 else "demo:minilm"
    if not (QUICKSTART / "stamps.lance").exists():
        subprocess.run([sys.executable, Path(__file__).with_name("quickstart.py")], check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    parts = split(lamplit.Store(QUICKSTART / "stamps.lance"))
    english = OUT / "english"  # the model that is there already
    lamplit.tune(parts["train"], english, lamplit.TuneSettings(text_tower="demo:minilm", num_evals=1))
    old = {name: as_vectors(part, name) for name, part in parts.items()}
    tower = text_tower.rpartition(":")[2].replace("/", "-")
    models = {
        "English alone": (english, parts["held_out"]),
        "from vectors": (tune(old["train"], f"vectors-{tower}", text_tower), old["held_out"]),
        "from texts": (tune(teach(english, parts["train"]), f"texts-{tower}", text_tower), parts["held_out"]),
    }
    show(models, text_tower)


def tune(store: Path, name: str, text_tower: str) -> Path:
    """Tune one text tower on all languages; its encoder stays as it is, and its head learns."""
    settings = lamplit.TuneSettings(
        text_tower=text_tower, mode="LL", text_column=",".join(LANGUAGES.values()), num_evals=1
    )
    lamplit.tune(store, OUT / name, settings)
    return OUT / name


def as_vectors(store: Path, name: str) -> Path:
    """Make the old index: vectors of a tower that nobody can open, with captions."""
    out = OUT / f"{name}-vectors.lance"
    if not out.exists():
        lamplit.export_vectors(store, OUT / f"{name}-vectors")
        lamplit.import_vectors(OUT / f"{name}-vectors", out, image_tower=ELSEWHERE)
    return out


def teach(english: Path, store: Path) -> Path:
    """Write a table of texts alone, and embed its English ones with the model that reads English."""
    table, out = OUT / "translations.jsonl", OUT / "taught.lance"
    if not out.exists():
        rows = [
            {"english": row["texts"], **{column: row[column] for column in LANGUAGES.values()}}
            for row in lamplit.Store(store).rows()
        ]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        lamplit.embed_texts(english, table, out, text_column="english")
    return out


def split(store: lamplit.Store) -> dict[str, Path]:
    """Copy the store twice; stamps that share a picture or a caption in any language are in one copy."""
    rows = store.rows()
    names: dict[str, int] = {}
    links = [
        (number, names.setdefault(f"{column}: {text.casefold()}", len(names)))
        for number, row in enumerate(rows)
        for column in ("hash", "texts", *LANGUAGES.values())
        for text in ([row[column]] if isinstance(row[column], str) else row[column] or [])
    ]
    left, right = np.array(links).T
    size = len(rows) + len(names)
    graph = coo_array((np.ones(len(links)), (left, right + len(rows))), shape=(size, size))
    group = connected_components(graph, directed=False)[1][: len(rows)]
    order = np.random.default_rng(0).permutation(np.unique(group))
    reached = np.cumsum([(group == each).sum() for each in order])
    held_out = set(order[reached <= HELD_OUT * len(rows)].tolist())
    ids = {"train": [row["id"] for row, each in zip(rows, group.tolist(), strict=True) if each not in held_out]}
    ids["held_out"] = sorted({row["id"] for row in rows} - set(ids["train"]))
    return {name: copy(store, name, kept) for name, kept in ids.items()}


def copy(store: lamplit.Store, name: str, ids: Collection[str]) -> Path:
    """Copy some rows of a store."""
    out = OUT / f"{name}.lance"
    if not out.exists():
        shutil.copytree(store.path, out)
        kept = set(ids)
        lamplit.Store(out).delete([row["id"] for row in store.rows() if row["id"] not in kept])
    return out


def show(models: dict[str, tuple[Path, Path]], text_tower: str) -> None:
    """Print how many captions find their held-out picture among the first five."""
    languages = {"English": "texts", **LANGUAGES}
    found: dict[str, list[str]] = {language: [] for language in languages}
    pictures = dict.fromkeys(languages, 0)
    for folder, store in models.values():
        model = lamplit.load(folder, towers="text")
        for language, column in languages.items():
            [result] = lamplit.evaluate(model, store, split="all", text_column=column)
            pictures[language] = result.images
            found[language].append(f"{result.metrics['text_to_image/recall@5'].value:.3f}")
    title = f"held-out captions that find their picture among the first five; {text_tower}"
    table = Table("captions in", *models, "chance", "pictures", title=title)
    for language, recalls in found.items():
        table.add_row(language, *recalls, f"{5 / pictures[language]:.3f}", str(pictures[language]))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
