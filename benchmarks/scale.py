"""Millions of pairs: seconds and peak memory of each command, on data that this script makes.

Memory is resident *anonymous* memory: RssAnon of /proc/PID/status, of the command and its children together, sampled
20 times a second. Pages of mapped files are not in it; the system takes them back when it needs them. Linux only.

    python benchmarks/scale.py [--quick] [--pairs 1000000] [--width 512] [--only import,tune] [--folder FOLDER]

With --folder what is made stays there, and a second call measures on it. It takes
about 6 bytes of disk a number (10,000,000 x 512: 31 GB, all commands).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import lance
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import timing
import timm
from PIL import Image
from pyarrow import parquet
from rich.table import Table
from safetensors.torch import save_file
from timing import console, finish

import lamplit

TOWER, BLOCK, WORDS, CENTERS = "made:up", 65536, 11, 1000
MORE, COPIES = 100_000, 379_454
STEPS = 5  # of a run whose steps are timed, without the first
PICTURES, LINKS = 100, 400  # files, and links to their own folder in it: two of these in a path make 16 million names
PICTURE_TOWER = "test_vit"
CODE = "import sys, lamplit; "
IMPORT = f"{CODE}print(lamplit.import_vectors(sys.argv[1], sys.argv[2], image_tower={TOWER!r}))"
EXPORT = f"{CODE}lamplit.export_vectors(sys.argv[1], sys.argv[2])"
DERIVE = f"{CODE}from lamplit.retrieval.collection import prepare; prepare(lamplit.Store(sys.argv[1]))"
MAIN = "from lamplit.cli.main import main; main()"


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds by the clock and of all processors, and the most anonymous memory, in bytes."""

    seconds: float
    cpu: float
    peak: int


def main() -> None:
    parser = timing.parser(__doc__ or "")
    parser.add_argument("--pairs", type=int, help="1000000, with --quick 3000")
    parser.add_argument("--width", type=int, help="numbers of a vector; 512, with --quick 32")
    parser.add_argument("--only", default=",".join(TASKS), help=f"some of {', '.join(TASKS)}, by commas")
    parser.add_argument("--folder", type=Path, help="where to keep what is made; by default nothing is kept")
    parser.add_argument("--icons", type=Path, help="a store for `duplicates`, instead of a made one")
    options = timing.filled(parser.parse_args())
    options.pairs = options.pairs or (3000 if options.quick else 1_000_000)
    options.width = options.width or (32 if options.quick else 512)
    table = Table("", "s", "CPU s", "peak MB", "rows a second", title=f"{options.pairs:,} pairs, D = {options.width}")
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        for name in options.only.split(","):
            for title, rows, cost in TASKS[name.strip()](options):
                rate = rows / cost.seconds
                table.add_row(title, f"{cost.seconds:.1f}", f"{cost.cpu:.1f}", f"{cost.peak / 1e6:.0f}", f"{rate:,.0f}")
                console.print(f"{title}: {cost.seconds:.1f} s, {cost.peak / 1e6:.0f} MB")
                figures.append({"title": title, "rows": rows, **vars(cost)})
    console.print(table)
    finish(options, figures)


Measured = Iterator[tuple[str, int, Cost]]


def run_import(options: argparse.Namespace) -> Measured:
    source, out = pairs_file(options), options.folder / "pairs.lance"
    shutil.rmtree(out, ignore_errors=True)
    yield "import", options.pairs, python(IMPORT, source, out)
    yield "search's files", options.pairs, python(DERIVE, out)


def run_more(options: argparse.Namespace) -> Measured:
    """Rows onto a copy of the store, whose files are linked: Lance writes new ones."""
    count = min(MORE, options.pairs)
    source, store = options.folder / "more.parquet", options.folder / "more.lance"
    write_pairs(source, count, options.width, seed=1)
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(imported(options), store, copy_function=os.link)
    yield f"import {count:,} more", count, python(IMPORT, source, store)
    yield f"search's files after {count:,} more", count, python(DERIVE, store)
    yield f"tune, first start after {count:,} more", options.pairs + count, first_step(options, store)
    shutil.rmtree(store)


def run_again(options: argparse.Namespace) -> Measured:
    """Embed a table of names that all lead to few files, into a store that has them all."""
    table, store, seconds = embedded(options)
    cost = command("embed", table, "--out", store, *tower(options))
    yield "embed again, nothing new", options.pairs, cost
    reading = options.pairs * seconds
    console.print(f"to read and hash the files alone takes {reading:.1f} s of that on one core")


def run_export(options: argparse.Namespace) -> Measured:
    out = options.folder / "exported"
    shutil.rmtree(out, ignore_errors=True)
    yield "export", options.pairs, python(EXPORT, imported(options), out)
    shutil.rmtree(out)


def run_info(options: argparse.Namespace) -> Measured:
    yield "info", options.pairs, command("info", imported(options))


def run_search(options: argparse.Namespace) -> Measured:
    small, model = options.folder / "small.lance", options.folder / "small_run"
    if not model.exists():
        write_pairs(options.folder / "small.parquet", 2000, options.width, seed=2)
        shutil.rmtree(small, ignore_errors=True)
        python(IMPORT, options.folder / "small.parquet", small)
        command("tune", small, "--out", model, "--text-tower", "scratch:tiny", "--steps", "2", "--batch-size", "64")
    python(DERIVE, imported(options))
    words = next(captions(1, seed=0))[0].as_py()
    yield "search, first hit", options.pairs, command("search", model, imported(options), words)


def run_duplicates(options: argparse.Namespace) -> Measured:
    store, count = options.icons, min(COPIES, options.pairs)
    if store is None:
        store = options.folder / "copies.lance"
        if not store.exists():
            write_pairs(options.folder / "copies.parquet", count, options.width, seed=3, spread=0.3)
            python(IMPORT, options.folder / "copies.parquet", store)
    count = len(lamplit.Store(store))
    code = f"{CODE}print(len(lamplit.find_duplicates(sys.argv[1])), 'groups')"
    yield f"duplicates among {count:,}", count, python(code, store)


def run_tune(options: argparse.Namespace) -> Measured:
    """A first start derives files, and a later one reads them."""
    store = imported(options)
    for title in ("tune, first start", "tune, later start"):
        yield title, options.pairs, first_step(options, store)


def run_steps(options: argparse.Namespace) -> Measured:
    """Steps on all pairs, and on a store of 100,000, in turn."""
    few = min(MORE, options.pairs // 10)
    source, small = options.folder / "few.parquet", options.folder / "few.lance"
    write_pairs(source, few, options.width, seed=4)
    shutil.rmtree(small, ignore_errors=True)
    python(IMPORT, source, small)
    sides: dict[int, list[Cost]] = {options.pairs: [], few: []}
    for _ in range(options.turns):
        for pairs, store in ((options.pairs, imported(options)), (few, small)):
            sides[pairs].append(steps(options, store))
    for pairs, costs in sides.items():
        cost = sorted(costs, key=lambda cost: cost.seconds)[len(costs) // 2]
        yield f"a step of {batch_size(options)} pairs, of {pairs:,}", batch_size(options), cost
    ratio = statistics.median(a.seconds / b.seconds for a, b in zip(*sides.values(), strict=True))
    console.print(f"a step on {options.pairs:,} pairs takes {ratio:.2f} times that on {few:,}")


def first_step(options: argparse.Namespace, store: Path) -> Cost:
    """To the first line of `log.jsonl`, which follows the first step."""
    out = options.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    cost = command("tune", store, "--out", out, *tuning(options), "--epochs", "1", until=out / "log.jsonl")
    shutil.rmtree(out, ignore_errors=True)
    return cost


def steps(options: argparse.Namespace, store: Path) -> Cost:
    """Median seconds of a step, after some that warm up, and what the whole run took otherwise."""
    out = options.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    cost = command("tune", store, "--out", out, *tuning(options), "--steps", str(STEPS), "--num-evals", "1")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines if "loss" in line]
    shutil.rmtree(out)
    between = [later - earlier for earlier, later in itertools.pairwise(times)][1:]
    return Cost(statistics.median(between), cost.cpu, cost.peak)


def tuning(options: argparse.Namespace) -> list[str]:
    return ["--text-tower", "scratch:tiny", "--batch-size", str(batch_size(options))]


def batch_size(options: argparse.Namespace) -> int:
    return 64 if options.quick else 8192


TASKS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "import": run_import,
    "more": run_more,
    "again": run_again,
    "export": run_export,
    "info": run_info,
    "search": run_search,
    "duplicates": run_duplicates,
    "tune": run_tune,
    "steps": run_steps,
}


# What is measured


def python(code: str, *arguments: str | Path) -> Cost:
    """Run Python code in a process of its own."""
    return measured([sys.executable, "-c", code, *map(str, arguments)])


def command(*arguments: str | Path, until: Path | None = None) -> Cost:
    """Run `lamplit` in a process of its own, to its end, or until a file has a line."""
    return measured([sys.executable, "-c", MAIN, *map(str, arguments)], until)


def measured(arguments: list[str], until: Path | None = None) -> Cost:
    began = time.perf_counter()
    process = psutil.Popen(arguments)
    peak, cpu, ended = [0], [0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.05):
            with suppress(psutil.NoSuchProcess):
                processes = [process, *process.children(recursive=True)]
                peak[0] = max(peak[0], sum(map(anonymous, processes)))
                cpu[0] = max(cpu[0], sum(map(cpu_seconds, processes)))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        while process.poll() is None and not (until and until.exists() and until.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - began
    finally:
        ended.set()
        sampler.join()
        if until and process.poll() is None:
            process.terminate()
        process.wait()
    assert until or process.returncode == 0, f"{arguments} failed; see above"
    return Cost(seconds, cpu[0], peak[0])


def anonymous(process: psutil.Process) -> int:
    """Bytes of anonymous memory that a process has now."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


# What it is measured on


def pairs_file(options: argparse.Namespace) -> Path:
    file: Path = options.folder / "pairs.parquet"
    if not file.exists():
        write_pairs(file, options.pairs, options.width)
    return file


def imported(options: argparse.Namespace) -> Path:
    store: Path = options.folder / "pairs.lance"
    if not store.exists():
        python(IMPORT, pairs_file(options), store)
    return store


def write_pairs(file: Path, count: int, width: int, seed: int = 0, spread: float = 1.0) -> None:
    """Parquet of captions and float16 unit vectors around some centres, in a stream."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(9).standard_normal((CENTERS, width), np.float32)
    schema = pa.schema({"image_path": pa.string(), "caption": pa.string(), "vector": pa.list_(pa.float16())})
    with parquet.ParquetWriter(file, schema, use_dictionary=["caption"], compression="zstd") as writer:
        for start, texts in zip(range(0, count, BLOCK), captions(count, seed), strict=True):
            size = len(texts)
            made = random.standard_normal((size, width), np.float32)
            made *= spread
            made += centers[random.integers(CENTERS, size=size)]
            made /= np.linalg.norm(made, axis=1, keepdims=True)
            halves = pa.array(made.astype(np.float16).reshape(-1))
            vectors = pa.ListArray.from_arrays(pa.array(np.arange(size + 1, dtype=np.int32) * width), halves)
            paths = pa.array([f"{seed}/{row:08}.jpg" for row in range(start, start + size)])
            writer.write_table(pa.table([paths, texts, vectors], schema=schema))


def captions(count: int, seed: int) -> Iterator[pa.Array]:
    """Blocks of captions of 11 words, frequent and rare as in a language."""
    syllables = [f"{a}{b}" for a, b in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = pa.array(["".join(each) for each in itertools.islice(itertools.product(syllables, repeat=2), 4900)])
    random = np.random.default_rng(seed)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        chosen = np.minimum(np.exp(random.random((WORDS, size)) * np.log(4900)).astype(np.int64), 4900) - 1
        yield pc.binary_join_element_wise(*(words.take(pa.array(row)) for row in chosen), " ")


def embedded(options: argparse.Namespace) -> tuple[Path, Path, float]:
    """A table of many names of few files, the store of it, and the seconds that reading and hashing one file takes."""
    folder, out = options.folder.absolute() / "pictures", options.folder / "again.lance"
    table, small = folder / "pairs.parquet", options.folder / "pictures.lance"
    if not out.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_pictures(folder)
        write_names(table, PICTURES)
        command("embed", table, "--out", small, *tower(options))
        write_names(table, options.pairs)
        rows = lance.dataset(str(small)).to_table().sort_by("id").combine_chunks()
        lamplit.Store.write(out, rows.schema, repeated(rows, table))
        python(DERIVE, out)
    files = sorted(folder.glob("*.png"))
    began = time.perf_counter()
    for file in files * 50:
        blake2b(file.read_bytes(), digest_size=16).hexdigest()
    return table, out, (time.perf_counter() - began) / 50 / len(files)


def tower(options: argparse.Namespace) -> list[str]:
    """Options that name a small tower of random weights, the same in every process."""
    file = options.folder.absolute() / "tower.safetensors"
    if not file.exists():
        save_file(timm.create_model(PICTURE_TOWER, pretrained=False).state_dict(), file)
    return ["--image-tower", f"timm:{PICTURE_TOWER}", "--image-tower-weights", str(file)]


def make_pictures(folder: Path) -> None:
    """Few pictures, and links to their folder, so that each picture has millions of names."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = np.kron(random.integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    for number in range(LINKS):
        (folder / f"{number:03}").symlink_to(".")


def write_names(file: Path, count: int) -> None:
    schema = pa.schema({"image": pa.string(), "text": pa.string()})
    with parquet.ParquetWriter(file, schema) as writer:
        for start, texts in zip(range(0, count, BLOCK), captions(count, seed=0), strict=True):
            rows = range(start, start + len(texts))
            names = [
                f"{row // PICTURES // LINKS:03}/{row // PICTURES % LINKS:03}/{row % PICTURES:02}.png" for row in rows
            ]
            writer.write_table(pa.table([pa.array(names), texts], schema=schema))


def repeated(rows: pa.Table, table: Path) -> Iterator[pa.RecordBatch]:
    """The rows of the pictures again, under the names and with the texts of a table."""
    [vectors] = rows["vector"].chunks
    for batch in parquet.ParquetFile(table).iter_batches(BLOCK):
        picture = pc.utf8_slice_codeunits(batch["image"], -6, -4).cast(pa.int64())
        columns = {
            "id": batch["image"],
            "path": pc.binary_join_element_wise(str(table.parent), batch["image"], "/"),
            "hash": rows["hash"].combine_chunks().take(picture),
            "texts": pa.ListArray.from_arrays(pa.array(np.arange(len(batch) + 1, dtype=np.int32)), batch["text"]),
            "vector": vectors.take(picture),
        }
        yield pa.record_batch([columns[name] for name in rows.schema.names], schema=rows.schema)


if __name__ == "__main__":
    main()
