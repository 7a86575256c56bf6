"""Search among a million vectors of width 512: lamplit's bits, the flat product, faiss, usearch and Lance's indexes.

Latency of one query and of 100 at once, seconds to build, memory, recall@10 against the exact product; on real
vectors repeated with noise (the stamps', by the demo tower) and on random ones. Half of the queries are rows of the
collection under a little noise (an image), half under much (cosine 0.3, as words are).

    pip install faiss-cpu usearch
    python benchmarks/search.py [--quick] [--images 1000000]
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import timing
import torch
from timing import compare, console, finish, in_turn
from torch import Tensor
from torch.nn import functional as F

import lamplit
from lamplit.retrieval.bit_planes import BitPlanes
from lamplit.retrieval.kernels import GROUP, sift
from lamplit.retrieval.nearest import in_threads, num_threads, rank_many
from lamplit.retrieval.recall import KINDS, choose_kept, sample_queries

WIDTH, BATCH, SAMPLE = 512, 100, 64
Answer = Callable[[np.ndarray], np.ndarray]  # (Q, D) queries to (Q, 10) rows


def main() -> None:
    options = arguments()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("real", real_rows(options.quick, Path(folder))), ("random", None)):
            figures += measure(options, name, repeated(rows, options.images))
    finish(options, figures)


def arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__ or "")
    parser.add_argument("--images", type=int, help="vectors; 1000000, with --quick 4000")
    parser.add_argument("--without", default="", help="sides to leave out, by commas, such as HNSW (slow to build)")
    options = timing.filled(parser.parse_args())
    options.images = options.images or (4000 if options.quick else 1_000_000)
    return options


def real_rows(quick: bool, folder: Path) -> Tensor:
    """Vectors of the stamps, turned at random into 512 dimensions; the quick ones are of made-up clusters."""
    random = torch.Generator().manual_seed(0)
    if quick:
        return F.normalize(torch.randn(50, WIDTH, generator=random) + 0.5, dim=1)
    out = folder / "stamps.lance"
    lamplit.embed(lamplit.fetch("stamps"), out, image_tower="demo:efficientnet-lite0")
    vectors = lamplit.Store(out).vectors()
    return F.normalize(vectors @ torch.randn(vectors.shape[1], WIDTH, generator=random), dim=1)


def repeated(rows: Tensor | None, size: int) -> np.ndarray:
    """(N, 512) float32 unit vectors: each one of `rows` with 0.6 of its length in noise; or noise alone."""
    random = torch.Generator().manual_seed(1)
    made = np.empty((size, WIDTH), np.float32)
    for start in range(0, size, 65536):
        count = min(65536, size - start)
        noise = torch.randn(count, WIDTH, generator=random)
        if rows is not None:
            noise = rows[torch.randint(len(rows), (count,), generator=random)] + noise * (0.6 / WIDTH**0.5)
        made[start : start + count] = F.normalize(noise, dim=1).numpy()
    return made


def measure(options: Any, name: str, vectors: np.ndarray) -> list[dict[str, Any]]:
    queries = sample_queries(vectors, SAMPLE, seed=1)  # not those it was tuned with
    true = np.stack([found.rows for found in rank_many(vectors, queries, 10)])
    left_out = {side.strip() for side in options.without.split(",")}
    sides: dict[str, Answer] = {}
    figures: dict[str, Any] = {"title": f"{name}: building", "sides": {}}
    for side, build in builders().items():
        if side in left_out:
            continue
        before, began = resident(), time.perf_counter()
        sides[side], megabytes = build(vectors)
        seconds = time.perf_counter() - began
        found = sides[side](queries)
        recalls = [float((found[k::KINDS, :, None] == true[k::KINDS, None, :]).any(1).mean()) for k in range(KINDS)]
        row = {"seconds": seconds, "megabytes": megabytes, "resident": resident() - before}
        figures["sides"][side] = row | {"recall@10": statistics.mean(recalls), "by kind": recalls}
        console.print(
            f"{name}, {side}: built in {seconds:.1f} s, {megabytes:.0f} MB, recall@10 {recalls[0]:.3f} of images, "
            f"{recalls[1]:.3f} as of words, {recalls[2]:.3f} of sums of four images"
        )
    ours = next(iter(sides))
    batch = np.resize(queries, (BATCH, WIDTH))
    turns = {"one query": (SAMPLE if not options.quick else 2, one_by_one), f"{BATCH} at once": (BATCH, together)}
    timed = []
    for title, (unit, way) in turns.items():
        asked = queries[:unit] if way is one_by_one else batch
        runs = {side: way(answer, asked) for side, answer in sides.items()}
        seconds = in_turn(runs, options.turns)
        timed.append(compare(f"{name}, {title}, {len(vectors)} x {WIDTH}; s a query", seconds, ours=ours, unit=unit))
    if "flat product (torch)" in sides:
        alone = first_sieve(vectors, batch, options.turns)
        flat = timed[-1]["sides"]["flat product (torch)"]["median"]
        timed[-1]["limit"] = flat / alone
        console.print(
            f"limit, if the bits of all signs were counted and nothing else done: {flat / alone:.2f}x of torch"
        )
    return [figures, *timed]


def one_by_one(answer: Answer, queries: np.ndarray) -> Callable[[], None]:
    def run() -> None:
        for query in queries:
            answer(query[None])

    return run


def together(answer: Answer, queries: np.ndarray) -> Callable[[], object]:
    return lambda: answer(queries)


def builders() -> dict[str, Callable[[np.ndarray], tuple[Answer, float]]]:
    """How each side is built: what answers queries then, and how many megabytes it holds."""
    return {
        "lamplit": lamplit_bits,
        "flat product (numpy)": flat_numpy,
        "flat product (torch)": flat_torch,
        "faiss flat": lambda vectors: faiss_index("Flat", vectors),
        "faiss SQ8": lambda vectors: faiss_index("SQ8", vectors),
        "faiss IVF-SQ8": lambda vectors: faiss_index(f"IVF{max(4, round(len(vectors) ** 0.5))},SQ8", vectors),
        "faiss HNSW": lambda vectors: faiss_index("HNSW32", vectors),
        "usearch i8": usearch_index,
        **{f"Lance {kind}": partial(lance_index, kind) for kind in ("IVF_RQ", "IVF_PQ", "IVF_HNSW_SQ")},
    }


def lamplit_bits(vectors: np.ndarray) -> tuple[Answer, float]:
    """What a store's search files hold: float16 vectors and two bits of each component, and what gives the recall."""
    halves = torch.from_numpy(vectors).half().numpy()
    planes = BitPlanes.of(halves)
    kept, _ = choose_kept(halves, planes)
    console.print(f"lamplit: of {len(halves)} rows {kept[0]} are looked at closer, {kept[1]} multiplied")

    def answer(queries: np.ndarray) -> np.ndarray:
        return np.stack([found.rows for found in planes.find_all(halves, queries, 10, kept)])

    return answer, (planes.signs.nbytes + planes.seconds.nbytes + halves.nbytes) / 1e6


def first_sieve(vectors: np.ndarray, queries: np.ndarray, turns: int) -> float:
    """Seconds a query of the first sieve alone, through which nothing passes."""
    planes = BitPlanes.of(vectors)
    random = np.random.default_rng(0)
    count, words = len(queries), planes.signs.shape[1]
    signs, weights = (random.integers(0, 2**64, shape, np.uint64) for shape in ((count, words), (count, 3, words)))

    def look(start: int, stop: int) -> None:
        some, room = slice(start * GROUP, stop * GROUP), np.empty((2, count, 1024), np.uint32)
        nothing, found = np.zeros(count, np.uint64), np.empty(count, np.int64)
        sift(planes.signs[start:stop], planes.seconds[some], np.empty(0, bool), signs, weights, nothing, *room, found)

    return statistics.median(in_turn({"": lambda: in_threads(look, len(planes.signs), 1024)}, turns)[""]) / count


def flat_numpy(vectors: np.ndarray) -> tuple[Answer, float]:
    """OpenBLAS, which takes all threads for one query, too."""

    def answer(queries: np.ndarray) -> np.ndarray:
        scores = (vectors @ queries[0])[None] if len(queries) == 1 else queries @ vectors.T
        best = np.argpartition(scores, -10, axis=1)[:, -10:]
        order = np.take_along_axis(scores, best, 1).argsort(1)[:, ::-1]
        return np.take_along_axis(best, order, 1)

    return answer, vectors.nbytes / 1e6


def flat_torch(vectors: np.ndarray) -> tuple[Answer, float]:
    """MKL, whose product with one query has one thread."""
    rows = torch.from_numpy(vectors)

    def answer(queries: np.ndarray) -> np.ndarray:
        scores = rows @ torch.from_numpy(queries[0]) if len(queries) == 1 else torch.from_numpy(queries) @ rows.T
        return torch.topk(scores.reshape(len(queries), -1), 10).indices.numpy()

    return answer, vectors.nbytes / 1e6


def faiss_index(kind: str, vectors: np.ndarray) -> tuple[Answer, float]:
    import faiss

    faiss.omp_set_num_threads(num_threads())
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:100_000])
    index.add(vectors)
    if kind.startswith("IVF"):
        index.nprobe = 32
    if kind.startswith("HNSW"):
        index.hnsw.efSearch = 128
    return (lambda queries: index.search(queries, 10)[1]), len(faiss.serialize_index(index)) / 1e6


def usearch_index(vectors: np.ndarray) -> tuple[Answer, float]:
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="ip", dtype="i8", expansion_search=128)
    index.add(np.arange(len(vectors)), vectors, threads=num_threads())

    def answer(queries: np.ndarray) -> np.ndarray:
        found = index.search(queries, 10, threads=num_threads())
        return np.asarray(found.keys, dtype=np.int64).reshape(len(queries), -1)

    return answer, index.memory_usage / 1e6


def lance_index(kind: str, vectors: np.ndarray) -> tuple[Answer, float]:
    """Look at as many partitions as faiss does, and rank ten times as many rows as are wanted by their own vectors."""
    import lance

    folder = Path(tempfile.mkdtemp(prefix="lance-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = lance.write_dataset(pa.table({"vector": values, "row": np.arange(len(vectors))}), folder / "rows.lance")
    table.create_index(
        "vector", index_type=kind, metric="dot", num_partitions=max(2, round(len(vectors) ** 0.5)),
        **({"num_sub_vectors": vectors.shape[1] // 8} if kind == "IVF_PQ" else {}),
    )  # fmt: skip
    table = lance.dataset(folder / "rows.lance")

    def answer(queries: np.ndarray) -> np.ndarray:
        found = [
            table.to_table(
                columns=["row", "_distance"],
                nearest={"column": "vector", "q": query, "k": 10, "nprobes": 32, "refine_factor": 10},
            )["row"].to_numpy()
            for query in queries
        ]
        return np.stack([np.pad(rows, (0, 10 - len(rows)), constant_values=-1) for rows in found])

    size = sum(file.stat().st_size for file in (folder / "rows.lance" / "_indices").rglob("*") if file.is_file())
    return answer, size / 1e6


def resident() -> float:
    """Megabytes that this process holds now."""
    return float(psutil.Process().memory_info().rss) / 1e6


if __name__ == "__main__":
    main()
