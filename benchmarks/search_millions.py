"""Search among ten million vectors: those of a real store, each with noisy copies, in a store that this script makes.

Three kinds of query, each by itself: images of the real store, words by a model tuned on it, and near copies of rows.
Printed are recall@10 against the exact product, seconds of one query, of 100 at once, and to make the files of search.

    python benchmarks/search_millions.py STORE MODEL [--images 10000000] [--folder FOLDER] [--quick]

Vectors are turned at random into 512 dimensions, words by the same turn. It takes about 3 KB of disk an image. With
--folder the store that is made stays there, and a second call measures on it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import scale
import timing
from pyarrow import parquet
from timing import console, finish, in_turn

import lamplit
from lamplit.retrieval.collection import Collection, open_collection
from lamplit.retrieval.model_reader import as_reader
from lamplit.retrieval.nearest import Found, rank_many
from lamplit.retrieval.recall import recall_of
from lamplit.retrieval.searcher import FIRST
from lamplit.unit_vectors import normalize

WIDTH, SAMPLE, AT_ONCE, BLOCK = 512, 100, 100, 65536
NOISE, LITTLE = 0.6, 0.2  # length of the noise of a copy, and of a near copy, where the vector has 1


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        turn = np.random.default_rng(0).standard_normal((lamplit.Store(options.store).tower.width, WIDTH), np.float32)
        rows = normalize(lamplit.Store(options.store).vectors().numpy() @ turn)
        store = folder / "copies.lance"
        figures = []
        if not store.exists():
            write_copies(folder / "copies.parquet", rows, options.images)
            scale.python(scale.IMPORT, folder / "copies.parquet", store)
            (folder / "copies.parquet").unlink()
            cost = scale.python(scale.DERIVE, store)
            console.print(f"files of search: {cost.seconds:.0f} s, {cost.peak / 1e9:.2f} GB")
            figures.append({"title": "files", **vars(cost)})
        opened = lamplit.Store(store)
        collection = open_collection(opened, lambda zimg: zimg, opened.tower.fingerprint)
        figures += [
            measure(kind, collection, queries, options.turns)
            for kind, queries in kinds_of_queries(options, rows, collection, turn).items()
        ]
    finish(options, figures)


def arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__ or "")
    parser.add_argument("store", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=int, help="10000000, with --quick 60000")
    parser.add_argument("--folder", type=Path, help="where to keep the store that is made; by default nothing is kept")
    options = timing.filled(parser.parse_args())
    options.images = options.images or (60_000 if options.quick else 10_000_000)
    return options


def write_copies(file: Path, rows: np.ndarray, count: int) -> None:
    """Parquet of `count` vectors: rows in turn, each under noise of its own."""
    random = np.random.default_rng(1)
    schema = pa.schema({"id": pa.string(), "vector": pa.list_(pa.float16(), WIDTH)})
    with parquet.ParquetWriter(file, schema, compression="none") as writer:
        for start in range(0, count, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, count))
            made = noisy(rows[numbers % len(rows)], NOISE, random).astype(np.float16)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(made.reshape(-1)), WIDTH)
            writer.write_table(pa.table({"id": [f"{number:09}" for number in numbers], "vector": vectors}, schema))


def noisy(rows: np.ndarray, length: float, random: np.random.Generator) -> np.ndarray:
    noise = random.standard_normal(rows.shape, np.float32) * np.float32(length / WIDTH**0.5)
    return normalize(rows + noise)


def kinds_of_queries(
    options: argparse.Namespace, rows: np.ndarray, collection: Collection, turn: np.ndarray
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    texts = sorted({text for texts in lamplit.Store(options.store).column("texts") for text in texts or ()})
    words = [texts[i] for i in random.choice(len(texts), min(SAMPLE, len(texts)), replace=False)]
    some = np.sort(random.choice(len(collection.vectors), SAMPLE, replace=False))
    zwords = as_reader(options.model).encode_texts(words)
    return {
        "images": rows[random.choice(len(rows), SAMPLE)],
        "words": normalize(zwords @ turn),
        "near copies": noisy(collection.vectors[some].astype(np.float32), LITTLE, random),
    }


def measure(kind: str, collection: Collection, queries: np.ndarray, turns: int) -> dict[str, object]:
    true = rank_many(collection.vectors, queries, 10)
    recall = recall_of([found[:10] for found in one_by_one(collection, queries)], true)
    seconds = in_turn(
        {"one": partial(one_by_one, collection, queries), "at once": partial(at_once, collection, queries)}, turns
    )
    one, many = (statistics.median(seconds[name]) for name in ("one", "at once"))
    milliseconds = 1000 * one / len(queries)
    console.print(f"{kind}: recall@10 {recall:.4f}, {milliseconds:.1f} ms a query, {many:.2f} s for {AT_ONCE} at once")
    return {"title": kind, "recall": recall, "one": one / len(queries), "at once": many}


def one_by_one(collection: Collection, queries: np.ndarray) -> list[Found]:
    return [collection.find(query, FIRST) for query in queries]


def at_once(collection: Collection, queries: np.ndarray) -> list[Found]:
    return collection.find_all(np.resize(queries, (AT_ONCE, queries.shape[1])), FIRST)


if __name__ == "__main__":
    main()
