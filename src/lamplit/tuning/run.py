"""Tune two towers to read each other: from the store alone if the image tower is locked, else from its images."""

from __future__ import annotations

from pathlib import Path

import torch

from lamplit.errors import UsageError, kind_of
from lamplit.store.lance_store import Store, as_store
from lamplit.towers.devices import pick_device
from lamplit.tuning.building import build_run
from lamplit.tuning.run_folder import claim
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.tune_report import TuneReport


def tune(
    store: str | Path | Store,
    out: str | Path,
    settings: TuneSettings,
    *,
    device: str | None = None,
    memory_budget: int | None = None,
    workers: int = 0,
    progress: bool = False,
) -> TuneReport:
    """Tune a text tower on a store, or both towers on its images, and write the model into the folder `out`.

    Run again with the same settings, it goes on from the last checkpoint, and ends in the same bytes as a run that
    was never interrupted. A finished run is not repeated.

    On the command line: `lamplit tune`.

    Args:
        store: a store that `embed` made, or its path.
        out: the run's folder, with the best model by held-out recall, `log.jsonl`, `curves.png`, `checkpoints/`.
        settings: settings of the run.
        device: torch device; by default the accelerator, if there is one.
        memory_budget: bytes of activations that may be kept in a step; by default half of what is free.
        workers: processes that decode images, if the image tower trains. With any, a script needs
            `if __name__ == "__main__":`.
        progress: show a bar on stderr.

    Returns:
        What trained, the held-out recall before, during and after, and the proof of the lock.

    Raises:
        StoreError: the store cannot be read.
        UsageError: the folder holds a run with other settings, or there is too little to tune on.
        TowerError: the text tower cannot be opened.
        TuneError: the loss is no longer finite, or the image tower or its images cannot be read.

    Example:
        >>> settings = lamplit.TuneSettings("demo:minilm", epochs=5)
        >>> report = lamplit.tune("stamps.lance", "runs/stamps", settings)
        >>> report.best["image_to_text/recall@1"]
    """
    if not isinstance(settings, TuneSettings):
        raise UsageError(
            f"settings is {kind_of(settings)}; type lamplit.tune(store, out, lamplit.TuneSettings("
            f"{settings if isinstance(settings, str) else 'demo:minilm'!r}, epochs=5))"
        )
    store = as_store(store)
    out = Path(out)
    done = claim(out, store, settings, progress=progress)
    if done is not None:
        return done
    chosen = pick_device(device)
    with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        run = build_run(store, out, settings, chosen, progress=progress)
        return run.go(memory_budget=memory_budget, workers=workers, progress=progress)
