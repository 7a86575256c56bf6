"""What a model or a store is, without loading weights or vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError
from lamplit.store import Store
from lamplit.towers.image import TowerIdentity
from lamplit.tuning.settings import TuneSettings


def describe(path: str | Path) -> dict[str, Any]:
    """Describe the model or the store at `path`.

    Raises:
        UsageError: there is neither.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return _describe_model(folder)
    if Store.exists(path):
        return _describe_store(Store(path))
    raise UsageError(f"{path} is neither a model (a folder with config.json) nor a store (made by lamplit embed)")


def settings_of_run(model: Path, store: str) -> TuneSettings | None:
    """Return the settings of the run that left `model`, if it was tuned on `store`."""
    file = model / "settings.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text())
    where = Path(values.pop("store"))
    del values["pictures"], values["tower"]
    return TuneSettings(**values) if where.resolve() == Path(store).resolve() else None


def _describe_model(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    image, text = config["image_tower"], config["text_tower"]
    report = folder / "report.json"
    recall = json.loads(report.read_text())["best"] if report.is_file() else {}
    return {
        "model": str(folder),
        "image tower": image["spec"],
        **_said_of(TowerIdentity.from_dict(image)),
        "text tower": text["spec"] if text else "none",
        "width": image["width"],
        "context length": text["context_length"] if text else "none",
        "centred": config["center"] is not None,
        "files": ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))),
        **{f"held-out {name}": round(value, 4) for name, value in recall.items()},
    }


def _describe_store(store: Store) -> dict[str, Any]:
    texts, preprocessing = store.texts(), store.tower.preprocessing
    shown = [f"{path}: {found[0]}" for path, found in zip(store.column("path")[:50], texts, strict=False) if found]
    return {
        "store": store.path,
        "pictures": len(store),
        "texts": sum(len(found) for found in texts),
        "image tower": store.tower.spec,
        **_said_of(store.tower),
        "width": store.tower.width,
        "engine": store.engine,
        "centred": store.centered,
        "picture size": "x".join(map(str, preprocessing.image_size)) if preprocessing else "unknown",
        "metadata columns": ", ".join(store.metadata_columns) or "none",
        "some pairs": "\n".join(shown[:3]),
    }


def _said_of(tower: TowerIdentity) -> dict[str, Any]:
    made = {"vectors": "imported; the fingerprint is of the tower's name and width"} if tower.imported else {}
    return {"fingerprint": tower.fingerprint, **made}
