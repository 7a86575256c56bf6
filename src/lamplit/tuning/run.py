"""Tune two towers to read each other: from the store alone if the image tower is locked, else from its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lamplit.errors import UsageError, kind_of
from lamplit.locations.paths import require_local
from lamplit.store.lance_store import Store, as_store
from lamplit.tuning.building import build_run
from lamplit.tuning.loop import Run
from lamplit.tuning.ranks import join_ranks
from lamplit.tuning.run_folder import claim
from lamplit.tuning.run_logs import require_logs
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
    log_to: Sequence[str] = (),
    progress: bool = False,
) -> TuneReport:
    """Tune a text tower on a store, or both towers on its images, and write the model into the folder `out`.

    Run again with the same settings, it goes on from the last checkpoint, and ends in the same bytes as a run that
    was never interrupted. A finished run is not repeated.

    Started by torchrun, or in a process group of the caller's that serves the CPU too (`cpu:gloo,cuda:nccl`), the
    processes share each batch: every one reads its share of the texts and the vectors of all images, or encodes its
    share of the images if their tower trains. Each has a GPU of its own, if there are any. What is logged, written and
    returned is that of the first. The pairs of a step are the same with any number of processes.

    On the command line: `lamplit tune`.

    Args:
        store: a store that `embed` made, or its path.
        out: the run's folder, with the best model by held-out recall, `log.jsonl`, `curves.png`, `checkpoints/`.
        settings: settings of the run.
        device: torch device; by default the accelerator, if there is one.
        memory_budget: bytes of activations that may be kept in a step; by default half of what is free.
        workers: processes that decode images, if the image tower trains. With any, a script needs
            `if __name__ == "__main__":`.
        log_to: what else than `log.jsonl` the numbers of the run are written to, any of `csv` (`steps.csv` and
            `held_out.csv`), `tensorboard` (the folder `tensorboard`) and `wandb` (Weights & Biases). A run that goes on
            goes on there, too.
        progress: show a bar on stderr.

    Returns:
        What trained, the held-out recall before, during and after, and the proof of the lock.

    Raises:
        StoreError: the store cannot be read.
        UsageError: the folder holds a run with other settings, or there is too little to tune on; or there are several
            processes, and a batch has fewer pairs, or they do not share a disk.
        TowerError: the text tower cannot be opened.
        TuneError: the loss is no longer finite, or the image tower or its images cannot be read.
        MissingExtraError: the library of a tower or of a log is not installed.

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
    require_logs(log_to)
    require_local(out, "a run")
    store = as_store(store)
    out = Path(out).expanduser()
    with join_ranks() as ranks:
        done = ranks.first(lambda: claim(out, store, settings, progress=progress))
        if done is not None:
            return done
        ranks.require_shared(out)
        chosen, progress = ranks.pick_device(device), progress and ranks.is_first
        with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):

            def build() -> Run:
                torch.manual_seed(settings.seed)
                return build_run(store, out, settings, chosen, ranks=ranks, progress=progress)

            return ranks.in_turn(build).go(
                memory_budget=memory_budget, workers=workers, progress=progress, log_to=log_to
            )
