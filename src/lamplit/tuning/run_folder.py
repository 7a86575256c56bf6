"""The folder of a run: what it is a run of, and whether it is finished."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lamplit.errors import UsageError
from lamplit.files import write_text
from lamplit.store.lance_store import Store
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.tune_report import TuneReport


def claim(out: Path, store: Store, settings: TuneSettings) -> TuneReport | None:
    """Note in the run's folder what it is a run of; return the report if that run is finished."""
    content = {
        "store": store.path if "://" in store.path else str(Path(store.path).resolve()),
        "images": len(store),
        "tower": store.tower.fingerprint,
        **asdict(settings),
    }
    file = out / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [f"{k} was {before.get(k)!r} and is {content[k]!r}" for k in content if before.get(k) != content[k]]
        if changed:
            raise UsageError(f"{out} holds a run with other settings: {'; '.join(changed)}. Give another --out")
        if (out / "report.json").is_file():
            return TuneReport(**json.loads((out / "report.json").read_text()))
    elif (out / "config.json").is_file():
        raise UsageError(f"{out} holds a model that is not a run of lamplit tune; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=2) + "\n")
    return None


def settings_of_run(model: Path, store: str) -> TuneSettings | None:
    """Return the settings of the run that left `model`, if it was tuned on `store`."""
    file = model / "settings.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text())
    where = Path(values.pop("store"))
    del values["images"], values["tower"]
    return TuneSettings(**values) if where.resolve() == Path(store).resolve() else None
