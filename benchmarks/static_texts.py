"""Static embeddings beside the encoder that they were distilled from: recall, and seconds to encode and to tune.

    python benchmarks/static_texts.py STORE [--text-tower demo:minilm] [--quick]

STORE is any store with captions, such as the quickstart's stamps.lance. The static text tower is made here as
model2vec does it: each token of the vocabulary is encoded alone, the vectors lose their mean and all but 256 principal
components, and are weighted by how rare their token is (its rank in the vocabulary stands for that). A published one,
such as hf:minishlab/potion-base-8M, has been trained further.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file
from timing import compare, console, filled, finish, in_turn, parser
from torch import Tensor

import lamplit
from lamplit.towers.texts.text_tower import open_text_tower

COMPONENTS, RARITY = 256, 1e-4
EPOCHS = 20


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("store", type=Path)
    options.add_argument("--text-tower", default="demo:minilm")
    chosen = filled(options.parse_args())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        distil(chosen.text_tower, folder / "static", 2000 if chosen.quick else None)
        towers = {"static": f"hf:{folder / 'static'}", chosen.text_tower: chosen.text_tower}
        tried = [(spec, mode) for spec in towers.values() for mode in ("LU", "LL")]
        rows = [
            tune(chosen.store, spec, folder / f"run-{number}", mode, chosen.quick)
            for number, (spec, mode) in enumerate(tried)
        ]
        show(rows, towers)
        models = {name: lamplit.load(folder / f"run-{2 * side}", device="cpu") for side, name in enumerate(towers)}
        texts = [text for texts in lamplit.Store(chosen.store).texts() for text in texts][:2000]
        sides = {name: lambda model=model: model.encode_texts(texts) for name, model in models.items()}
        seconds = in_turn(sides, chosen.turns)
    speed = compare("seconds a caption", seconds, ours="static", unit=len(texts))
    finish(chosen, [{"runs": rows}, speed])


@torch.no_grad()
def distil(spec: str, folder: Path, most: int | None) -> None:
    """Write the static embeddings of a text tower, as model2vec would save them."""
    tower: Any = open_text_tower(spec, width=1).eval()
    count = len(tower.tokenizer)
    ids = tower.tokenizer.encode(["a"], None)[0]  # one token between those that every text has
    rows = [[*ids[:1], token, *ids[-1:]] for token in range(min(count, most or count))]
    vectors = torch.cat([tower.features(rows[start : start + 1024]) for start in range(0, len(rows), 1024)])
    vectors = reduce(vectors)
    rarity = 1 / torch.arange(2, len(vectors) + 2)
    vectors *= (RARITY / (RARITY + rarity / rarity.sum()))[:, None]
    vectors = torch.cat([vectors, torch.zeros(count - len(vectors), vectors.shape[1])])
    folder.mkdir(parents=True)
    save_file({"embeddings": vectors.contiguous()}, folder / "model.safetensors")
    tower.tokenizer.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec"}))


def reduce(vectors: Tensor) -> Tensor:
    """Subtract the mean, and keep the components with the most variance."""
    centered = vectors - vectors.mean(0)
    values, directions = torch.linalg.eigh(centered.T @ centered)
    return centered @ directions[:, values.argsort(descending=True)[:COMPONENTS]]


def tune(store: Path, spec: str, out: Path, mode: str, quick: bool) -> dict[str, Any]:
    """Tune; return held-out recall and seconds."""
    began = time.perf_counter()
    settings = lamplit.TuneSettings(text_tower=spec, mode=mode, epochs=1 if quick else EPOCHS)
    report = lamplit.tune(store, out, settings, device="cpu")
    seconds = time.perf_counter() - began
    best = {key: value for key, value in report.best.items() if key.endswith("recall@5")}
    return {"mode": mode, "seconds": seconds, "held_out": best, "captions": report.held_out_captions}


def show(rows: list[dict[str, Any]], towers: dict[str, str]) -> None:
    """Print the runs."""
    table = Table("text tower", "mode", "seconds to tune", *rows[0]["held_out"])
    names = [name for name in towers for _ in range(2)]
    for name, row in zip(names, rows, strict=True):
        table.add_row(
            name, row["mode"], f"{row['seconds']:.1f}", *(f"{value:.3f}" for value in row["held_out"].values())
        )
    console.print(table)


if __name__ == "__main__":
    main()
