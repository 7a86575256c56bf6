"""The folder of a run: which store and settings it belongs to, and whether the run is finished."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError
from lamplit.files import write_text
from lamplit.store.lance_store import Store
from lamplit.tuning.settings import OLD_NAMES, TuneSettings
from lamplit.tuning.tune_report import TuneReport

FORMAT = 1  # of settings.json; the first lamplit wrote none
_OLD_NAMES = OLD_NAMES | {"pictures": "images"}


def claim(out: Path, store: Store, settings: TuneSettings) -> TuneReport | None:
    """Write the store and settings of a run into its folder; return the report if that run is finished.

    Raises:
        UsageError: the folder holds a run with other settings or of a newer lamplit, or another model.
    """
    content = {
        "format": FORMAT,
        "store": store.path if "://" in store.path else str(Path(store.path).resolve()),
        "images": len(store),
        "tower": store.tower.fingerprint,
        **asdict(settings),
    }
    file = out / "settings.json"
    # A run whose towers could not be opened has left its settings alone.
    has_begun = (out / "config.json").is_file() or (out / "checkpoints").is_dir()
    if file.is_file() and has_begun:
        before = read_settings(file)
        changed = [
            f"{key} was {before.get(key)!r} and is {value!r}" for key, value in content.items()
            if before.get(key) != value
        ]  # fmt: skip
        if changed:
            raise UsageError(
                f"{out} holds a run with other settings: {'; '.join(changed)}. Give another --out folder, or delete it"
            )
        if (out / "report.json").is_file():
            return TuneReport(**json.loads((out / "report.json").read_text(encoding="utf-8")))
    elif has_begun:
        raise UsageError(f"{out} holds a model that is not a run of lamplit tune; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=2) + "\n")
    return None


def read_settings(file: Path) -> dict[str, Any]:
    """Read the `settings.json` of a run, an older one under today's names.

    Returns:
        `format`, `store`, `images`, `tower`, and the fields of `TuneSettings`.

    Raises:
        UsageError: the file is damaged, or a newer lamplit wrote it.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is not JSON ({error}); give another --out, or delete the folder") from error
    if values.get("format", FORMAT) > FORMAT:
        raise UsageError(f"{file} has format {values['format']}; this lamplit reads up to {FORMAT}: upgrade it")
    named = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
    known = TuneSettings.__dataclass_fields__.keys() | {"format", "store", "images", "tower"}
    unknown = named.keys() - known
    if unknown:
        raise UsageError(f"{file} has unknown settings {', '.join(sorted(unknown))}; tune again with another --out")
    # A setting that is younger than the file had its default.
    fields = TuneSettings.__dataclass_fields__.items()
    defaults = {name: field.default for name, field in fields if field.default is not MISSING}
    return defaults | named | {"format": FORMAT}


def settings_of_run(model: Path, store: str) -> TuneSettings | None:
    """Return the settings of the run that left `model`, if it was tuned on `store`; else None."""
    file = model / "settings.json"
    if not file.is_file():
        return None
    values = read_settings(file)
    if Path(values["store"]).resolve() != Path(store).resolve():
        return None
    return TuneSettings(**{name: values[name] for name in TuneSettings.__dataclass_fields__})
