"""Measure a model: retrieval both ways and zero-shot classification, from cached vectors."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lamplit._version import __version__
from lamplit.data.images import read_thumbnail
from lamplit.errors import ImageError, StoreError, UsageError
from lamplit.metrics import scoring
from lamplit.metrics.calibration import expected_calibration_error, reliability_bins
from lamplit.metrics.results import Result
from lamplit.model import LiT, as_model
from lamplit.store.embedding import open_source
from lamplit.store.lance_store import Store
from lamplit.tuning.run_folder import settings_of_run
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import Links, link, split_store
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.classifier import class_list
from lamplit.zeroshot.names import templates as template_set
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

logger = logging.getLogger(__name__)
THUMBNAIL = 96  # pixels
EXAMPLES = 3  # images of each confusion
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

    Args:
        model: an open model, its folder, or `lit:NAME`. It needs its image tower only if the source is not a store.
        source: store, folder, or file of pairs.
        split: which captions retrieval is measured on. `held_out`: those that the run which made the model held out
            of this store; `all`: every caption; `auto`: the held-out ones if the model was tuned on this store, else
            all.
        text_column: column with the texts, for retrieval; by default the one that was tuned on, or else `texts`.
        label_column: column with the class names, for zero-shot classification.
        class_names: the classes to choose from, or a list of `make_classes` (its prompts and its temperature); by
            default all that the label column has.
        templates: prompts, with `{}` for the class name, or the name of a set of them.
        out: folder for one JSON file per result, with small images of what was confused.
        device: torch device of a model that is not open yet; by default the accelerator, if there is one.
        progress: show a bar on stderr while embedding.

    Returns:
        A result of retrieval where there are texts, and one of zero-shot classification where there are labels.

    Raises:
        StoreError: the store was embedded by another tower, or lacks a column.
        UsageError: there is neither text nor label to evaluate with, or held-out captions are asked for and the model
            was not tuned on this store.

    Example:
        >>> [result] = lamplit.evaluate("runs/stamps", "stamps.lance")
        >>> result.metrics["image_to_text/recall@1"].value
        0.388
    """
    if split not in get_args(Split):
        raise UsageError(f"there is no split {split!r}; expected one of: {', '.join(get_args(Split))}")
    prompts = template_set(templates) if isinstance(templates, str) else templates
    is_store = isinstance(source, Store) or Store.exists(source)
    model = as_model(model, device=device, towers="text" if is_store else "both")
    with open_source(source, model.unlocked_image_tower, progress=progress) as (store, skipped):
        run = _run_of_split(model, store, split)
        results = _measure(
            model, store, text_column, label_column, class_names, prompts, run, thumbnails=out is not None
        )
    for item in skipped:
        logger.warning("skipped %s: %s", item.path, item.reason)
    if not isinstance(source, Store):
        named: dict[str, Any] = {"benchmark": Path(source).stem, "dataset": str(source), "skipped": len(skipped)}
        results = [replace(result, **named) for result in results]
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


def _measure(
    model: LiT,
    store: Store,
    text_column: str | None,
    label_column: str | None,
    class_names: Sequence[str] | ClassList | None,
    templates: Sequence[str],
    run: TuneSettings | None,
    *,
    thumbnails: bool,
) -> list[Result]:
    store.require_tower(model.identity)
    text_column = text_column or (run.text_column if run else "texts")
    results = []
    links = _links(store, text_column, run)
    if len(links):
        results.append(_retrieval(model, store, links, text_column, run is not None))
    if label_column is not None:
        results.append(_zero_shot(model, store, label_column, class_names, templates, thumbnails))
    if not results:
        raise UsageError(
            f"{store.path} has no texts in column {text_column!r} and no --label-column was given; its columns "
            f"are: {', '.join(store.metadata_columns) or 'none'}"
        )
    return results


def retrieval_result(
    model: LiT,
    zimg: Tensor,
    texts: Sequence[str],
    links: tuple[Tensor, Tensor],
    *,
    benchmark: str,
    dataset: str,
    language: str,
    protocol: Mapping[str, Any],
    ztxt: Tensor | None = None,
) -> Result:
    """Measure retrieval both ways between N images and M texts.

    Args:
        model: what made the vectors.
        zimg: unit vectors of the images, (N, D).
        texts: M of them.
        links: the true pairs, as places in `zimg` and in `texts`, (L,) each.
        benchmark: name of the data set on the command line.
        dataset: its name in papers.
        language: of the texts.
        protocol: what else is to be said of the measurement.
        ztxt: unit vectors of the texts, (M, D), where they are known.
    """
    started = time.monotonic()
    ztxt = model.encode_texts(texts) if ztxt is None else ztxt
    metrics, curves = scoring.retrieval(zimg.to(ztxt.device), ztxt, *links)
    return Result(
        "image-text retrieval",
        benchmark,
        dataset,
        language,
        "image_to_text/recall@1",
        metrics,
        model=said_of(model),
        protocol=protocol,
        images=len(zimg),
        captions=len(texts),
        recall_curve=curves,
        versions=versions(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )


def classification_result(
    model: LiT,
    answers: scoring.Answers,
    labels: Sequence[tuple[int, ...]],
    names: Sequence[str],
    *,
    benchmark: str,
    dataset: str,
    language: str,
    protocol: Mapping[str, Any],
    show: Callable[[Sequence[int]], Sequence[Path | bytes]] | None = None,
) -> Result:
    """Put together what a classifier said to N images.

    Args:
        model: what made the vectors.
        answers: to the N images.
        labels: the right classes of each.
        names: of the C classes.
        benchmark: name of the data set on the command line.
        dataset: its name in papers.
        language: of the class names.
        protocol: what else is to be said of the measurement.
        show: gives the images at some places of the N, where small ones of what was confused are to be kept.
    """
    right = answers.ranks == 1
    reliability = {
        "error": expected_calibration_error(answers.confidences, right),
        "bins": reliability_bins(answers.confidences, right),
    }
    confused = scoring.confusions(answers, labels)
    shown = [place for *_, places in confused for place in places[:EXAMPLES]] if show else []
    small = dict(zip(shown, map(thumbnail, show(shown)), strict=True)) if show else {}
    return Result(
        "zero-shot classification",
        benchmark,
        dataset,
        language,
        "accuracy@1",
        scoring.accuracies(answers, labels),
        model=said_of(model),
        protocol=protocol,
        images=len(labels),
        classes=len(names),
        per_class=scoring.per_class(answers, labels, names),
        confusions=[
            {
                "class": names[label],
                "predicted": names[predicted],
                "images": len(places),
                "examples": [small[place] for place in places if place in small],
            }
            for label, predicted, places in confused
        ],
        reliability=reliability,
        versions=versions(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def thumbnail(source: Path | bytes) -> str:
    """Make a small JPEG as a data URI; empty where the image cannot be read any more."""
    try:
        image = read_thumbnail(source, THUMBNAIL)
    except ImageError:
        return ""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def said_of(model: LiT) -> dict[str, str]:
    """What a result says of its model."""
    text = model.text_tower
    return {
        "name": model.name,
        "image_tower": model.identity.spec,
        "fingerprint": model.identity.fingerprint,
        "text_tower": "none" if text is None else text.spec,
    }


def versions() -> dict[str, str]:
    """Of what a figure can depend on."""
    libraries = ("torch", "torchvision", "timm", "transformers", "pillow")
    return {"lamplit": __version__, **{name: version(name) for name in libraries}}


def _links(store: Store, text_column: str, run: TuneSettings | None) -> Links:
    texts = store.texts(text_column)
    rows = list(range(len(texts)))
    if run is not None:  # its images; their texts may be asked for in another column
        held_out = split_store(store, run.text_column, run.val_fraction, run.seed)[1]
        rows = torch.unique(held_out.image_index).tolist()
    return link(rows, [texts[row] for row in rows])


def _retrieval(model: LiT, store: Store, links: Links, text_column: str, held_out: bool) -> Result:
    rows, image_index = torch.unique(links.image_index, return_inverse=True)
    which = "captions held out of the run that made the model" if held_out else "all captions"
    return retrieval_result(
        model,
        model.read_store(store)[rows],
        links.texts,
        (image_index, links.text_index),
        benchmark=Path(store.path).stem,
        dataset=store.path,
        language="own",
        protocol={**_shown(store), "split": f"{which}, column {text_column}"},
    )


def _zero_shot(
    model: LiT,
    store: Store,
    label_column: str,
    class_names: Sequence[str] | ClassList | None,
    templates: Sequence[str],
    thumbnails: bool,
) -> Result:
    started = time.monotonic()
    labels = [None if label is None else str(label) for label in store.column(label_column)]
    if not any(labels):
        raise StoreError(f"column {label_column!r} of {store.path} is empty")
    if isinstance(class_names, ClassList):
        class_names.require_model(model)
        classes = class_names
    else:
        classes = class_list(model, class_names or sorted({label for label in labels if label}), templates)
    names = list(classes.names)
    unknown = sorted({label for label in labels if label} - set(names))
    if unknown:
        raise StoreError(f"column {label_column!r} has classes that were not given: {', '.join(unknown[:10])}")
    rows = [row for row, label in enumerate(labels) if label]
    right = [(names.index(str(labels[row])),) for row in rows]
    answers = scoring.answer(
        model.read_store(store)[rows],
        classes.vectors.to(model.device),
        right,
        logit_multiplier=classes.logit_multiplier,
    )
    paths = store.column("path")
    result = classification_result(
        model,
        answers,
        right,
        names,
        benchmark=Path(store.path).stem,
        dataset=store.path,
        language="own",
        protocol={**_shown(store), "split": f"column {label_column}", "templates": list(classes.templates)},
        show=(lambda places: [Path(paths[rows[place]]) for place in places]) if thumbnails else None,
    )
    return replace(result, seconds=time.monotonic() - started)


def _shown(store: Store) -> dict[str, Any]:
    preprocessing = store.tower.preprocessing
    return {"preprocessing": preprocessing.in_words() if preprocessing else "unknown, vectors were imported"}
