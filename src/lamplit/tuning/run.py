"""Tune two towers to read each other: with the image tower locked from the store alone, else from its images."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lamplit.errors import TuneError
from lamplit.files import write_text
from lamplit.model import save_image_tower
from lamplit.progress import progress_bar
from lamplit.store.lance_store import Store, as_store
from lamplit.towers.devices import pick_device
from lamplit.tuning.assembly import Assembly
from lamplit.tuning.batches import Batches
from lamplit.tuning.checkpoint import cut_log, load_checkpoint, open_log, save_checkpoint
from lamplit.tuning.closed_form import fit_head
from lamplit.tuning.curves import draw_curves
from lamplit.tuning.large_batch import backward_in_chunks
from lamplit.tuning.run_folder import claim
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.sides import Images
from lamplit.tuning.split import held_out_recall, split_store
from lamplit.tuning.tune_report import TuneReport, what_trains

logger = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 600.0  # at most this much work is lost when the process is killed
STUCK = 0.98  # of ln(batch): what a model that only guesses loses


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
    """Tune a text tower on a store, or both towers on its images, and leave the model in the folder `out`.

    Run again with the same settings it goes on from the last checkpoint, to the same bytes as a run that was
    never interrupted; a finished run is not repeated.

    Args:
        store: what `embed` made.
        out: the run's folder: the best model by held-out recall, `log.jsonl`, `curves.png`, `checkpoints/`.
        settings: the run's dials.
        device: torch device; by default the accelerator, if there is one.
        memory_budget: bytes of activations that may be kept in a step; by default half of what is free.
        workers: processes that decode images, where the image tower trains; with any, a script needs
            `if __name__ == "__main__":`.
        progress: show a bar on stderr.

    Raises:
        StoreError: the store cannot be read.
        UsageError: the folder holds a run with other settings, or there is too little to tune on.
        TuneError: the loss is no longer finite, or the image tower or its images are not there to be tuned.
    """
    store = as_store(store)
    out = Path(out)
    done = claim(out, store, settings)
    if done is not None:
        return done
    where = pick_device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        run = _Run(store, out, settings, where, memory_budget, workers)
        return run.run(progress)


class _Run:
    """One tuning run, from the first step or from its last checkpoint."""

    def __init__(
        self,
        store: Store,
        out: Path,
        settings: TuneSettings,
        device: torch.device,
        memory_budget: int | None,
        workers: int,
    ) -> None:
        self.out, self.settings, self.device = out, settings, device
        self.memory_budget, self.workers = memory_budget, workers
        hashes = store.column("hash")
        numbers = {content: number for number, content in enumerate(dict.fromkeys(hashes))}
        self.image_ids = torch.tensor([numbers[content] for content in hashes])
        self.train, self.held_out = split_store(store, settings.text_column, settings.val_fraction, settings.seed)
        self.batches = Batches(self.train, store.column("path"), settings)
        self.total_steps = self.batches.total_steps
        self.assembly = Assembly(
            store, settings, self.train.texts,
            batch_size=self.batches.batch_size, total_steps=self.total_steps, device=device,
        )  # fmt: skip
        if settings.image_trains:
            self.assembly.require_images(torch.cat([self.train.image_index, self.held_out.image_index]))
        self.model, self.optimizer = self.assembly.model, self.assembly.optimizer
        self.state: dict[str, Any] = {"step": 0, "best": -1.0, "best_step": 0, "stale": 0}
        self.report = self._new_report(store)

    def run(self, progress: bool) -> TuneReport:
        """Go through all steps; return the report."""
        self.report.fingerprint_before = self._fingerprint()
        checkpoint, seconds = self.out / "checkpoints" / "last.safetensors", 0.0
        if checkpoint.is_file():
            self.state = load_checkpoint(checkpoint, self.model, self.optimizer)
            seconds = cut_log(self.out / "log.jsonl", self.state["step"])
        else:
            self._start()
        side = self.assembly.image_side
        if isinstance(side, Images):
            side.open(self.batches.crops(self.state["step"]), self.workers)
        started = time.monotonic() - seconds
        with (
            progress_bar("tune", self.total_steps, shown=progress) as advance,
            open_log(self.out / "log.jsonl") as log,
        ):
            advance(self.state["step"], "")
            saved = time.monotonic()
            for step in range(self.state["step"], self.total_steps):
                if self._out_of_patience():
                    break
                line = self._step(step)
                log(line | {"seconds": round(time.monotonic() - started, 3)})
                self.state["step"] = step + 1
                if (step + 1) % self.batches.eval_every == 0 or step + 1 == self.total_steps:
                    metrics = self._evaluate(step + 1)
                    log({"step": step + 1, "held_out": metrics})
                    saved = -CHECKPOINT_SECONDS  # after a measurement one is always due
                if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    save_checkpoint(checkpoint, self.model, self.optimizer, self.state)
                    saved = time.monotonic()
                advance(1, self._note(line))
        self.assembly.require_lock()
        return self._finish(time.monotonic() - started)

    def _start(self) -> None:
        """Fit the head, and measure where that leads before any step."""
        (self.out / "log.jsonl").unlink(missing_ok=True)
        # The store's vectors say nothing of an image tower from scratch, and a published head needs no start.
        trained = self.assembly.text_tower.trained_scale is not None
        fits = self.settings.closed_form and self.settings.mode[0] != "u" and not trained
        if fits:
            chosen = self.train.text_index
            texts = [self.train.texts[i] for i in chosen.tolist()]
            tower = self.assembly.image_tower
            zimg = self.assembly.zimg[self.train.image_index]
            fit_head(self.assembly.text_tower, zimg, texts, None if tower is None else tower.class_head)
        metrics = self._evaluate(0)
        self.state["start"] = metrics
        with open_log(self.out / "log.jsonl") as log:
            log({"step": 0, "held_out": metrics, "closed_form": fits})
        if metrics:
            origin = "the head start alone" if fits else "the published head" if trained else "an untrained head"
            logger.info(
                "before step 0, %s gives image_to_text/recall@1 %.3f and recall@5 %.3f on held-out captions",
                origin, metrics["image_to_text/recall@1"], metrics["image_to_text/recall@5"],
            )  # fmt: skip

    def _step(self, step: int) -> dict[str, Any]:
        began = time.monotonic()
        rates = self.assembly.set_rates(step)
        rows = self.batches.rows(step)
        if isinstance(self.assembly.image_side, Images):
            rows = rows[self.assembly.image_side.read()]
            if len(rows) < 2:
                raise TuneError(f"fewer than two images of step {step + 1} could be read. {self._skipped_note()}")
        images, texts = self.train.image_index[rows], self.train.text_index[rows]
        ids = {"image_ids": self.image_ids[images].to(self.device), "text_ids": texts.to(self.device)}
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = backward_in_chunks(
            self.assembly.sides(images, texts, step), partial(self.assembly.loss, **ids),
            device=self.device, memory_budget=self.memory_budget,
        )  # fmt: skip
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.settings.grad_clip))
        value = float(loss)
        if not math.isfinite(value) or not math.isfinite(norm):
            raise TuneError(
                f"the loss is {value} and the gradient's norm {norm} in step {step + 1}, at learning rate "
                f"{rates['lr']:.1e} and logit scale {float(self.model.logit_multiplier.detach()):.1f}; nothing of this "
                f"step was kept. Lower --lr (it peaks at {self.settings.peak_lr:.0e}) or give more --warmup-ratio, "
                "with another --out"
            )
        self.optimizer.step()
        self._warn_if_stuck(step, value)
        return {
            "step": step + 1,
            "epoch": round((step + 1) / self.batches.steps_per_epoch, 3),
            "loss": value,
            **rates,
            "logit_scale": float(self.model.logit_multiplier.detach()),
            "grad_norm": norm,
            "pairs_per_second": round(len(rows) / (time.monotonic() - began), 1),
        }

    def _evaluate(self, step: int) -> dict[str, float]:
        """Measure held-out recall; keep the model if it is the best so far."""
        metrics: dict[str, float] = {}
        if self.held_out.texts:
            zimg, links = self.assembly.image_vectors(self.held_out)
            metrics = held_out_recall(zimg, self.model.encode_texts(links.texts), links)
        score = metrics.get("mean_recall", float(step))  # with nothing held out the last model is the best
        if score > self.state["best"]:
            self.state |= {"best": score, "best_step": step, "stale": 0, "best_metrics": metrics}
            self.model.save(self.out)
        else:
            self.state["stale"] += 1
        self.state["last_metrics"] = metrics
        return metrics

    def _finish(self, seconds: float) -> TuneReport:
        report, state = self.report, self.state
        report.start, report.best, report.last = state["start"], state["best_metrics"], state["last_metrics"]
        report.best_step, report.steps, report.seconds = state["best_step"], state["step"], round(seconds, 2)
        report.fingerprint_after = self._fingerprint()
        if isinstance(self.assembly.image_side, Images):
            report.skipped = self.assembly.image_side.skipped
            if report.skipped:
                logger.warning("%s", self._skipped_note())
        elif self.assembly.image_tower is not None:
            save_image_tower(self.assembly.image_tower, self.out)
        draw_curves(self.out / "log.jsonl", self.out / "curves.png")
        write_text(self.out / "report.json", json.dumps(asdict(report), indent=2) + "\n")
        return report

    def _skipped_note(self) -> str:
        assert isinstance(self.assembly.image_side, Images)
        skipped = self.assembly.image_side.skipped
        told = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
        return f"{len(skipped)} images could not be read and were left out ({told}); all are listed in report.json"

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and bool(self.held_out.texts) and self.state["stale"] >= patience

    def _fingerprint(self) -> str:
        tower = self.assembly.image_tower
        return "" if tower is None else tower.identity().fingerprint

    def _note(self, line: dict[str, Any]) -> str:
        note = f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  scale {line['logit_scale']:.1f}"
        metrics = self.state["last_metrics"]
        recall = f"  recall@1 {metrics['image_to_text/recall@1']:.3f}" if metrics else ""
        return f"{note}  {line['pairs_per_second']:.0f} pairs/s{recall}"

    def _warn_if_stuck(self, step: int, loss: float) -> None:
        """Say in plain words, once, when a quarter into the run the model still only guesses."""
        mean = self.state["mean_loss"] = 0.9 * self.state.get("mean_loss", loss) + 0.1 * loss
        guessing = math.log(self.batches.batch_size)
        if self.settings.loss == "softmax" and step + 1 == max(20, self.total_steps // 4) and mean > STUCK * guessing:
            logger.warning(
                "after %d steps the loss is %.2f; guessing among %d pairs gives ln(%d) = %.2f, so the text tower has "
                "learnt nothing yet. Check that texts and images belong together (lamplit info STORE shows some), "
                "then try a learning rate three times higher or lower than %.0e",
                step + 1, mean, self.batches.batch_size, self.batches.batch_size, guessing, self.settings.peak_lr,
            )  # fmt: skip

    def _new_report(self, store: Store) -> TuneReport:
        return TuneReport(
            out=str(self.out),
            mode=self.settings.mode_used,
            image_tower=store.tower.spec,
            text_tower=self.settings.text_tower,
            training_pairs=len(self.train),
            held_out_pairs=len(self.held_out),
            held_out_captions=len(self.held_out.texts),
            trains=what_trains(self.model, self.assembly.image_tower),
            truncated_texts=self.assembly.text_tower.count_truncated(self.train.texts, self.assembly.tokens),
        )
