"""Tune a text tower to read a locked image tower, from the store: no picture is opened."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamplit.engines import best_device, has_fast_bf16
from lamplit.errors import LamplitError, TuneError, UsageError
from lamplit.losses import sigmoid_loss, softmax_loss
from lamplit.model import LiT, save_image_tower
from lamplit.optimizers import build_optimizer, warmup_cosine
from lamplit.progress import progress_bar
from lamplit.store import Store
from lamplit.towers.image import ImageTower, open_image_tower
from lamplit.towers.text import open_text_tower
from lamplit.tuning.checkpoint import cut_log, load_checkpoint, open_log, save_checkpoint, write_whole
from lamplit.tuning.curves import draw_curves
from lamplit.tuning.head_start import fit_head
from lamplit.tuning.large_batch import backward_in_chunks
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import held_out_recall, split_store

logger = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 600.0  # at most this much work is lost when the process is killed
STUCK = 0.98  # of ln(batch): what a model that only guesses loses


@dataclass
class TuneReport:
    """What a finished run says of itself; `report.json` in its folder."""

    out: str
    mode: str
    image_tower: str
    text_tower: str
    training_pairs: int
    held_out_pairs: int
    held_out_captions: int
    trains: dict[str, dict[str, float | str]]
    truncated_texts: int
    start: dict[str, float] = field(default_factory=dict)  # held-out recall before the first step
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    fingerprint_before: str = ""
    fingerprint_after: str = ""  # of the locked tower, computed again from its weights after the last step


def tune(
    store: str | Path | Store,
    out: str | Path,
    settings: TuneSettings,
    *,
    device: str | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
) -> TuneReport:
    """Tune a text tower on a store and leave the model in the folder `out`.

    Run again with the same settings it goes on from the last checkpoint, to the same bytes as a run that was
    never interrupted; a finished run is not repeated.

    Args:
        store: what `embed` made.
        out: the run's folder: the best model by held-out recall, `log.jsonl`, `curves.png`, `checkpoints/`.
        settings: the run's dials.
        device: torch device; by default the accelerator, if there is one.
        memory_budget: bytes of activations that may be kept in a step; by default half of what is free.
        progress: show a bar on stderr.

    Raises:
        StoreError: the store cannot be read.
        UsageError: the folder holds a run with other settings, or there is too little to tune on.
        TuneError: the loss is no longer finite.
    """
    store = store if isinstance(store, Store) else Store(store)
    out = Path(out)
    done = _claim(out, store, settings)
    if done is not None:
        return done
    where = torch.device(device) if device else best_device()
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        run = _Run(store, out, settings, where, memory_budget)
        return run.run(progress)


class _Run:
    """One tuning run, from the first step or from its last checkpoint."""

    def __init__(
        self, store: Store, out: Path, settings: TuneSettings, device: torch.device, memory_budget: int | None
    ) -> None:
        self.out, self.settings, self.device, self.memory_budget = out, settings, device, memory_budget
        self.zimg = store.vectors(store.center)
        hashes = {content: number for number, content in enumerate(dict.fromkeys(store.column("hash")))}
        self.image_ids = torch.tensor([hashes[content] for content in store.column("hash")])
        self.train, self.held_out = split_store(store, settings.text_column, settings.held_out, settings.seed)
        self.batch_size = min(settings.batch_size, len(self.train))
        self.steps_per_epoch = len(self.train) // self.batch_size
        self.total_steps = max(1, round(settings.epochs * self.steps_per_epoch))
        self.eval_every = max(1, math.ceil(self.total_steps / settings.evaluations))
        text_tower = open_text_tower(
            settings.text,
            width=store.tower.width,
            texts=self.train.texts,
            context_length=settings.context_length,
            pretrained=settings.pretrained_text,
        )
        self.image_tower = _reopen(store)
        bias = None if settings.loss == "softmax" else -math.log(self.batch_size - 1)
        self.model = LiT(text_tower, store.tower, center=store.center, logit_bias=bias).to(device)
        self.tower = text_tower
        self.tokens = text_tower.tokenize(self.train.texts)
        self.optimizer = build_optimizer(
            settings.optimizer, self.model, lr=settings.peak_lr, weight_decay=settings.weight_decay
        )
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)  # pairs of one epoch, shuffled
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
                if (step + 1) % self.eval_every == 0 or step + 1 == self.total_steps:
                    metrics = self._evaluate(step + 1)
                    log({"step": step + 1, "held_out": metrics})
                    saved = -CHECKPOINT_SECONDS  # after a measurement one is always due
                if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    save_checkpoint(checkpoint, self.model, self.optimizer, self.state)
                    saved = time.monotonic()
                advance(1, self._note(line))
        return self._finish(time.monotonic() - started)

    def _start(self) -> None:
        """Fit the head, and measure where that leads before any step."""
        (self.out / "log.jsonl").unlink(missing_ok=True)
        if self.settings.head_start:
            chosen = self.train.text_index
            texts = [self.train.texts[i] for i in chosen.tolist()]
            class_head = None if self.image_tower is None else self.image_tower.class_head
            fit_head(self.tower, self.zimg[self.train.picture_index], texts, class_head)
        metrics = self._evaluate(0)
        self.state["start"] = metrics
        with open_log(self.out / "log.jsonl") as log:
            log({"step": 0, "held_out": metrics, "head_start": self.settings.head_start})
        if metrics:
            origin = "the head start alone" if self.settings.head_start else "an untrained head"
            logger.info(
                "before step 0, %s gives image_to_text/recall@1 %.3f and recall@5 %.3f on held-out captions",
                origin, metrics["image_to_text/recall@1"], metrics["image_to_text/recall@5"],
            )  # fmt: skip

    def _step(self, step: int) -> dict[str, Any]:
        began = time.monotonic()
        warmup_steps = round(self.settings.warmup * self.total_steps)
        # The first step of the paper's schedule has rate 0; counting from 1 puts it to use.
        factor = warmup_cosine(step + 1, warmup_steps=warmup_steps, total_steps=self.total_steps + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.peak_lr * factor
        rows = self._batch(step)
        pictures, texts = self.train.picture_index[rows], self.train.text_index[rows]
        zimg = self.zimg[pictures].to(self.device)
        ids = {"image_ids": self.image_ids[pictures].to(self.device), "text_ids": texts.to(self.device)}
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = backward_in_chunks(
            self._encode, [self.tokens[i] for i in texts.tolist()], partial(self._loss, zimg, ids),
            device=self.device, memory_budget=self.memory_budget,
        )  # fmt: skip
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.grad_clip)
        value = float(loss)
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            scale = float(self.model.logit_scale.detach())
            raise TuneError(
                f"the loss is {value} and the gradient's norm {float(norm)} in step {step + 1}, at learning rate "
                f"{self.settings.peak_lr * factor:.1e} and logit scale {scale:.1f}; nothing of this step was kept. "
                f"Lower --lr (it peaks at {self.settings.peak_lr:.0e}) or give more --warmup, with another --out"
            )
        self.optimizer.step()
        self._warn_if_stuck(step, value)
        return {
            "step": step + 1,
            "epoch": round((step + 1) / self.steps_per_epoch, 3),
            "loss": value,
            "lr": self.settings.peak_lr * factor,
            "logit_scale": float(self.model.logit_scale.detach()),
            "grad_norm": float(norm),
            "pairs_per_second": round(len(rows) / (time.monotonic() - began), 1),
        }

    def _batch(self, step: int) -> Tensor:
        """Rows of one step; they depend on the seed and the step alone, so a resumed run sees the same."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.epoch != epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.train), generator=generator)
        return self.order[place * self.batch_size : (place + 1) * self.batch_size]

    def _encode(self, tokens: list[list[int]]) -> Tensor:
        with self._precision():
            vectors: Tensor = self.tower(tokens)
        return vectors

    def _precision(self) -> AbstractContextManager[Any]:
        bf16 = self.settings.precision == "bf16" or (self.settings.precision == "auto" and has_fast_bf16(self.device))
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def _loss(self, zimg: Tensor, ids: dict[str, Tensor], ztxt: Tensor) -> Tensor:
        if self.model.logit_bias is None:
            return softmax_loss(zimg, ztxt, self.model.logit_scale, **ids)
        return sigmoid_loss(zimg, ztxt, self.model.logit_scale, self.model.logit_bias, **ids)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Measure held-out recall; keep the model if it is the best so far."""
        metrics: dict[str, float] = {}
        if self.held_out.texts:
            metrics = held_out_recall(self.zimg, self.model.encode_texts(self.held_out.texts), self.held_out)
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
        if report.fingerprint_after != report.fingerprint_before:
            raise TuneError(
                f"the locked image tower changed: its fingerprint was {report.fingerprint_before} and is "
                f"{report.fingerprint_after}. This is a defect of lamplit; please report it"
            )
        if self.image_tower is not None:
            save_image_tower(self.image_tower, self.out)
        draw_curves(self.out / "log.jsonl", self.out / "curves.png")
        write_whole(self.out / "report.json", json.dumps(asdict(report), indent=2) + "\n")
        return report

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and bool(self.held_out.texts) and self.state["stale"] >= patience

    def _fingerprint(self) -> str:
        return "" if self.image_tower is None else self.image_tower.identity().fingerprint

    def _note(self, line: dict[str, Any]) -> str:
        note = f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  scale {line['logit_scale']:.1f}"
        metrics = self.state["last_metrics"]
        recall = f"  recall@1 {metrics['image_to_text/recall@1']:.3f}" if metrics else ""
        return f"{note}  {line['pairs_per_second']:.0f} pairs/s{recall}"

    def _warn_if_stuck(self, step: int, loss: float) -> None:
        """Say in plain words, once, when a quarter into the run the model still only guesses."""
        mean = self.state["mean_loss"] = 0.9 * self.state.get("mean_loss", loss) + 0.1 * loss
        guessing = math.log(self.batch_size)
        if self.settings.loss == "softmax" and step + 1 == max(20, self.total_steps // 4) and mean > STUCK * guessing:
            logger.warning(
                "after %d steps the loss is %.2f; guessing among %d pairs gives ln(%d) = %.2f, so the text tower has "
                "learnt nothing yet. Check that texts and pictures belong together (lamplit info STORE shows some), "
                "then try a learning rate three times higher or lower than %.0e",
                step + 1, mean, self.batch_size, self.batch_size, guessing, self.settings.peak_lr,
            )  # fmt: skip

    def _new_report(self, store: Store) -> TuneReport:
        return TuneReport(
            out=str(self.out),
            mode="LU" if self.settings.pretrained_text else "Lu",
            image_tower=store.tower.spec,
            text_tower=self.settings.text,
            training_pairs=len(self.train),
            held_out_pairs=len(self.held_out),
            held_out_captions=len(self.held_out.texts),
            trains=what_trains(self.model, self.image_tower),
            truncated_texts=self.tower.count_truncated(self.train.texts),
        )


def what_trains(model: LiT, image_tower: ImageTower | None) -> dict[str, dict[str, float | str]]:
    """Parameters and memory of each part, and whether it trains."""
    assert model.text_tower is not None
    scalars = [model.log_scale, *([] if model.logit_bias is None else [model.logit_bias])]
    parts = {
        "image tower": ([] if image_tower is None else list(image_tower.parameters()), "locked"),
        "text tower": (list(model.text_tower.encoder.parameters()), "trains"),
        "text head": (list(model.text_tower.head.parameters()), "trains"),
        "logit scale": (scalars, "trains"),
    }
    table: dict[str, dict[str, float | str]] = {}
    for name, (parameters, state) in parts.items():
        count = sum(parameter.numel() for parameter in parameters)
        copies = 4 if state == "trains" else 1  # weights, gradient and AdamW's two moments
        table[name] = {"state": state, "parameters": count, "megabytes": round(count * 4 * copies / 2**20, 1)}
    return table


def _claim(out: Path, store: Store, settings: TuneSettings) -> TuneReport | None:
    """Note in the run's folder what it is a run of; return the report if that run is finished."""
    content = {
        "store": store.path if "://" in store.path else str(Path(store.path).resolve()),
        "pictures": len(store),
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
    write_whole(file, json.dumps(content, indent=2) + "\n")
    return None


def _reopen(store: Store) -> ImageTower | None:
    """Open the tower that made the store, for its classifier and to save it with the model."""
    identity = store.tower
    if identity.imported:
        logger.info("the vectors were imported, made by %s; the model is saved without an image tower", identity.spec)
        return None
    try:
        tower = open_image_tower(identity.spec, weights=identity.weights, preprocessing=identity.preprocessing)
    except LamplitError as error:
        logger.warning("the image tower %s cannot be opened (%s); the model is saved without it", identity.spec, error)
        return None
    if tower.identity().fingerprint != identity.fingerprint:
        logger.warning(
            "%s is not the tower that made %s any more; the model is saved without it",
            identity.spec,
            store.path,
        )
        return None
    return tower
