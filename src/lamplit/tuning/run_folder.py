"""The folder of a run: which store and settings it belongs to, and whether the run is finished."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError
from lamplit.files import write_text
from lamplit.store.arrays.caption_arrays import read_captions
from lamplit.store.arrays.row_vectors import read_vectors
from lamplit.store.lance_store import Store
from lamplit.tuning.settings import OLD_NAMES, TuneSettings
from lamplit.tuning.tune_report import TuneReport

FORMAT = 4  # of settings.json: 2 has digests of the store's content and its split, 3 kernel heads, 4 other digests
_OLD_NAMES = OLD_NAMES | {"pictures": "images"}
_STORE = {"store", "images", "tower", "pairs", "vectors"}
_OLD = "of an earlier lamplit, which split the pairs or began otherwise"


def claim(out: Path, store: Store, settings: TuneSettings, *, progress: bool = False) -> TuneReport | None:
    """Write the store and settings of a run into its folder; return the report if that run is finished.

    The store is known by what is in it, not by where it lies: it may be moved, copied and compacted.

    Raises:
        UsageError: the folder holds a store, another model, or a run on other pairs, with other settings or of another
            lamplit.
    """
    if out.exists() and (not out.is_dir() or Store.exists(out)):
        kind = "a store" if out.is_dir() else "a file"
        raise UsageError(f"{out} is {kind}, and a run is a folder of its own; give another --out, such as runs/first")
    content = {
        "format": FORMAT,
        "store": store.path if "://" in store.path else str(Path(store.path).resolve()),
        "images": len(store),
        "tower": store.tower.fingerprint,
        "pairs": read_captions(store, settings.text_column, progress=progress).digest,
        "vectors": _vectors_digest(store, progress),
        **asdict(settings),
    }
    file = out / "settings.json"
    # A run whose towers could not be opened has left its settings alone.
    has_begun = (out / "config.json").is_file() or (out / "checkpoints").is_dir()
    before = read_settings(file) if file.is_file() else None  # other programs have files of this name, too
    if before is not None and has_begun:
        _require_settings(out, before, content)
        _require_content(out, before, content, store.path)
        if (out / "report.json").is_file():
            return _read_report(out / "report.json")
        if before["format"] < FORMAT:
            raise UsageError(f"{out} holds a run {_OLD}; it cannot go on. Give another --out, or delete the folder")
    elif has_begun:
        raise UsageError(f"{out} holds a model that is not a run of lamplit tune; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=2) + "\n")
    return None


def _read_report(file: Path) -> TuneReport:
    try:
        return TuneReport(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # not JSON, not an object, or with other fields
        raise UsageError(
            f"{file} is damaged, or a newer lamplit wrote it ({error}); delete it, and the report is made again from "
            "the last checkpoint"
        ) from error


def _require_settings(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in now.items()
        if key in TuneSettings.__dataclass_fields__ and before.get(key) != value
    ]
    if changed:
        raise UsageError(
            f"{out} holds a run with other settings: {'; '.join(changed)}. Give another --out folder, or delete it"
        )


def _require_content(out: Path, before: dict[str, Any], now: dict[str, Any], store: str) -> None:
    changed = []
    digests = before if before["format"] == FORMAT else {}  # earlier ones were made in another way
    if before["images"] != now["images"]:
        changed.append(f"it has {now['images']} images and had {before['images']}")
    elif digests.get("pairs", now["pairs"]) != now["pairs"]:
        changed.append("other texts, images or ids")
    if before["tower"] != now["tower"]:
        changed.append(f"vectors of another image tower ({now['tower']}, not {before['tower']})")
    elif not changed and digests.get("vectors", now["vectors"]) != now["vectors"]:
        changed.append("other vectors")
    if "pairs" not in before and before["store"] != now["store"]:  # all that an earlier lamplit knew of it
        changed.append(f"another path (it was {before['store']})")
    if changed:
        raise UsageError(
            f"{out} holds a run on other pairs: since it began, {store} has changed: {'; '.join(changed)}. Tune "
            "on it as it is now with another --out folder, or delete this one"
        )


def _vectors_digest(store: Store, progress: bool) -> str:
    """Digest the vectors of a store and its centre."""
    digest = read_vectors(store, progress=progress).digest
    if store.center is None:
        return digest
    return blake2b(digest.encode() + store.center.numpy().tobytes(), digest_size=16).hexdigest()


def read_settings(file: Path) -> dict[str, Any]:
    """Read the `settings.json` of a run, an older one under today's names.

    Returns:
        `format`, `store`, `images`, `tower`, `pairs` and `vectors` (not of format 1), and the fields of `TuneSettings`.

    Raises:
        UsageError: the file is damaged, or a newer lamplit wrote it.
    """
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is not JSON ({error}); give another --out, or delete the folder") from error
    if not isinstance(values, dict) or not isinstance(values.get("format", FORMAT), int):
        raise UsageError(f"{file} holds no settings of a run; give another --out, or delete the folder")
    if values.get("format", FORMAT) > FORMAT:
        raise UsageError(f"{file} has format {values['format']}; this lamplit reads up to {FORMAT}: upgrade it")
    given: dict[str, Any] = values
    named = {_OLD_NAMES.get(name, name): value for name, value in given.items()}
    known = TuneSettings.__dataclass_fields__.keys() | _STORE | {"format"}
    unknown = named.keys() - known
    if unknown:
        raise UsageError(f"{file} has unknown settings {', '.join(sorted(unknown))}; tune again with another --out")
    # A setting that is younger than the file had its default.
    fields = TuneSettings.__dataclass_fields__.items()
    defaults = {name: field.default for name, field in fields if field.default is not MISSING}
    return {"format": 1} | defaults | named
