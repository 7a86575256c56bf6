"""Describe a model or a store, without loading weights or vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lamplit.data.split_record import PARTS, SplitRecord
from lamplit.data.tables.text_columns import count_texts
from lamplit.errors import UsageError
from lamplit.model import LiT, load
from lamplit.store.arrays.derived import is_exact, measured_recall
from lamplit.store.lance_store import Store
from lamplit.store.table.store_metadata import OF_TEXTS
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.model_folder import read_config, saved_folder
from lamplit.towers.published.big_vision import Published

_LOOKED_AT = 50  # rows of a store, for a few that have texts
_SHOWN = 200  # characters of a text


def describe(path: str | Path | LiT | Store) -> dict[str, Any]:
    """Describe a model or a store.

    On the command line: `lamplit info`.

    Args:
        path: path of a model or a store, `lit:NAME_OR_FILE` of a published model, `hf:NAME_OR_FOLDER` of a model of
            another library (which is opened), or an open model or store.

    Returns:
        Names and values, in the order in which `lamplit info` prints them.

    Raises:
        UsageError: there is neither a model nor a store, or a model's config.json is damaged.
        TowerError: the model of another library cannot be read.

    Example:
        >>> lamplit.describe("stamps.lance")["images"]
        701
    """
    if isinstance(path, LiT):
        return _describe_open(path)
    if isinstance(path, Store):
        return _describe_store(path)
    if str(path).startswith("lit:"):
        return _describe_published(Published(str(path)))
    folder = saved_folder(path)
    if folder is None:
        return _describe_open(load(path, device="cpu")) | {"model": str(path)}
    if (folder / "config.json").is_file():
        return _describe_model(folder) | {"model": str(path)}
    if Store.exists(path):
        return _describe_store(Store(path))
    raise UsageError(f"{path} is neither a model (a folder with config.json) nor a store (made by lamplit embed)")


def _describe_model(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    image: TowerIdentity = config["image_tower"]
    text = config["text_tower"]
    report = folder / "report.json"
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    recall, test = found.get("best", {}), found.get("test", {})
    return {
        "model": str(folder),
        "image tower": image.spec,
        **_fingerprint(image),
        "text tower": text["spec"] if text else "none",
        "text head": _text_head(text.get("anchors"), text.get("layers")) if text else "none",
        "width": image.width,
        "pooling": _pooling(image.pool),
        "context length": text["context_length"] if text else "none",
        "centred": config["center"] is not None,
        "files": ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))),
        **_tuned_on(SplitRecord.find(folder)),
        **{f"held-out {name}": _figure(name, value) for name, value in recall.items()},
        **{f"test {name}": _figure(name, value) for name, value in test.items()},
    }


def _describe_open(model: LiT) -> dict[str, Any]:
    text = model.text_tower
    return {
        "model": model.name,
        "image tower": model.identity.spec,
        **_fingerprint(model.identity),
        "text tower": "none" if text is None else text.spec,
        "text head": "none" if text is None else _text_head(**text.head_facts()),
        "width": model.width,
        "pooling": _pooling(model.identity.config.get("pool")),
        "context length": "none" if text is None else text.context_length,
        "centred": model.center is not None,
        **_tuned_on(model.tuned_on),
        "device": str(model.device),
    }


def _text_head(anchors: int | None = None, layers: dict[str, Any] | None = None) -> str:
    if layers is not None:
        return "two layers, {hidden_width} wide, with {activation} between them".format(**layers)
    return "linear" if anchors is None else f"kernel, {anchors:,} known texts"


def _describe_published(published: Published) -> dict[str, Any]:
    image, text = published.layout.image, published.layout.text
    kind = "BERT" if text.pooling == "cls" else "the paper's own"
    return {
        "model": published.spec,
        "file": str(published.file),
        "image tower": "ViT, {num_layers} layers of width {width}, patches of {patch_size}".format(**image.config),
        "text tower": f"{kind}, width {text.width}",
        "vocabulary": text.vocab_size,
        "width": image.width,
        "image size": "x".join(map(str, published.preprocessing.image_size)),
        "parameters": sum(math.prod(shape) for shape in published.layout.expected().values()),
        "logit scale": round(published.logit_multiplier, 4),
    }


def _describe_store(store: Store) -> dict[str, Any]:
    preprocessing = store.tower.preprocessing
    num_texts, shown = 0, list[str]()
    for batch in store.batches("path", "texts"):
        num_texts += count_texts(batch["texts"])
        if not shown:
            some = batch.slice(0, _LOOKED_AT).to_pylist()
            shown = [f"{row['path']}: {_cut(row['texts'][0])}" for row in some if row["texts"]]
    return {
        "store": store.path,
        "images": len(store),
        "texts": num_texts,
        "image tower": store.tower.spec,
        **_fingerprint(store.tower),
        "width": store.tower.width,
        "pooling": _pooling(store.tower.pool),
        "backend": store.backend,
        **({"vectors": "of texts, by the text tower of a model"} if store.backend == OF_TEXTS else {}),
        "centred": store.centered,
        "image size": "x".join(map(str, preprocessing.image_size)) if preprocessing else "unknown",
        "search": "exact" if is_exact(store) else _recall(measured_recall(store)),
        "metadata columns": ", ".join(store.metadata_columns) or "none",
        "some pairs": "\n".join(shown[:3]),
    }


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _tuned_on(record: SplitRecord | None) -> dict[str, str]:
    """Say what a model was tuned on, and what was held out."""
    if record is None:
        return {}
    words = {"train": "tuned on", "held_out": "held out, and the best checkpoint chosen by", "test": "kept for a test"}
    return {
        words[part]: f"{len(record.captions(part)):,} captions, {len(record.contents(part)):,} images"
        for part in PARTS
        if len(record.captions(part))
    }


def _figure(name: str, value: float) -> float:
    return int(value) if name.endswith("/median_rank") and value == int(value) else value


def _pooling(pool: str | None) -> str:
    return "the tower's own" if pool is None else pool


def _recall(recall: float | None) -> str:
    if recall is None:
        return "not measured yet; the first search does"
    return f"recall@10 {recall:.3f}"


def _fingerprint(tower: TowerIdentity) -> dict[str, Any]:
    imported = {"vectors": "imported; the fingerprint is of the tower's name and width"} if tower.imported else {}
    return {"fingerprint": tower.fingerprint, **imported}
