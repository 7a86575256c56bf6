"""How long the parts of embedding and tuning take on this machine, each measured for some seconds."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lamplit.data.census import SAMPLE, Census
from lamplit.data.pairs import Pair, Pairs
from lamplit.files import replacing
from lamplit.losses.contrastive import softmax_loss
from lamplit.metrics.ranking import retrieval_metrics
from lamplit.store.embed.embedding import embed
from lamplit.towers.devices import keep_freed_memory
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.saving import save_weights
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.building import autocast_of
from lamplit.tuning.head.closed_form import ClosedForm
from lamplit.tuning.head.known_names import SHARE
from lamplit.tuning.head.scale_fit import MOST_REST
from lamplit.tuning.large_batch import Part, SparseEmbeddings, backward_in_chunks, cut_texts
from lamplit.tuning.optimizers import build_optimizer
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.sides import token_features
from lamplit.tuning.split import MAX_HELD_OUT

SECONDS = 4.0  # that the pass takes for each thing it measures, about
_BATCH = 64  # images
STEP = 1024  # pairs of a measured step; larger batches cost in proportion, the loss apart
Item = TypeVar("Item")


def time_embedding(
    pairs: Pairs, census: Census, tower: ImageTower, workers: int, device: torch.device
) -> tuple[str, float, float]:
    """Return the backend, the seconds until it runs, and the seconds an image, from runs over three samples."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(3))

        def run(sample: list[Pair], backend: str, count: int) -> tuple[float, str]:
            part = replace(pairs, count=count, read=lambda: iter(sample))
            report = embed(
                part, Path(folder) / f"{next(numbers)}.lance", image_tower=tower, backend=backend,  # type: ignore[arg-type]
                batch_size=len(few), workers=workers, device=device,
            )  # fmt: skip
            return report.seconds, report.backend

        few = census.sample[:_BATCH]  # a full batch: after another `embed` expects no more images
        _, backend = run(few, "auto", census.images)  # as many as there are decide which backend pays
        second, _ = run(few, backend, len(few))
        many = census.sample[: max(len(few) + 1, min(SAMPLE, round(len(few) * SECONDS / second)))]
        if len(many) <= len(few):
            return backend, 0.0, second / len(few)
        third, _ = run(many, backend, len(many))
        an_image = max(third - second, 0.0) / (len(many) - len(few))
        return backend, max(second - an_image * len(few), 0.0), an_image


def time_texts(tower: TextTower, texts: list[str]) -> float:
    """Return the seconds that a text takes in a forward pass, by as many as fit into the time."""
    sample = texts[:256]
    ClosedForm(tower, sample[:16], None)  # warms up
    seconds, _ = timed(lambda: ClosedForm(tower, sample, None))
    more = texts[: min(len(texts), round(len(sample) * SECONDS / seconds))]
    if len(more) > len(sample):
        seconds, sample = timed(lambda: ClosedForm(tower, more, None))[0], more
    return seconds / len(sample)


def time_fits(tower: TextTower, texts: int, *, is_left_out: bool) -> tuple[float, float, float]:
    """Return the seconds of the fits of a head to random features: for the scale, to all, and to leave each out."""
    fit, index = ClosedForm(tower, [""], None), torch.arange(texts)
    fit.features = torch.randn(texts, tower.head.in_features, device=tower.device)
    fit.text_readings = index.to(tower.device)
    zimg = F.normalize(torch.randn(texts, tower.head.out_features), dim=-1)
    few, _ = timed(lambda: fit.fit(zimg[:MOST_REST], index[:MOST_REST]))
    every, _ = timed(lambda: fit.fit(zimg, index))
    return few, every, timed(lambda: fit.fit(zimg, index, leaves_out=True))[0] if is_left_out else 0.0


def time_step(
    tower: TextTower,
    tokens: list[list[int]],
    held: list[list[int]],
    batch: int,
    settings: TuneSettings,
    device: torch.device,
) -> float:
    """Return the seconds of a step: those of the tower in proportion to `STEP` pairs, those of the loss as they are."""
    measured = min(batch, STEP)
    optimizer = build_optimizer(settings.optimizer, tower, lr=0.0, weight_decay=0.0)
    embeddings = SparseEmbeddings(tower)
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    scale, autocast = torch.tensor(10.0, device=device), autocast_of(settings, device)

    texts = [tokens[i % len(tokens)] for i in range(measured)] + held[: round(SHARE * measured)]
    features = torch.empty(0) if settings.text_trains else token_features(tower, texts)

    def encode(tokens: list[list[int]]) -> Tensor:
        with autocast():
            encoded: Tensor = tower(tokens)
        return encoded

    def read() -> Part:
        """Do what the run does: read texts, or what a locked encoder has said of them."""
        if settings.text_trains:
            return cut_texts(encode, texts)
        return Part(tower.head, [features], torch.arange(len(texts)))

    def vectors(size: int) -> Tensor:
        return F.normalize(torch.randn(size, tower.head.out_features, device=device), dim=-1)

    def step() -> None:
        optimizer.zero_grad()
        with embeddings:
            loss = backward_in_chunks(
                [vectors(measured), read()],
                lambda zimg, ztxt: softmax_loss(zimg, ztxt[:measured], scale),
                device=device,
            )
        optimizer.step()
        loss.item()

    def loss(size: int) -> float:
        texts = vectors(size).requires_grad_()
        return timed(lambda: torch.autograd.backward(softmax_loss(vectors(size), texts, scale)))[0]

    tower.train()
    step()
    seconds = min(timed(step)[0] for _ in range(2))
    tower.eval()
    if batch == measured:
        return seconds
    ours = loss(measured)
    return (seconds - ours) * batch / measured + loss(batch)


def time_saving(tower: TextTower) -> float:
    """Return the seconds in which the tower's weights are written to a disk, that of temporary files."""

    def save() -> None:
        with replacing(Path(folder) / "text_tower.safetensors") as partial:
            save_weights(tower, partial)

    with tempfile.TemporaryDirectory() as folder:
        return timed(save)[0]


def time_evaluation(census: Census, settings: TuneSettings, width: int, a_text: float) -> float:
    """Return the seconds in which recall on the held-out captions is measured once."""
    captions = min(math.ceil(settings.val_fraction * census.captions), MAX_HELD_OUT)
    if not captions:
        return 0.0
    images = max(1, round(captions * census.images / census.captions))
    zimg, ztxt = (F.normalize(torch.randn(size, width), dim=-1) for size in (images, captions))
    links = max(images, captions)
    index = torch.arange(links)
    return a_text * captions + timed(lambda: retrieval_metrics(zimg, ztxt, index % images, index % captions))[0]


def timed(function: Callable[[], Item]) -> tuple[float, Item]:
    """Call a function; return the seconds that it took, and what it returned."""
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found
