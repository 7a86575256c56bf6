"""Measure a model on data of your own: retrieval in both directions and zero-shot classification."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lamplit.errors import StoreError, UsageError
from lamplit.evaluation.model_metadata import model_metadata
from lamplit.evaluation.result_building import Subject, classification_result, retrieval_result
from lamplit.evaluation.split_choice import Choice, ChosenPairs, Split, choose, no_captions_left
from lamplit.locations.paths import path_of
from lamplit.metrics import scoring
from lamplit.metrics.ranking import retrieval_metrics
from lamplit.metrics.results import Result
from lamplit.model import LiT, as_model
from lamplit.store.embed.embedding import open_source
from lamplit.store.lance_store import Store
from lamplit.store.table.column_types import as_text
from lamplit.zeroshot.class_list import NONE_LABEL, ClassList, index_labels
from lamplit.zeroshot.classifier import class_list
from lamplit.zeroshot.names import as_templates
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

logger = logging.getLogger(__name__)
_LISTED = 10  # class names that a result says


def evaluate(
    model: str | Path | LiT,
    source: str | Path | Store,
    *,
    beside: Sequence[str | Path | LiT] = (),
    split: Split = "auto",
    text_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | ClassList | None = None,
    templates: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[Result]:
    """Evaluate a model on a store, or on anything `read_pairs` reads (embedded first, and not kept).

    On the command line: `lamplit evaluate`.

    Args:
        model: an open model, its folder, or a name that `load` takes. It needs its image tower only if the source is
            not a store.
        source: store, folder, or file of pairs.
        beside: other models, which are measured on the same images and captions as `model`. If their image towers are
            not that of `model`, the source must be pairs, which are embedded once for each.
        split: which captions retrieval is measured on. `held_out`: those that the run which made the model held out
            to choose its best checkpoint by; `test`: those that it kept for the end; `all`: every caption; `auto`: if
            the model was tuned on pairs of the source, its test's captions, else its held-out ones, else those that
            it was not tuned on; and all if it was tuned on other pairs. Classification is measured on the images of
            these captions and on images that the run never saw. The model knows pairs by their content, so the source
            may have been moved, copied, grown or pruned. The results say which it was.
        text_column: column with the texts, for retrieval; by default the one that was tuned on, or else `texts`.
        label_column: column with the class names, for zero-shot classification; or with their places in
            `class_names`, from 0.
        class_names: the classes to choose from, or a list of `make_classes` (its prompts and its temperature); by
            default all that the label column has.
        templates: prompts with `{}` for the class name, or one of them, or the name of a set such as `clip-80`;
            a list of `make_classes` has its own.
        out: folder for one JSON file per result, written as soon as a model is measured, with small images of what
            was confused.
        device: torch device of a model that is not open yet; by default the accelerator, if there is one.
        progress: show a bar on stderr while embedding.

    Returns:
        A result of retrieval if there are texts, then one of zero-shot classification if labels are asked for. In
        retrieval, images with equal bytes are one image, and captions that differ in case only one caption; a note of
        the result has the recall without the latter. Then the same of each model of `beside`.

    Raises:
        StoreError: the store was embedded by another tower, or lacks a column.
        UsageError: there is neither text nor label to evaluate with, the model was tuned on all captions, or held-out
            captions are asked for and there are none.

    Example:
        >>> [result] = lamplit.evaluate("runs/stamps", "stamps.lance")
        >>> result.split, round(result.metrics["image_to_text/recall@1"].value, 3)
        ('held_out', 0.368)
    """
    if split not in get_args(Split):
        raise UsageError(f"there is no split {split!r}; expected one of: {', '.join(get_args(Split))}")
    prompts = as_templates(DEFAULT_TEMPLATES if templates is None else templates)
    if class_names is not None and label_column is None:
        raise UsageError("class_names needs label_column=..., the column with the class of each image")
    if isinstance(class_names, ClassList) and templates is not None:
        raise UsageError("a class list has templates of its own; make another one for other templates")
    if isinstance(class_names, ClassList) and class_names.multi_label:
        raise UsageError(
            "evaluate takes images of one class each, and these classes do not exclude each other; "
            "make_classes measures such a list on its sample"
        )
    is_store = isinstance(source, Store) or Store.exists(source)
    asked = _Asked(split, text_column, label_column, class_names, prompts, thumbnails=out is not None)
    results: list[Result] = []
    for each in (model, *beside):
        opened_model = as_model(each, device=device, towers="text" if is_store else "both")
        found = asked.measure(opened_model, source, progress=progress)
        if out is not None:
            for result in found:
                result.write(out)
        results += found
    return results


@dataclass
class _Asked:
    """What is measured; the first model's pairs are those of all others."""

    split: Split
    text_column: str | None
    label_column: str | None
    class_names: Sequence[str] | ClassList | None
    templates: Sequence[str]
    thumbnails: bool
    chosen: ChosenPairs | None = None

    def measure(self, model: LiT, source: str | Path | Store, *, progress: bool) -> list[Result]:
        """Measure one model."""
        with open_source(source, model.unlocked_image_tower, device=model.device, progress=progress) as opened:
            store, skipped, said = opened
            store.require_tower(model.identity)
            name = store.path if isinstance(source, Store) else str(source)
            measured = _StoreEvaluation(model, store, name, said, len(skipped), model_metadata(model))
            if self.text_column is None:
                self.text_column = "texts" if model.tuned_on is None else model.tuned_on.text_column
            if self.chosen is None:
                choice = choose(model, store, self.split, self.text_column)
                self.chosen = ChosenPairs.of(choice, store)
            else:
                choice = self.chosen.find_in(model, store, self.text_column)
            lost = choice.split == "unseen" and not len(choice.links) and any(store.texts(self.text_column))
            results = measured.retrieve(choice, self.text_column)
            if self.label_column is not None and len(choice.rows):
                results.append(
                    measured.classify(
                        choice, self.label_column, self.class_names, self.templates, thumbnails=self.thumbnails
                    )
                )
            if lost and results:
                logger.warning("%s", no_captions_left(model, store))
            elif lost:
                raise UsageError(no_captions_left(model, store))
            if not results:
                raise UsageError(
                    f"{name} has no texts in column {self.text_column!r} and no --label-column was given; its "
                    f"columns are: {', '.join(store.metadata_columns) or 'none'}"
                )
        for note in said:
            logger.info("%s", note)
        for item in skipped:
            logger.warning("skipped %s: %s", item.path, item.reason)
        return results


@dataclass
class _StoreEvaluation:
    """One model on one store."""

    model: LiT
    store: Store
    source: str  # what the user gave: the store's path, or that of the pairs it was embedded from
    said: list[str]  # notes of the pairs
    skipped: int
    metadata: Mapping[str, str]

    def retrieve(self, choice: Choice, column: str) -> list[Result]:
        """Measure retrieval on the captions that were chosen; no result if there is none."""
        links = choice.links
        if not len(links):
            return []
        rows, image_index = torch.unique(links.image_index, return_inverse=True)
        zimg, ztxt = self.zimg[rows], self.model.encode_texts(links.texts)
        notes = [*self.said, *choice.notes]
        if len(links.texts) < len(links):
            own = retrieval_metrics(zimg.to(ztxt.device), ztxt[links.text_index], image_index, torch.arange(len(links)))
            recalls = " and ".join(f"{name} {own[name]:.3f}" for name in own if name.endswith("recall@1"))
            notes.append(
                f"captions that are equal but for their case are one: {len(links.texts)} of {len(links)} pairs; with a "
                f"caption for each pair and only its own image right, {recalls}"
            )
        subject = self._subject(column, split=choice.split, words=f"{choice.words}, column {column}", notes=notes)
        return [retrieval_result(subject, zimg, ztxt, (image_index, links.text_index))]

    def classify(
        self,
        choice: Choice,
        label_column: str,
        class_names: Sequence[str] | ClassList | None,
        templates: Sequence[str],
        *,
        thumbnails: bool,
    ) -> Result:
        """Measure zero-shot classification on those of the chosen images that have a label."""
        column = [None if label is None else as_text(label).strip() for label in self.store.column(label_column)]
        of_none = 0 if class_names is not None and NONE_LABEL in _names(class_names) else column.count(NONE_LABEL)
        if of_none:
            column = [None if label == NONE_LABEL else label for label in column]
        distinct = sorted({label for label in column if label})
        if not distinct:
            raise StoreError(f"column {label_column!r} of {self.source} is empty")
        classes = _as_class_list(self.model, distinct if class_names is None else class_names, templates)
        number, notes = index_labels(classes.names, distinct)
        if class_names is None and all(label.isdecimal() for label in distinct):
            notes = [f"the classes are called by numbers ({distinct[0]}), which no model reads; give their names"]
        if of_none:
            notes.append(f"images that are labelled {NONE_LABEL!r} ({of_none:,}), of none of the classes, do not count")
        subject = self._subject(
            label_column, split=choice.split, words=f"{self._images(choice)}, column {label_column}",
            class_names=_in_words(classes.names), templates=list(classes.templates),
            logit_multiplier=classes.logit_multiplier if classes is class_names else None,
            notes=[*self.said, *choice.notes, *notes],
        )  # fmt: skip
        if unknown := [label for label in distinct if label not in number]:
            raise StoreError(f"column {label_column!r} has classes that were not given: {', '.join(unknown[:10])}")
        rows = [row for row in choice.rows.tolist() if column[row]]
        if not rows:
            raise StoreError(
                f"column {label_column!r} of {self.source} has no class for any of the {len(choice.rows):,} images "
                "that the model was not tuned on; measure all of them: --split all (in Python: split='all')"
            )
        labels = [(number[label],) for row in rows if (label := column[row])]
        entries = classes.vectors.to(self.model.device)
        answers = scoring.answer(self.zimg[rows], entries, labels, logit_multiplier=classes.logit_multiplier)
        paths = self.store.column("path")

        def read_images(chosen: Sequence[int]) -> list[Path | bytes]:
            return [path_of(paths[rows[i]]) for i in chosen]

        return classification_result(
            subject, answers, labels, list(classes.names), read_images=read_images if thumbnails else None
        )

    @cached_property
    def zimg(self) -> Tensor:
        """Vectors of the store's images in the joint space, (N, D)."""
        return self.model.read_store(self.store)

    def _images(self, choice: Choice) -> str:
        total = len(self.store)
        if len(choice.rows) == total:
            return f"all {total:,} images"
        return f"{len(choice.rows):,} of {total:,} images, none of which was tuned on"

    def _subject(self, column: str, *, words: str, split: str = "", **protocol: Any) -> Subject:
        preprocessing = self.store.tower.preprocessing
        prepared = preprocessing.in_words() if preprocessing else "unknown, vectors were imported"
        where = Path(self.source).absolute()  # two stores may have one name, seen from two folders
        return Subject(
            self.metadata, Path(self.source).stem, self.source, "own",
            {"preprocessing": prepared, "split": words, **protocol},
            source=str(where) if where.exists() else self.source, split=split, column=column, skipped=self.skipped,
        )  # fmt: skip


def _names(classes: Sequence[str] | ClassList) -> Sequence[str]:
    return classes.names if isinstance(classes, ClassList) else classes


def _in_words(names: Sequence[str]) -> str:
    """List some names; many end in digits that tell them from others."""
    if len(names) <= _LISTED:
        return ", ".join(names)
    digits = blake2b("\n".join(names).encode(), digest_size=4).hexdigest()
    return f"{', '.join(names[:_LISTED])} and {len(names) - _LISTED:,} more ({digits})"


def _as_class_list(model: LiT, classes: Sequence[str] | ClassList, templates: Sequence[str]) -> ClassList:
    if not isinstance(classes, ClassList):
        return class_list(model, classes, templates)
    classes.require_model(model)
    return classes
