"""Build a run: read the store, open the towers, and put together what each side of a step reads."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from lamplit.data.places.image_files import file_holding
from lamplit.data.split_record import SplitRecord
from lamplit.errors import LamplitError, TuneError, UsageError
from lamplit.model import LiT
from lamplit.store.arrays.caption_arrays import CaptionTexts
from lamplit.store.arrays.row_vectors import read_vectors
from lamplit.store.lance_store import Store
from lamplit.store.table.store_metadata import OF_TEXTS
from lamplit.towers.devices import has_fast_bf16
from lamplit.towers.images.image_tower import ImageTower, build_image_tower, open_image_tower
from lamplit.towers.model_folder import saved_folder
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.more_tokens import add_pieces
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.tuning.batches import Batches
from lamplit.tuning.caption_language import advise
from lamplit.tuning.caption_tokens import advise_length, advise_pieces
from lamplit.tuning.head.closed_form import MAX_ANCHORS, count_anchors
from lamplit.tuning.head.head_fit import HeadFit
from lamplit.tuning.head.known_names import KnownNames
from lamplit.tuning.head.left_out import LeftOut, LeftOutTexts, leaves_out
from lamplit.tuning.loop import Run
from lamplit.tuning.optimizers import build_optimizer, parameter_groups
from lamplit.tuning.ranks import Ranks
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.sides import (
    ConstantImages,
    ConstantTexts,
    EncodedImages,
    EncodedTexts,
    ImageSide,
    Precision,
    TextSide,
)
from lamplit.tuning.split import split_store
from lamplit.tuning.tokens import Tokens, tokenize_captions
from lamplit.tuning.tune_report import TuneReport, what_trains

logger = logging.getLogger(__name__)


def build_run(
    store: Store,
    out: Path,
    settings: TuneSettings,
    device: torch.device,
    *,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> Run:
    """Build a run from its store and settings, ready for its first step or its last checkpoint.

    Args:
        store: whose pairs are tuned on, and whose tower is read or tuned.
        out: the run's folder.
        settings: settings of the run.
        device: where the model will be.
        ranks: the processes that share each batch; by default this one alone.
        progress: show bars on stderr.

    Raises:
        StoreError: the store has no such text column.
        UsageError: there is too little to tune on, or a batch has fewer pairs than there are processes.
        TowerError: the text tower cannot be opened.
        TuneError: the image tower or its images cannot be read, and the mode needs them.
    """
    base = _tuned_on(settings)
    split = split_store(
        store, settings.text_column, settings.val_fraction, settings.seed, settings.test_fraction, base,
        progress=progress,
    )  # fmt: skip
    for warning in split.warnings:
        logger.warning("%s", warning)
    train, held_out = split.train, split.held_out
    if store.backend == OF_TEXTS:
        logger.info("the vectors are those of texts: held-out recall is of texts by texts, not of images")
    center = None if settings.image_trains else store.center
    zimg = read_vectors(store, center, progress=progress)
    texts = CaptionTexts(split.captions, split.numbers)
    text_tower = _open_text_tower(store, settings, texts)
    is_left_out = leaves_out(settings, text_tower, len(train), len(texts))
    settings = _fill_in(settings, len(train), is_left_out=is_left_out)
    batches = Batches(train, settings)
    if (ranks := ranks or Ranks()).size > batches.batch_size:
        raise UsageError(f"{ranks.size} processes cannot share a batch of {batches.batch_size} pairs; start fewer")
    tokens = tokenize_captions(split.captions, split.numbers, text_tower, progress=progress)
    if ranks.is_first:
        may_be_longer = settings.context_length == text_tower.context_length or not settings.pretrained_text
        length = advise_length(tokens, texts, text_tower, settings.text_column, may_be_longer=may_be_longer)
        for advice in filter(None, (advise(texts, text_tower), advise_pieces(texts, text_tower), length)):
            logger.warning("%s", advice)
    image_tower = _open_image_tower(store, settings)
    class_head = None if image_tower is None else image_tower.class_head
    if settings.has_kernel_head and text_tower.trained_scale is None:
        anchors = count_anchors(texts[:MAX_ANCHORS], class_head, text_tower.carried)
        text_tower.head = KernelHead(text_tower.head.in_features, store.tower.width, anchors)
    model = LiT(
        text_tower, store.tower, center=center,
        image_head=_identity_head(store.tower.width) if settings.image_head else None,
        logit_bias=None if settings.loss == "softmax" else -math.log(batches.batch_size - 1),
        logit_multiplier=text_tower.trained_scale or 10.0,
    ).to(device)  # fmt: skip
    model.tuned_on = split.record if base is None else split.record.after(base)
    precision = autocast_of(settings, device)
    # Where texts are left out the classifier's names are fitted again with the head, and nothing else need hold them.
    left_out = LeftOut(text_tower, len(texts)) if is_left_out else None
    names = None if is_left_out else KnownNames.of_run(settings, text_tower, image_tower)
    text_side = _open_text_side(settings, text_tower, tokens, precision, left_out)
    assert settings.lr is not None, "chosen for these pairs"
    optimizer = build_optimizer(settings.optimizer, model, lr=settings.lr, weight_decay=settings.weight_decay)
    for group in optimizer.param_groups:
        group |= {"rate": "lr", "peak": settings.lr, "start": 0}
    image_side: ImageSide
    if settings.image_trains:
        assert image_tower is not None
        paths = store.arrow_column("path")
        _require_images(paths, torch.cat([part.image_index for part in (train, held_out, split.test)]), settings.mode)
        image_side = _train_image_tower(
            image_tower, model, optimizer, paths, settings, batches.total_steps, precision, ranks
        )
    else:
        image_side = ConstantImages(zimg, image_tower, model.image_head, device)
    report = TuneReport(
        out=str(out),
        mode=settings.mode_used,
        image_tower=store.tower.spec,
        text_tower=settings.text_tower,
        training_pairs=len(train),
        held_out_pairs=len(held_out),
        held_out_captions=len(held_out.texts),
        test_pairs=len(split.test),
        test_captions=len(split.test.texts),
        dropped_pairs=split.dropped,
        warnings=split.warnings,
        trains=what_trains(model, image_tower, fits_head=is_left_out),
        truncated_texts=tokens.count_cut(),
        fingerprint_before=image_side.fingerprint(),
    )
    return Run(
        out=out,
        settings=settings,
        device=device,
        model=model,
        optimizer=optimizer,
        train=train,
        held_out=held_out,
        test=split.test,
        head_fit=HeadFit(model, train, texts, zimg, class_head, names, left_out),
        zimg=zimg,
        image_ids=torch.from_numpy(split.captions.images),
        batches=batches,
        image_side=image_side,
        text_side=text_side,
        report=report,
        ranks=ranks,
    )


def _fill_in(settings: TuneSettings, pairs: int, *, is_left_out: bool) -> TuneSettings:
    """Choose what the user left open, and say so."""
    chosen = settings.for_pairs(pairs, leaves_out=is_left_out)
    if chosen.steps is None and None in (settings.lr, settings.epochs, settings.batch_size):
        head = "kernel" if settings.has_kernel_head else "linear"
        how = ", which is fitted again at each evaluation" if is_left_out else ""
        logger.info(
            "%g epochs in batches of %d at a learning rate of %g, for %d pairs and a %s head%s",
            chosen.epochs, chosen.batch_size, chosen.lr, pairs, head, how,
        )  # fmt: skip
    return chosen


def _tuned_on(settings: TuneSettings) -> SplitRecord | None:
    """Find what the text tower was tuned on before, if it is a saved model's."""
    library, _, name = settings.text_tower.partition(":")
    if library != "model" or not settings.pretrained_text:
        return None
    return SplitRecord.find(saved_folder(name) or Path(name))


def _open_text_tower(store: Store, settings: TuneSettings, texts: CaptionTexts) -> TextTower:
    # Published heads read plain vectors of pre-trained towers.
    keeps_head = settings.mode[0] != "u" and (settings.image_trains or store.center is None)
    tower = open_text_tower(
        settings.text_tower,
        width=store.tower.width,
        texts=texts,
        context_length=settings.context_length,
        pretrained=settings.pretrained_text,
        reads=store.tower.fingerprint if keeps_head else None,
    )
    if settings.train_tokenizer:
        added = add_pieces(tower, texts, settings.seed)
        logger.info("%s was given %d pieces of words that it could not write", settings.text_tower, added)
    if settings.lora is not None:
        tower.add_lora(settings.lora)
    if tower.carried is not None:
        logger.info("%s knows %d texts, which the new head knows too", settings.text_tower, len(tower.carried))
    return tower


def _open_image_tower(store: Store, settings: TuneSettings) -> ImageTower | None:
    """Open the tower that made the store: to be tuned, or for its classifier and to be saved with the model."""
    identity = store.tower
    if identity.imported:
        if settings.image_trains:
            raise TuneError(f"the vectors of {store.path} were imported: there is no {identity.spec} to tune here")
        logger.info("the vectors were imported, made by %s; the model is saved without an image tower", identity.spec)
        return None
    if settings.mode[0] == "u":
        return build_image_tower(identity)
    try:
        tower = open_image_tower(
            identity.spec, weights=identity.weights, preprocessing=identity.preprocessing, pool=identity.pool
        )
        if tower.identity().fingerprint != identity.fingerprint:
            raise TuneError(f"{identity.spec} is not the tower that made {store.path} any more")
    except LamplitError as error:
        if settings.image_trains:
            raise TuneError(f"the image tower {identity.spec} cannot be tuned: {error}") from error
        logger.warning("the image tower %s cannot be opened (%s); the model is saved without it", identity.spec, error)
        return None
    return tower


def _open_text_side(
    settings: TuneSettings, tower: TextTower, tokens: Tokens, precision: Precision, left_out: LeftOut | None
) -> TextSide:
    if left_out is not None:
        return LeftOutTexts(tower, tokens, precision, left_out)
    return EncodedTexts(tower, tokens, precision) if settings.text_trains else ConstantTexts(tower, tokens)


def _train_image_tower(
    tower: ImageTower,
    model: LiT,
    optimizer: torch.optim.Optimizer,
    paths: pa.Array,
    settings: TuneSettings,
    total_steps: int,
    precision: Precision,
    ranks: Ranks,
) -> EncodedImages:
    """Put an image tower that trains into the model and the optimizer, with rates and decay of its own."""
    # Convolutions train 1.2 to 1.6 times faster so on a CPU, and nothing else changes.
    tower.backbone.to(memory_format=torch.channels_last)
    model.attach_trainable_image_tower(tower.to(model.device))
    decay = settings.weight_decay if settings.image_weight_decay is None else settings.image_weight_decay
    start = round(settings.image_delay * total_steps)
    for group in parameter_groups(tower, weight_decay=decay):
        group |= {"lr": 0.0, "rate": "image_lr", "peak": settings.peak_image_lr, "start": start}
        optimizer.add_param_group(group)
    return EncodedImages(
        tower, model.image_head, paths, precision=precision, device=model.device, start=start,
        # A tower from scratch has no statistics to keep; those of a pre-trained one stay, as when it was locked.
        trains_statistics=settings.mode[0] == "u", ranks=ranks,
    )  # fmt: skip


def _require_images(paths: pa.Array, rows: Tensor, mode: str) -> None:
    """Raise TuneError if images that are to be read in training are neither files here nor in one."""
    chosen = paths.take(pa.array(torch.unique(rows).numpy()))
    lost = [path.as_py() for path in chosen if not Path(file_holding(path.as_py())).is_file()]
    if lost:
        raise TuneError(
            f"mode {mode} reads images again in every epoch, and {len(lost)} of the store's are "
            f"not files here, {lost[0]} among them. Bring them back, or embed their source again if it is a tar or a "
            "table here; unpack images that are inside a compressed tar into a folder, and embed them from there"
        )


def _identity_head(width: int) -> nn.Linear:
    """Make a linear layer that is initialised to the identity, so that vectors of a locked tower stay valid."""
    head = nn.Linear(width, width)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def autocast_of(settings: TuneSettings, device: torch.device) -> Precision:
    """Return what enters the autocast of a run: that of bfloat16, or none."""
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_fast_bf16(device))
    return partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
