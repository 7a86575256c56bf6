"""What embedding and tuning will cost, before they run: bytes are counted, and times come from a pass of some seconds.

The pass does what the runs do, on this machine: it embeds a sample of the images into a store that is thrown away, and
takes three steps with a sample of the texts. A locked image tower's vectors have no influence on the time of a step, so
random ones stand for them.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import nn

from lamplit.data.census import Census
from lamplit.data.sources import read_pairs
from lamplit.errors import UsageError
from lamplit.planning.expected_recall import expected_recall
from lamplit.planning.plan_report import Plan, Stage
from lamplit.planning.timings import (
    time_embedding,
    time_evaluation,
    time_fits,
    time_saving,
    time_step,
    time_texts,
    timed,
)
from lamplit.store.arrays.derived import SMALL
from lamplit.towers.devices import pick_device
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.more_tokens import add_pieces
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.tuning.head.closed_form import MAX_PAIRS, count_anchors, distinct_tokens
from lamplit.tuning.head.kept_features import features_file
from lamplit.tuning.head.known_names import KnownNames
from lamplit.tuning.head.left_out import LeftOut, leaves_out
from lamplit.tuning.settings import TuneSettings

_HALF, _FLOAT, _ADAM = 2, 4, 16  # bytes of a number; of a parameter that trains with its gradient and two moments


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
        opening, tower = timed(lambda: open_image_tower(image_tower, weights=image_tower_weights, pool=pool))
    processes, factor = machines * gpus, census.grow(images)
    backend, starting, an_image = time_embedding(pairs, census, tower, workers, chosen)
    embedding = {
        "opening": opening, "reading": reading * factor, "starting": starting,
        "images": an_image * census.images / processes,
    }  # fmt: skip
    vectors = census.images * tower.width
    embed_stage = Stage(
        sum(embedding.values()), embedding,
        {"vectors": _HALF * vectors, f"search (above {SMALL:,} images)": _HALF * vectors + vectors // 4},
        _bytes(tower),
    )  # fmt: skip
    tune_stage, steps = _plan_tuning(census, settings, tower, processes, chosen)
    total = embed_stage.seconds + tune_stage.seconds
    dollars = None if dollars_per_hour is None else round(total / 3600 * dollars_per_hour * machines, 2)
    return Plan(
        str(source), census.images, census.pairs, census.captions, backend, steps, embed_stage, tune_stage,
        expected_recall(census.images), dollars, _notes(census, processes, factor, chosen),
    )  # fmt: skip


def _plan_tuning(
    census: Census, settings: TuneSettings, image_tower: ImageTower, processes: int, device: torch.device
) -> tuple[Stage, int]:
    rest = 1 - settings.val_fraction - settings.test_fraction
    training = max(2, round(census.pairs * rest))
    captions = round(census.captions * rest)
    opening, tower = timed(lambda: _open_text_tower(settings, census.texts, image_tower, device))
    is_left_out = leaves_out(settings, tower, training, captions)
    settings = settings.for_pairs(training, leaves_out=is_left_out)
    assert settings.num_evals is not None
    assert settings.batch_size is not None
    batch, steps = min(settings.batch_size, training), settings.count_steps(training)
    checkpoints = math.ceil(steps / max(1, math.ceil(steps / settings.num_evals)))
    evaluations = checkpoints + (1 if settings.val_fraction else 0)
    tokenizing, tokens = timed(lambda: tower.tokenize(census.texts))
    a_text = time_texts(tower, census.texts)
    held = LeftOut(tower, captions) if is_left_out else KnownNames.of_run(settings, tower, image_tower)
    held_tokens = held.tokens if isinstance(held, KnownNames) else []
    names = image_tower.class_head.distinct_texts() if image_tower.class_head is not None else []
    parts = {
        "opening": opening,
        "tokens": tokenizing / len(tokens) * captions,
        "texts": 0.0 if settings.text_trains else a_text * captions,  # of a locked encoder, once
        "closed form": 0.0,
        "steps": steps * time_step(tower, tokens, held_tokens, batch, settings, device) / processes,
        "evaluations": evaluations * time_evaluation(census, settings, image_tower.width, a_text / processes),
    }
    if settings.starts_in_closed_form and tower.trained_scale is None:
        fitted = min(captions, MAX_PAIRS)
        for_scale, for_all, left_out = time_fits(tower, fitted + len(names), is_left_out=is_left_out)
        name_tokens = tower.tokenize(names)  # which may be longer than captions
        of_names = a_text * len(tokens) * _count(name_tokens) / _count(tokens)
        first = 0.0 if features_file(tower, distinct_tokens(name_tokens)[0]).is_file() else of_names
        again = checkpoints if is_left_out else 0  # after the last step nothing is left out
        reading = a_text * fitted
        parts["closed form"] = for_scale + first + reading + for_all + again * (of_names + reading + left_out)
    trained = sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad)
    disk = {
        "text tower": _bytes(tower),
        "image tower": _bytes(image_tower),
        "checkpoint": (_ADAM - _FLOAT) * trained + (0 if held is None else _bytes(held)),
    }
    model, checkpoint = disk["text tower"], disk["checkpoint"]  # before the first step the model alone is written
    parts["checkpoints"] = time_saving(tower) / model * (model + checkpoints * (model + checkpoint))
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


def _count(tokens: list[list[int]]) -> int:
    return sum(map(len, tokens))


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
