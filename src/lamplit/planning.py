"""What embedding and tuning will cost, before they run: bytes are counted, and times come from a pass of some seconds.

The pass does what the runs do, on this machine: it embeds a sample of the images into a store that is thrown away, and
takes three steps with a sample of the texts. A locked image tower's vectors have no influence on the time of a step, so
random ones stand for them.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.data.census import SAMPLE, Census
from lamplit.data.pairs import Pair, Pairs
from lamplit.data.sources import read_pairs
from lamplit.errors import UsageError
from lamplit.files import replacing
from lamplit.losses.contrastive import softmax_loss
from lamplit.metrics.ranking import retrieval_metrics
from lamplit.store.embedding import embed
from lamplit.towers.devices import keep_freed_memory, pick_device
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.saving import save_weights
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.more_tokens import add_pieces
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.tuning.building import autocast_of
from lamplit.tuning.closed_form import MAX_PAIRS, ClosedForm, count_anchors
from lamplit.tuning.known_names import SHARE, KnownNames
from lamplit.tuning.large_batch import SparseEmbeddings, backward_in_chunks, cut_texts
from lamplit.tuning.left_out import LeftOut, leaves_out
from lamplit.tuning.optimizers import build_optimizer
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import MAX_HELD_OUT
from lamplit.tuning.start import MOST_REST

SECONDS = 4.0  # that the pass takes for each thing it measures, about
_BATCH = 64  # images
STEP = 1024  # pairs of a measured step; larger batches cost in proportion, the loss apart
_HALF, _FLOAT, _ADAM = 2, 4, 16  # bytes of a number; of a parameter that trains with its gradient and two moments
Item = TypeVar("Item")


@dataclass
class Stage:
    """What a command will cost.

    Attributes:
        seconds: how long it takes.
        parts: these seconds by what they are spent on.
        disk: bytes of files that are large by their number of images or parameters, by name.
        memory: bytes that the model takes in the run; what a batch needs comes on top and is chosen to fit.
    """

    seconds: float
    parts: dict[str, float]
    disk: dict[str, int]
    memory: int


@dataclass
class Plan:
    """What embedding and tuning will cost; `lamplit plan` prints it.

    Attributes:
        source: what was read.
        images: number of images.
        pairs: number of pairs of an image and a text.
        captions: number of distinct texts.
        backend: what will run the image tower.
        steps: number of steps of the tuning.
        embed: cost of `lamplit embed`.
        tune: cost of `lamplit tune`.
        dollars: of both, at the price that was given; None without one.
        notes: what was not measured, a sentence each.
    """

    source: str
    images: int
    pairs: int
    captions: int
    backend: str
    steps: int
    embed: Stage
    tune: Stage
    dollars: float | None = None
    notes: list[str] = field(default_factory=list)


def plan(
    source: str | Path,
    settings: TuneSettings,
    *,
    image_tower: str | ImageTower,
    image_tower_weights: str | Path | None = None,
    pool: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    split: str | None = None,
    images: int | None = None,
    machines: int = 1,
    gpus: int = 1,
    dollars_per_hour: float | None = None,
    workers: int = 0,
    device: str | None = None,
) -> Plan:
    """Tell how long `embed` and `tune` will take with these pairs and towers, and how large their files will be.

    All pairs are read, but no more than some hundred images are opened. Nothing is kept, but what ONNX Runtime needs.

    On the command line: `lamplit plan`.

    Args:
        source: anything `read_pairs` reads.
        settings: of the tuning; the image tower must be locked.
        image_tower: what `open_image_tower` opens, or an open tower; it is locked, and moved to the device.
        image_tower_weights: weights file for the tower, or `"random"`.
        pool: `cls`, `mean`, `map` or `cls+mean`, for a tower to be opened; by default its library's own pooling.
        image_column: column with the images; by default found by its name.
        text_column: column (or columns, with commas between) with the texts; by default found by its name.
        split: which split of the source to read, as `embed` takes it.
        images: number of images to reckon for, of which the source is a sample; by default those of the source.
        machines: number of machines like this one that do it together.
        gpus: processes on each, one for each GPU.
        dollars_per_hour: price of one machine.
        workers: processes that will decode images.
        device: torch device of both runs; by default the accelerator, if there is one.

    Raises:
        PairsError: the source cannot be read.
        TowerError: a tower cannot be opened.
        StoreError: none of the sampled images can be embedded.
        UsageError: there are fewer than two pairs, or more than `images`; or the image tower is to be tuned.

    Example:
        >>> settings = lamplit.TuneSettings("demo:minilm")
        >>> lamplit.plan("photos.csv", settings, image_tower="demo:efficientnet-lite0").images
        1200
    """
    if settings.image_trains:
        raise UsageError(f"a plan is for a locked image tower, and in mode {settings.mode} it trains; leave --mode out")
    chosen = pick_device(device)
    pairs = read_pairs(source, image_column=image_column, text_column=text_column, split=split)
    began = time.perf_counter()
    census = Census.take(pairs)
    reading = time.perf_counter() - began
    if census.pairs < 2:
        raise UsageError(f"{source} has {census.pairs} pairs of an image and a text; tuning compares pairs, so give 2")
    if isinstance(image_tower, ImageTower):
        opening, tower = 0.0, image_tower
    else:
        opening, tower = _timed(lambda: open_image_tower(image_tower, weights=image_tower_weights, pool=pool))
    processes, factor = machines * gpus, census.grow(images)
    backend, starting, an_image = _time_embedding(pairs, census, tower, workers, chosen)
    embedding = {
        "opening": opening, "reading": reading * factor, "starting": starting,
        "images": an_image * census.images / processes,
    }  # fmt: skip
    vectors = census.images * tower.width
    embed_stage = Stage(
        sum(embedding.values()), embedding,
        {"vectors": _HALF * vectors, "search (from 20,000 images on)": _HALF * vectors + vectors // 4},
        _bytes(tower),
    )  # fmt: skip
    tune_stage, steps = _plan_tuning(census, settings, tower, processes, chosen)
    total = embed_stage.seconds + tune_stage.seconds
    return Plan(
        str(source), census.images, census.pairs, census.captions, backend, steps, embed_stage, tune_stage,
        None if dollars_per_hour is None else round(total / 3600 * dollars_per_hour * machines, 2),
        _notes(census, processes, factor, chosen),
    )  # fmt: skip


def _time_embedding(
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


def _plan_tuning(
    census: Census, settings: TuneSettings, image_tower: ImageTower, processes: int, device: torch.device
) -> tuple[Stage, int]:
    rest = 1 - settings.val_fraction - settings.test_fraction
    training = max(2, round(census.pairs * rest))
    captions = round(census.captions * rest)
    opening, tower = _timed(lambda: _open_text_tower(settings, census.texts, image_tower, device))
    is_left_out = leaves_out(settings, tower, training, captions)
    settings = settings.for_pairs(training, leaves_out=is_left_out)
    assert settings.epochs is not None
    assert settings.num_evals is not None
    batch = min(settings.batch_size, training)
    steps = settings.steps or max(1, round(settings.epochs * training / batch))
    checkpoints = math.ceil(steps / math.ceil(steps / settings.num_evals))
    evaluations = checkpoints + (1 if settings.val_fraction else 0)
    tokenizing, tokens = _timed(lambda: tower.tokenize(census.texts))
    a_text = _time_texts(tower, census.texts)
    held: KnownNames | LeftOut | None = KnownNames.of_run(settings, tower, image_tower)
    if is_left_out and isinstance(tower.head, KernelHead):
        held = LeftOut(tower.head, captions)
    held_tokens = held.tokens if isinstance(held, KnownNames) else []
    names = sum(map(len, image_tower.class_head.texts)) if image_tower.class_head is not None else 0
    parts = {
        "opening": opening,
        "tokens": tokenizing / len(tokens) * captions,
        "closed form": 0.0,
        "steps": steps * _time_step(tower, tokens, held_tokens, batch, settings, device) / processes,
        "evaluations": evaluations * _time_evaluation(census, settings, image_tower.width, a_text / processes),
    }
    if settings.starts_in_closed_form and tower.trained_scale is None:
        fitted = min(captions, MAX_PAIRS) + names
        for_scale, for_all = _time_fits(tower, fitted, is_left_out=is_left_out)
        parts["closed form"] = for_scale + (1 + checkpoints * is_left_out) * (a_text * fitted + for_all)
    trained = sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad)
    disk = {
        "text tower": _bytes(tower),
        "image tower": _bytes(image_tower),
        "checkpoint": (_ADAM - _FLOAT) * trained + (0 if held is None else _bytes(held)),
    }
    parts["checkpoints"] = checkpoints * _time_saving(tower) / _bytes(tower) * disk["checkpoint"]
    memory = (_ADAM - _FLOAT) * trained + _bytes(tower) + _bytes(image_tower)
    memory += _FLOAT * held.weights.numel() ** 2 if isinstance(held, LeftOut) else 0  # its corrections
    return Stage(sum(parts.values()), parts, disk, memory), steps


def _open_text_tower(
    settings: TuneSettings, texts: list[str], image_tower: ImageTower, device: torch.device
) -> TextTower:
    rest = 1 - settings.val_fraction - settings.test_fraction
    texts = list(dict.fromkeys(texts))
    texts = texts[: max(2, round(rest * len(texts)))]  # as many as are not held out
    tower = open_text_tower(
        settings.text_tower, width=image_tower.width, texts=texts, context_length=settings.context_length,
        pretrained=settings.pretrained_text,
        reads=None if settings.mode[0] == "u" else image_tower.identity().fingerprint,
    )  # fmt: skip
    if settings.train_tokenizer:
        add_pieces(tower, texts, settings.seed)
    if settings.lora is not None:
        tower.add_lora(settings.lora)
    if settings.has_kernel_head and tower.trained_scale is None:
        tower.head = KernelHead(
            tower.head.in_features, image_tower.width, count_anchors(texts, image_tower.class_head, tower.carried)
        )
    if not settings.text_trains:
        tower.encoder.requires_grad_(False)
    return tower.to(device)


def _time_texts(tower: TextTower, texts: list[str]) -> float:
    """Return the seconds that a text takes in a forward pass, by as many as fit into the time."""
    sample = texts[:256]
    ClosedForm(tower, sample[:16], None)  # warms up
    seconds, _ = _timed(lambda: ClosedForm(tower, sample, None))
    more = texts[: min(len(texts), round(len(sample) * SECONDS / seconds))]
    if len(more) > len(sample):
        seconds, sample = _timed(lambda: ClosedForm(tower, more, None))[0], more
    return seconds / len(sample)


def _time_fits(tower: TextTower, texts: int, *, is_left_out: bool) -> tuple[float, float]:
    """Return the seconds of the two fits of a head, that for the scale and that to all texts, by random features."""
    fit, index = ClosedForm(tower, [""], None), torch.arange(texts)
    fit.features = torch.randn(texts, tower.head.in_features, device=tower.device)
    fit.text_readings = index.to(tower.device)
    zimg = F.normalize(torch.randn(texts, tower.head.out_features), dim=-1)
    few, _ = _timed(lambda: fit.fit(zimg[:MOST_REST], index[:MOST_REST]))
    every, _ = _timed(lambda: fit.fit(zimg, index, leaves_out=is_left_out))
    return few, every


def _time_step(
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

    def encode(tokens: list[list[int]]) -> Tensor:
        with autocast():
            encoded: Tensor = tower(tokens)
        return encoded

    def vectors(size: int) -> Tensor:
        return F.normalize(torch.randn(size, tower.head.out_features, device=device), dim=-1)

    def step() -> None:
        optimizer.zero_grad()
        texts = [tokens[i % len(tokens)] for i in range(measured)] + held[: round(SHARE * measured)]
        with embeddings:
            loss = backward_in_chunks(
                [vectors(measured), cut_texts(encode, texts)],
                lambda zimg, ztxt: softmax_loss(zimg, ztxt[:measured], scale),
                device=device,
            )
        optimizer.step()
        loss.item()

    def loss(size: int) -> float:
        texts = vectors(size).requires_grad_()
        return _timed(lambda: torch.autograd.backward(softmax_loss(vectors(size), texts, scale)))[0]

    tower.train()
    step()
    seconds = min(_timed(step)[0] for _ in range(2))
    tower.eval()
    if batch == measured:
        return seconds
    ours = loss(measured)
    return (seconds - ours) * batch / measured + loss(batch)


def _time_saving(tower: TextTower) -> float:
    """Return the seconds in which the tower's weights are written to a disk, that of temporary files."""

    def save() -> None:
        with replacing(Path(folder) / "text_tower.safetensors") as partial:
            save_weights(tower, partial)

    with tempfile.TemporaryDirectory() as folder:
        return _timed(save)[0]


def _time_evaluation(census: Census, settings: TuneSettings, width: int, a_text: float) -> float:
    """Return the seconds in which recall on the held-out captions is measured once."""
    captions = min(math.ceil(settings.val_fraction * census.captions), MAX_HELD_OUT)
    if not captions:
        return 0.0
    images = max(1, round(captions * census.images / census.captions))
    zimg, ztxt = (F.normalize(torch.randn(size, width), dim=-1) for size in (images, captions))
    links = max(images, captions)
    index = torch.arange(links)
    return a_text * captions + _timed(lambda: retrieval_metrics(zimg, ztxt, index % images, index % captions))[0]


def _notes(census: Census, processes: int, factor: float, device: torch.device) -> list[str]:
    notes = [f"measured on {device.type} with {torch.get_num_threads()} threads; another machine was not measured"]
    if factor > 1:
        notes.append(
            f"the source is taken for a sample, of {census.images / factor:,.0f} images: the others were not seen"
        )
    if len(census.sample) < census.images:
        notes.append(
            f"{len(census.sample)} of {census.images:,} images were looked at; if others are larger, they take longer"
        )
    if processes > 1:
        notes.append(
            f"images, steps and evaluations take one process's time, divided by {processes}: how long processes wait "
            "for each other, for the network and for the disk was not measured"
        )
    return notes


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _timed(function: Callable[[], Item]) -> tuple[float, Item]:
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found
