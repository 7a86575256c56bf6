"""The loop of a run: steps, evaluations and checkpoints, to the report."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamplit.errors import TuneError
from lamplit.files import write_text
from lamplit.model import LiT, restore, save_image_tower
from lamplit.progress import progress_bar
from lamplit.store.arrays.row_vectors import RowVectors
from lamplit.towers.devices import keep_freed_memory
from lamplit.tuning.batches import Batches
from lamplit.tuning.checkpoint import cut_log, load_checkpoint, open_log, save_checkpoint, trained_tensors
from lamplit.tuning.curves import draw_curves
from lamplit.tuning.head.head_fit import HeadFit
from lamplit.tuning.head.scale_fit import model_loss
from lamplit.tuning.interrupts import whole_steps
from lamplit.tuning.large_batch import Part, SparseEmbeddings, backward_in_chunks
from lamplit.tuning.optimizers import gradient_norm, set_rates, step_clipped
from lamplit.tuning.permutation import WINDOW
from lamplit.tuning.ranks import Ranks
from lamplit.tuning.run_logs import open_run_logs
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.sides import ImageSide, TextSide
from lamplit.tuning.split import Links, held_out_recall
from lamplit.tuning.tune_report import TuneReport

logger = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 600.0  # at most this much work is lost when the process is killed
_CHANCE_LOSS_FRACTION = 0.98  # above this fraction of ln(batch size) a model guesses


@dataclass
class RunState:
    """How far a run is; kept in its checkpoint."""

    step: int = 0
    best: float = -1.0  # mean recall of the model that was saved
    best_step: int = 0
    stale: int = 0  # evaluations since then
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)  # metrics before the first step
    in_windows: bool = False  # the order of the pairs, see Batches
    mean_loss: float | None = None  # moving average
    skipped: dict[str, str] = field(default_factory=dict)  # see ImageSide


@dataclass
class Run:
    """A tuning run, from its first step or its last checkpoint.

    Attributes:
        head_fit: how the head is fitted, with what the steps hold in place or leave out for it.
        zimg: (N, D) unit vectors of all rows of the store.
        image_ids: (N,) numbers of the rows' contents; equal images have one.
        ranks: the processes that take each step together; the first of them logs and writes.
    """

    out: Path
    settings: TuneSettings
    device: torch.device
    model: LiT
    optimizer: torch.optim.Optimizer
    train: Links
    held_out: Links
    test: Links
    head_fit: HeadFit
    zimg: RowVectors
    image_ids: Tensor
    batches: Batches
    image_side: ImageSide
    text_side: TextSide
    report: TuneReport
    ranks: Ranks
    state: RunState = field(default_factory=RunState)

    @property
    def kept(self) -> nn.Module:
        """What a checkpoint holds: the model, and the names or what is left out with it if there are any."""
        beside = {"names": self.head_fit.names, "left_out": self.head_fit.left_out}
        given = {name: module for name, module in beside.items() if module is not None}
        return nn.ModuleDict({"lit": self.model, **given}) if given else self.model

    @cached_property
    def _embeddings(self) -> SparseEmbeddings:
        return SparseEmbeddings(self.model)

    def go(self, *, memory_budget: int | None, workers: int, progress: bool, log_to: Sequence[str] = ()) -> TuneReport:
        """Take all steps that are left; return the report."""
        checkpoint, seconds = self.out / "checkpoints" / "last.safetensors", 0.0
        has_begun = self.ranks.first(checkpoint.is_file)
        if has_begun:
            self.state = RunState(**load_checkpoint(checkpoint, self.kept, self.optimizer))
        self.image_side.skipped = self.state.skipped  # one record, which checkpoints hold
        if has_begun:
            if self._goes_on:
                self.head_fit.recover()
            seconds = self.ranks.first(lambda: cut_log(self.out / "log.jsonl", self.state.step))
        else:
            self._start(progress)
        self.batches.in_windows = self.state.in_windows
        if self.device.type == "cpu":
            keep_freed_memory()
        self.image_side.open(self.batches, self.state.step, workers)
        started, begun = time.monotonic() - seconds, self.state.step
        total_steps = self.batches.total_steps
        with (
            progress_bar("tune", total_steps, shown=progress) as advance,
            self._open_log(log_to) as log,
            whole_steps(wanted=self.ranks.size == 1) as is_stopped,
        ):
            advance(self.state.step, "")
            saved = time.monotonic()
            for step in range(self.state.step, total_steps):
                if self._out_of_patience():
                    break
                for first, last in self.batches.coming(step, is_first=step == begun):
                    self.zimg.expect(first, last)
                line = self._step(step, memory_budget)
                log(line | {"seconds": round(time.monotonic() - started, 3)})
                self.state.step = step + 1
                if (step + 1) % self.batches.eval_every == 0 or step + 1 == total_steps:
                    metrics = self._evaluate(step + 1)
                    log({"step": step + 1, "held_out": metrics})
                    saved = -CHECKPOINT_SECONDS  # after a measurement one is always due
                stops = is_stopped()
                if self.ranks.is_first and (stops or time.monotonic() - saved >= CHECKPOINT_SECONDS):
                    save_checkpoint(checkpoint, self.kept, self.optimizer, asdict(self.state))
                    saved = time.monotonic()
                if stops:
                    raise KeyboardInterrupt
                advance(1, self._note(line))
        self.image_side.require_lock()
        self.text_side.require_lock()
        return self._finish(time.monotonic() - started)

    def _start(self, progress: bool) -> None:
        """Choose the order of the pairs, initialise the head, and measure held-out recall before any step."""
        self.ranks.first(lambda: (self.out / "log.jsonl").unlink(missing_ok=True))
        self.state.in_windows = self.ranks.first(
            lambda: not self.settings.image_trains and self.zimg.is_larger_than_memory
        )
        if self.state.in_windows:
            logger.info(
                "the vectors, %.1f GB, do not fit into half of the free memory: pairs are shuffled in windows of %d",
                self.zimg.nbytes / 1e9, WINDOW,
            )  # fmt: skip
        assert self.model.text_tower is not None
        # The store's vectors do not come from an image tower from scratch, and a published head is trained already.
        trained = self.model.text_tower.trained_scale is not None
        fits = self.settings.starts_in_closed_form and not trained
        metrics = self.ranks.first(partial(self._fit_start, progress)) if fits else None
        self.ranks.copy(trained_tensors(self.kept).values())
        if self._goes_on:
            self.head_fit.recover()
        self.state.start = metrics = self._evaluate(0, metrics)
        with self._open_log() as log:
            log(
                {"step": 0, "held_out": metrics, "closed_form": fits}
                | ({"in_windows": True} if self.state.in_windows else {})
            )
        if metrics:
            head = "the closed-form head" if fits else "the published head" if trained else "an untrained head"
            logger.info(
                "before step 0, %s gives image_to_text/recall@1 %.3f and recall@5 %.3f on held-out captions",
                head, metrics["image_to_text/recall@1"], metrics["image_to_text/recall@5"],
            )  # fmt: skip

    def _fit_start(self, progress: bool) -> dict[str, float]:
        """Fit the head, and return held-out recall; the other processes wait for this one."""
        measure = partial(self._measure, self.held_out, Ranks())
        return self.head_fit.start(
            self.held_out, measure, mode=self.settings.mode_used, goes_on=self._goes_on, progress=progress
        )

    @property
    def _goes_on(self) -> bool:
        return self.state.step < self.batches.total_steps

    def _step(self, step: int, memory_budget: int | None) -> dict[str, Any]:
        """Take one step, counted from 0; return its line of the log."""
        began = time.monotonic()
        rates = set_rates(self.optimizer, step, self.batches.total_steps, self.settings.warmup_ratio)
        rows, ranks = self.batches.rows(step), self.ranks
        if ranks.size > 1:  # what a process drops must not depend on the steps that it took before
            torch.manual_seed(self.batches.seed(step, ranks.rank))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        images, kept = self.image_side.part(self.train.image_index[rows], step)
        rows = rows[kept]
        texts = self.train.text_index[rows]
        image_ids = self.image_ids[self.train.image_index[rows]].to(self.device)
        own = ranks.deal(self.text_side.lengths(texts))
        contrast = partial(
            model_loss, self.model, image_ids=image_ids, text_ids=texts.to(self.device), rows=own,
            exchange=ranks.exchange if ranks.size > 1 else None,
        )  # fmt: skip
        with self._embeddings:
            loss = backward_in_chunks(
                *self._with_names(images, texts[own], contrast, step), device=self.device, memory_budget=memory_budget,
                sharers=ranks.local_size if self.device.type == "cpu" else 1,
            )  # fmt: skip
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        loss = ranks.add_up(trained, loss)
        norm = float(gradient_norm(trained))
        value = float(loss)
        if not math.isfinite(value) or not math.isfinite(norm):
            raise TuneError(
                f"the loss is {value} and the gradient's norm {norm} in step {step + 1}, at learning rate "
                f"{rates['lr']:.1e} and logit scale {float(self.model.logit_multiplier.detach()):.1f}; nothing of this "
                f"step was kept. Lower --lr (it peaks at {self.settings.lr:.0e}) or give more --warmup-ratio, "
                "with another --out"
            )
        step_clipped(self.optimizer, norm, self.settings.grad_clip)
        self._warn_if_guessing(step, value)
        return {
            "step": step + 1,
            "epoch": round(self.batches.epochs(step + 1), 3),
            "loss": value,
            **rates,
            "logit_scale": float(self.model.logit_multiplier.detach()),
            "grad_norm": norm,
            "pairs_per_second": round(len(rows) / (time.monotonic() - began), 1),
        }

    def _with_names(
        self, images: Part | Tensor, texts: Tensor, contrast: Callable[[Tensor, Tensor], Tensor], step: int
    ) -> tuple[list[Part | Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """Return both sides of a step and its loss: that of the pairs, and what keeps the names in their places."""
        if (names := self.head_fit.names) is None:
            return [images, self.text_side.part(texts)], contrast
        drawn = names.draw(self.batches.batch_size, self.batches.seed(step, 0))
        own = drawn[self.ranks.rank :: self.ranks.size]

        def loss(zimg: Tensor, ztxt: Tensor) -> Tensor:
            kept = names.loss(ztxt[len(texts) :], own, self.model.logit_multiplier, len(drawn))
            return contrast(zimg, ztxt[: len(texts)]) + kept

        return [images, self.text_side.part(texts, [names.tokens[name] for name in own.tolist()])], loss

    def _evaluate(self, step: int, metrics: dict[str, float] | None = None) -> dict[str, float]:
        """Measure held-out recall, if it is not known; save the model if it is the best so far.

        A head that does not train is fitted again before.
        """
        if self.head_fit.left_out is not None and step:
            self.head_fit.again(self.ranks, goes_on=self._goes_on)
        metrics = self._measure(self.held_out, self.ranks) if metrics is None else metrics
        score = metrics.get("mean_recall", float(step))  # if nothing is held out, the last model is the best
        state = self.state
        if score > state.best:
            state.best, state.best_step, state.stale, state.best_metrics = score, step, 0, metrics
            self.ranks.first(lambda: self.model.save(self.out))
        else:
            state.stale += 1
        state.last_metrics = metrics
        return metrics

    def _measure(self, links: Links, ranks: Ranks) -> dict[str, float]:
        if not len(links):
            return {}
        ztxt = ranks.encode(self.model.encode_texts, links.texts, self.model.identity.width)

        def recall() -> dict[str, float]:
            zimg, seen = self.image_side.vectors(links)
            return held_out_recall(zimg, ztxt, seen)

        return ranks.first(recall)

    def _finish(self, seconds: float) -> TuneReport:
        report, state = self.report, self.state
        report.start, report.best, report.last = state.start, state.best_metrics, state.last_metrics
        report.best_step, report.steps, report.seconds = state.best_step, state.step, round(seconds, 2)
        report.fingerprint_after = self.image_side.fingerprint()
        if len(self.test):
            self.ranks.first(lambda: restore(self.model, self.out))  # the best checkpoint
            self.ranks.copy(trained_tensors(self.kept).values())
            report.test = self._measure(self.test, self.ranks)
        if state.start and state.step and state.best_step == 0:
            logger.info(
                "no step made held-out recall better than the start, which is kept: its mean recall is %.3f, and %.3f "
                "after the last step. With few pairs the closed form is often the best there is; more pairs would help",
                state.best, state.last_metrics["mean_recall"],
            )  # fmt: skip
        report.skipped = self.ranks.merge(self.image_side.skipped)
        if report.skipped:
            logger.warning("%s", self.image_side.skipped_note())
        return self.ranks.first(partial(self._write_report, report))

    def _write_report(self, report: TuneReport) -> TuneReport:
        if self.image_side.tower is not None and not self.settings.image_trains:
            save_image_tower(self.image_side.tower, self.out)  # one that trains was saved with the best model
        draw_curves(self.out / "log.jsonl", self.out / "curves.png")
        write_text(self.out / "report.json", json.dumps(asdict(report), indent=2) + "\n")
        return report

    @contextmanager
    def _open_log(self, log_to: Sequence[str] = ()) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Open `log.jsonl` and, beside it, logs of other kinds; only the first process writes."""
        if not self.ranks.is_first:
            yield lambda _: None
            return
        with (
            open_log(self.out / "log.jsonl") as write,
            open_run_logs(self.out, log_to, asdict(self.settings)) as follow,
        ):

            def log(line: dict[str, Any]) -> None:
                write(line)
                follow(line)

            yield log

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and len(self.held_out) > 0 and self.state.stale >= patience

    def _note(self, line: dict[str, Any]) -> str:
        note = f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  scale {line['logit_scale']:.1f}"
        metrics = self.state.last_metrics
        recall = f"  recall@1 {metrics['image_to_text/recall@1']:.3f}" if metrics else ""
        return f"{note}  {line['pairs_per_second']:.0f} pairs/s{recall}"

    def _warn_if_guessing(self, step: int, loss: float) -> None:
        """Warn once if after a quarter of the run the loss is still that of guessing."""
        before = loss if self.state.mean_loss is None else self.state.mean_loss
        mean = self.state.mean_loss = 0.9 * before + 0.1 * loss
        size = self.batches.batch_size
        guessing = math.log(size)
        is_due = self.settings.loss == "softmax" and step + 1 == max(20, self.batches.total_steps // 4)
        if is_due and mean > _CHANCE_LOSS_FRACTION * guessing:
            logger.warning(
                "after %d steps the loss is %.2f; guessing among %d pairs gives ln(%d) = %.2f, so the text tower has "
                "learnt nothing yet. Check that texts and images belong together (lamplit info STORE shows some), "
                "then try a learning rate three times higher or lower than %.0e",
                step + 1, mean, size, size, guessing, self.settings.lr,
            )  # fmt: skip
