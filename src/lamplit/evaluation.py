"""Measure a model: retrieval both ways and zero-shot classification, from cached vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lamplit.data.images import Skipped
from lamplit.embedding import embed
from lamplit.errors import StoreError, TowerError, UsageError
from lamplit.metrics import per_class_accuracy, topk_accuracy
from lamplit.model import LiT
from lamplit.prompts import DEFAULT_TEMPLATES
from lamplit.store import Store
from lamplit.towers.image import ImageTower
from lamplit.towers.lock import Locked
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import Links, held_out_recall, link, split_store
from lamplit.zeroshot import class_vectors


@dataclass
class Evaluation:
    """What was measured, on what."""

    source: str
    pictures: int
    held_out_only: bool = False
    captions: int = 0
    captioned_pictures: int = 0  # those that the captions are compared with
    retrieval: dict[str, float] = field(default_factory=dict)  # text_to_image/recall@1 and so on
    classes: int = 0
    templates: list[str] = field(default_factory=list)
    zero_shot: dict[str, float] = field(default_factory=dict)  # accuracy@1, accuracy@5
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)  # accuracy and pictures of each class
    skipped: list[Skipped] = field(default_factory=list)  # pictures of a source that could not be embedded


def evaluate(
    model: LiT,
    source: str | Path | Store,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    held_out_of: TuneSettings | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model on a store, or on anything `read_pairs` reads (embedded first, and not kept).

    Args:
        model: needs its image tower only where the source is not a store.
        source: store, folder, or file of pairs.
        text_column: column with the texts, for retrieval; by default the one of `held_out_of`, or else `texts`.
        label_column: column with the class names, for zero-shot classification.
        class_names: the classes to choose from; by default all that the label column has.
        templates: prompts, with `{}` for the class name.
        held_out_of: settings of the run that made the model on this store: only its held-out captions count.
        progress: show a bar on stderr while embedding.

    Raises:
        StoreError: the store was embedded by another tower, or lacks a column.
        UsageError: there is neither text nor label to evaluate with.
    """
    if not isinstance(source, Store):
        if Store.exists(source):
            source = Store(source)
        else:
            with tempfile.TemporaryDirectory() as folder:
                store, skipped = _embed(model, source, Path(folder) / "pictures.lance", progress)
                evaluation = evaluate(
                    model, store, text_column=text_column, label_column=label_column,
                    class_names=class_names, templates=templates,
                )  # fmt: skip
                return replace(evaluation, source=str(source), skipped=skipped)
    source.require_tower(model.identity)
    text_column = text_column or (held_out_of.text_column if held_out_of else "texts")
    evaluation = Evaluation(source.path, len(source), held_out_of is not None)
    links = _links(source, text_column, held_out_of)
    if len(links):
        evaluation.retrieval = held_out_recall(model.read_store(source), model.encode_texts(links.texts), links)
        evaluation.captions = len(links.texts)
        evaluation.captioned_pictures = len(torch.unique(links.picture_index))
    if label_column is not None:
        _zero_shot(evaluation, model, source, label_column, class_names, templates)
    if not evaluation.retrieval and not evaluation.zero_shot:
        raise UsageError(
            f"{source.path} has no texts in column {text_column!r} and no --label-column was given; its columns "
            f"are: {', '.join(source.metadata_columns) or 'none'}"
        )
    return evaluation


def _links(store: Store, text_column: str, held_out_of: TuneSettings | None) -> Links:
    texts = store.texts(text_column)
    rows = list(range(len(texts)))
    if held_out_of is not None:  # its pictures; their texts may be asked for in another column
        held_out = split_store(store, held_out_of.text_column, held_out_of.held_out, held_out_of.seed)[1]
        rows = torch.unique(held_out.picture_index).tolist()
    return link(rows, [texts[row] for row in rows])


def _zero_shot(
    evaluation: Evaluation,
    model: LiT,
    store: Store,
    label_column: str,
    class_names: Sequence[str] | None,
    templates: Sequence[str],
) -> None:
    labels = [None if label is None else str(label) for label in store.column(label_column)]
    names = list(class_names or sorted({label for label in labels if label is not None}))
    unknown = sorted({label for label in labels if label is not None} - set(names))
    if unknown:
        raise StoreError(f"column {label_column!r} has classes that were not given: {', '.join(unknown[:10])}")
    rows = [row for row, label in enumerate(labels) if label is not None]
    if not rows:
        raise StoreError(f"column {label_column!r} of {store.path} is empty")
    truth = torch.tensor([names.index(str(labels[row])) for row in rows])
    classes = class_vectors(model, names, templates)
    scores = model.read_store(store)[rows] @ classes.T
    accuracies = per_class_accuracy(scores.argmax(1).cpu(), truth, len(names))
    counts = torch.bincount(truth, minlength=len(names))
    evaluation.classes, evaluation.templates = len(names), list(templates)
    evaluation.zero_shot = topk_accuracy(scores.cpu(), truth)
    evaluation.per_class = {
        name: {"accuracy": float(accuracies[i]), "pictures": int(counts[i])}
        for i, name in enumerate(names)
        if counts[i]
    }


def _embed(model: LiT, source: str | Path, out: Path, progress: bool) -> tuple[Store, list[Skipped]]:
    if not isinstance(model.image_tower, Locked) or not isinstance(model.image_tower.tower, ImageTower):
        raise TowerError(f"{source} is not a store, and the model is open without its image tower to embed it")
    report = embed(source, out, tower=model.image_tower.tower, center=False, progress=progress)
    return Store(out), report.skipped
