"""What `tune` holds in memory does not grow with the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from lamplit.store.table.store_metadata import StoreMetadata
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.texts.scratch import train_sentencepiece

WIDTH, BLOCK = 64, 20_000
LIMIT = 64  # bytes a pair more
HELD_OUT = 400  # captions of each store, so that both are measured on as many
# glibc and Arrow give memory back at once, so that it is not counted when nothing holds it any more.
GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
# Resident memory that is no file's, sampled by a thread until the first step begins.
SCRIPT = """
import json, sys, threading, time
import lamplit
from lamplit.tuning.loop import Run

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

samples = [anonymous()]

def watch():
    while True:
        samples.append(anonymous())
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()

def stop(run, step, memory_budget):
    print(json.dumps(max(samples)), flush=True)
    raise SystemExit

Run._step = stop
options = {"batch_size": 256, "steps": 1, "closed_form": False, "val_fraction": float(sys.argv[4])}
lamplit.tune(sys.argv[1], sys.argv[2], lamplit.TuneSettings(f"scratch:tiny@{sys.argv[3]}", mode="Lu", **options))
"""


def captions(random: np.random.Generator, size: int) -> list[str]:
    return [" ".join(f"word{number}" for number in row) for row in random.integers(0, 3000, (size, 4)).tolist()]


def write_large_store(path: Path, size: int) -> None:
    """Write a store of imported vectors, block by block."""
    schema = StoreMetadata(TowerIdentity.of_imported("made-up", WIDTH), "imported", False).schema({})
    random = np.random.default_rng(0)

    def blocks() -> Iterator[pa.RecordBatch]:
        for start in range(0, size, BLOCK):
            ids = pa.array([f"images/{number:08}.jpg" for number in range(start, start + BLOCK)])
            texts = captions(random, BLOCK)
            lists = pa.ListArray.from_arrays(pa.array(np.arange(BLOCK + 1, dtype=np.int32)), pa.array(texts))
            vectors = random.standard_normal((BLOCK, WIDTH), np.float32)
            halves = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
            vector = pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), WIDTH)
            yield pa.record_batch([ids, ids, ids, lists, vector], schema=schema)

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, blocks()), str(path))


def peak(path: Path, out: Path, vocabulary: Path, size: int) -> int:
    """Return the bytes that `tune` holds at most until its first step."""
    command = [sys.executable, "-c", SCRIPT, path, out, vocabulary, str(HELD_OUT / size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVES_BACK)
    return int(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what is anonymous memory, only Linux tells")
def test_memory_of_tune_hardly_grows_with_the_store(tmp_path: Path) -> None:
    sizes = 200_000, 800_000
    # To train one, sentencepiece holds up to a million captions; more than that change nothing.
    vocabulary = tmp_path / "words.model"
    vocabulary.write_bytes(train_sentencepiece(captions(np.random.default_rng(1), 3000)).model)
    for size in sizes:
        write_large_store(tmp_path / f"{size}.lance", size)

    def grown(start: str) -> float:
        """Bytes a pair more."""
        peaks = [peak(tmp_path / f"{size}.lance", tmp_path / f"{start}-{size}", vocabulary, size) for size in sizes]
        return (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])

    assert grown("first") < LIMIT
    # Threads hold more at one time than at another, above all beside other work: the least of three counts.
    assert any(grown(f"later{number}") < LIMIT for number in range(3))
