"""CPU seconds of a whole `lamplit search MODEL STORE "words"`: the process from its start to its end, hits printed.

Once as it is after a model was tuned, with `text_tower.onnx` in its folder, and once with torch, as it is without that
file; MiniLM and a store of 10,000 made-up vectors of width 1280. What vectors and models say does not matter for time;
that both ways give the same hits is checked.

    python benchmarks/start.py [--quick]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import arguments, compare, console, finish
from torch.nn import functional as F

import lamplit
from lamplit.exports.text_graph import write_words
from lamplit.model import LiT
from lamplit.store.table.rows import Row
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.model_folder import TEXT_GRAPH

WIDTH, WORDS = 1280, "an old red bicycle"


def main() -> None:
    options = arguments(__doc__ or "")
    images = 200 if options.quick else 10_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store, models = prepare(folder, images)
        require_same(*(search(model, store)[1] for model in models.values()))  # and the disk's cache is warm
        cpu: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.turns):
            for name, model in models.items():
                cpu[name].append(search(model, store)[0])
    title = f"CPU seconds of a search by words among {images:,} images, first result"
    finish(options, [compare(title, cpu, ours="lamplit") | {"images": images}])


def prepare(folder: Path, images: int) -> tuple[Path, dict[str, Path]]:
    """A store, and the same model with and without what reads words without torch."""
    torch.manual_seed(0)
    tower = TowerIdentity.of_imported("made up", WIDTH)
    vectors = F.normalize(torch.randn(images, WIDTH), dim=1)
    rows = [Row(f"{i:06}", f"{i}.png", f"hash{i}", [f"text {i}"], vector) for i, vector in enumerate(vectors)]
    lamplit.Store.create(folder / "some.lance", tower, rows, backend="imported").finish()
    LiT(lamplit.open_text_tower("demo:minilm", width=WIDTH), tower).save(folder / "model")
    assert write_words(folder / "model")
    shutil.copytree(folder / "model", folder / "with torch")
    (folder / "with torch" / TEXT_GRAPH).write_bytes(b"")  # as where it was tried in vain
    console.print(f"{TEXT_GRAPH}: {(folder / 'model' / TEXT_GRAPH).stat().st_size / 1e3:.0f} kB")
    return folder / "some.lance", {"lamplit": folder / "model", "lamplit with torch": folder / "with torch"}


def search(model: Path, store: Path) -> tuple[float, list[dict[str, Any]]]:
    """Search in a process of its own; return user and system seconds of it and its threads, and the hits."""
    code = "from lamplit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "search", str(model), str(store), WORDS, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    process.stdout.close()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, "the search failed; see above"
    return used.ru_utime + used.ru_stime, json.loads(printed)


def require_same(hits: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Hits of both ways are the same, in the same order, to 1e-4."""
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in others]
    assert max(abs(hit["score"] - other["score"]) for hit, other in zip(hits, others, strict=True)) < 1e-4


if __name__ == "__main__":
    main()
