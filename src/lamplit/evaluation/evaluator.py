"""Measure a model on data of your own: retrieval in both directions and zero-shot classification."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lamplit.errors import StoreError, UsageError
from lamplit.evaluation.model_metadata import model_metadata
from lamplit.evaluation.result_building import Subject, classification_result, retrieval_result
from lamplit.metrics import scoring
from lamplit.metrics.results import Result
from lamplit.model import LiT, as_model
from lamplit.store.embedding import open_source
from lamplit.store.lance_store import Store
from lamplit.tuning.run_folder import settings_of_run
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import Links, link, split_store
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.classifier import class_list
from lamplit.zeroshot.names import as_templates
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

logger = logging.getLogger(__name__)
Split = Literal["auto", "held_out", "all"]


def evaluate(
    model: str | Path | LiT,
    source: str | Path | Store,
    *,
    split: Split = "auto",
    text_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | ClassList | None = None,
    templates: str | Sequence[str] = DEFAULT_TEMPLATES,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[Result]:
    """Evaluate a model on a store, or on anything `read_pairs` reads (embedded first, and not kept).

    On the command line: `lamplit evaluate`.

    Args:
        model: an open model, its folder, or `lit:NAME`. It needs its image tower only if the source is not a store.
        source: store, folder, or file of pairs.
        split: which captions retrieval is measured on. `held_out`: those that the run which made the model held out
            of this store; `all`: every caption; `auto`: the held-out ones if the model was tuned on this store, else
            all. The results say which it was.
        text_column: column with the texts, for retrieval; by default the one that was tuned on, or else `texts`.
        label_column: column with the class names, for zero-shot classification.
        class_names: the classes to choose from, or a list of `make_classes` (its prompts and its temperature); by
            default all that the label column has.
        templates: prompts with `{}` for the class name, or one of them, or the name of a set such as `clip-80`.
        out: folder for one JSON file per result, with small images of what was confused.
        device: torch device of a model that is not open yet; by default the accelerator, if there is one.
        progress: show a bar on stderr while embedding.

    Returns:
        A result of retrieval if there are texts, then one of zero-shot classification if labels are asked for.

    Raises:
        StoreError: the store was embedded by another tower, or lacks a column.
        UsageError: there is neither text nor label to evaluate with, or held-out captions are asked for and the model
            was not tuned on this store.

    Example:
        >>> [result] = lamplit.evaluate("runs/stamps", "stamps.lance")
        >>> result.split, round(result.metrics["image_to_text/recall@1"].value, 3)
        ('held_out', 0.388)
    """
    if split not in get_args(Split):
        raise UsageError(f"there is no split {split!r}; expected one of: {', '.join(get_args(Split))}")
    prompts = as_templates(templates)
    if class_names is not None and label_column is None:
        raise UsageError("class_names needs label_column=..., the column with the class of each image")
    is_store = isinstance(source, Store) or Store.exists(source)
    model = as_model(model, device=device, towers="text" if is_store else "both")
    with open_source(source, model.unlocked_image_tower, device=model.device, progress=progress) as (store, skipped):
        store.require_tower(model.identity)
        name = store.path if isinstance(source, Store) else str(source)
        asked = _StoreEvaluation(model, store, name, len(skipped), model_metadata(model))
        run = _run_of_split(model, store, split)
        results = asked.retrieve(run, text_column)
        if label_column is not None:
            results.append(asked.classify(label_column, class_names, prompts, thumbnails=out is not None))
        if not results:
            column = text_column or (run.text_column if run else "texts")
            raise UsageError(
                f"{store.path} has no texts in column {column!r} and no --label-column was given; its columns "
                f"are: {', '.join(store.metadata_columns) or 'none'}"
            )
    for item in skipped:
        logger.warning("skipped %s: %s", item.path, item.reason)
    if out is not None:
        for result in results:
            result.write(out)
    return results


def _run_of_split(model: LiT, store: Store, split: Split) -> TuneSettings | None:
    """Return the settings of the run whose held-out captions are measured; None if all captions are."""
    if split == "all":
        return None
    settings = None if model.run_folder is None else settings_of_run(model.run_folder, store.path)
    if settings is None and split == "held_out":
        raise UsageError(
            f"{model.name} was not tuned on {store.path}, so no captions of it are held out; "
            "measure all of them: --split all (in Python: split='all')"
        )
    return settings


@dataclass
class _StoreEvaluation:
    """One model on one store."""

    model: LiT
    store: Store
    source: str  # what the user gave: the store's path, or that of the pairs it was embedded from
    skipped: int
    metadata: Mapping[str, str]

    def retrieve(self, run: TuneSettings | None, text_column: str | None) -> list[Result]:
        """Measure retrieval on the captions that `run` held out, or on all; no result if there is no caption."""
        column = text_column or (run.text_column if run else "texts")
        links = _link_captions(self.store, column, run)
        if not len(links):
            return []
        split = "all" if run is None else "held_out"
        words = "all captions" if run is None else "captions held out of the run that made the model"
        notes = [] if run is None else ["the run chose its best checkpoint by these captions"]
        if len(links.texts) < len(links):
            notes.append(f"captions that are equal but for their case are one: {len(links)} pairs")
        subject = self._subject(column, split=split, words=f"{words}, column {column}", notes=notes)
        rows, image_index = torch.unique(links.image_index, return_inverse=True)
        ztxt = self.model.encode_texts(links.texts)
        return [retrieval_result(subject, self.zimg[rows], ztxt, (image_index, links.text_index))]

    def classify(
        self,
        label_column: str,
        class_names: Sequence[str] | ClassList | None,
        templates: Sequence[str],
        *,
        thumbnails: bool,
    ) -> Result:
        """Measure zero-shot classification on the images that have a label."""
        column = [None if label is None else str(label) for label in self.store.column(label_column)]
        distinct = sorted({label for label in column if label})
        if not distinct:
            raise StoreError(f"column {label_column!r} of {self.store.path} is empty")
        classes = _as_class_list(self.model, class_names or distinct, templates)
        subject = self._subject(
            label_column, words=f"column {label_column}", templates=list(classes.templates)
        )  # fmt: skip
        number = {name: i for i, name in enumerate(classes.names)}
        if unknown := [label for label in distinct if label not in number]:
            raise StoreError(f"column {label_column!r} has classes that were not given: {', '.join(unknown[:10])}")
        labelled = [(row, (number[label],)) for row, label in enumerate(column) if label]
        rows, labels = [row for row, _ in labelled], [label for _, label in labelled]
        entries = classes.vectors.to(self.model.device)
        answers = scoring.answer(self.zimg[rows], entries, labels, logit_multiplier=classes.logit_multiplier)
        paths = self.store.column("path")

        def read_images(chosen: Sequence[int]) -> list[Path | bytes]:
            return [Path(paths[rows[i]]) for i in chosen]

        return classification_result(
            subject, answers, labels, list(classes.names), read_images=read_images if thumbnails else None
        )

    @cached_property
    def zimg(self) -> Tensor:
        """Vectors of the store's images in the joint space, (N, D)."""
        return self.model.read_store(self.store)

    def _subject(self, column: str, *, words: str, split: str = "", **protocol: Any) -> Subject:
        preprocessing = self.store.tower.preprocessing
        prepared = preprocessing.in_words() if preprocessing else "unknown, vectors were imported"
        return Subject(
            self.metadata, Path(self.source).stem, self.source, "own",
            {"preprocessing": prepared, "split": words, **protocol},
            source=self.source, split=split, column=column, skipped=self.skipped,
        )  # fmt: skip


def _link_captions(store: Store, text_column: str, run: TuneSettings | None) -> Links:
    texts = store.texts(text_column)
    rows = list(range(len(texts)))
    if run is not None:  # the images that it held out; their texts may be asked for in another column
        held_out = split_store(store, run.text_column, run.val_fraction, run.seed)[1]
        rows = torch.unique(held_out.image_index).tolist()
    return link(rows, [texts[row] for row in rows])


def _as_class_list(model: LiT, classes: Sequence[str] | ClassList, templates: Sequence[str]) -> ClassList:
    if not isinstance(classes, ClassList):
        return class_list(model, classes, templates)
    classes.require_model(model)
    return classes
