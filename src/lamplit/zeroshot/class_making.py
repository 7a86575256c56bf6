"""Make a class list: its vectors from words; its temperature, thresholds and report from a labelled sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lamplit.data.skipped import Skipped
from lamplit.errors import UsageError
from lamplit.metrics.calibration import (
    expected_calibration_error,
    f1,
    fit_sigmoid,
    fit_temperature,
    halves,
    label_thresholds,
    none_threshold,
    reliability_bins,
)
from lamplit.metrics.ranking import class_scores
from lamplit.model import LiT, as_model
from lamplit.store.embed.embedding import open_source
from lamplit.store.lance_store import Store
from lamplit.zeroshot import names as protocol_names
from lamplit.zeroshot.calibration_report import CalibrationReport
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.classifier import class_list

SUGGEST = "suggest"


class _Sample(NamedTuple):
    """Labelled images of a sample, as far as they are labelled."""

    name: str
    zimg: Tensor  # (n, D) in the model's joint space
    truth: Tensor  # (n, C) of bool: which classes each image has
    unlabelled: int
    skipped: list[Skipped]
    notes: list[str]


def make_classes(
    model: str | Path | LiT,
    names: Sequence[str],
    *,
    templates: Sequence[str] | str | None = None,
    sample: str | Path | Store | None = None,
    label_column: str = "label",
    multi_label: bool = False,
    keep_rate: float | None = None,
    template_sets: Mapping[str, Sequence[str]] | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> ClassList:
    """Make a class list that classifies without the text tower, calibrated if there is a labelled sample.

    Without a sample the list has the model's own logit multiplier and no thresholds, so no image is "none of these".
    Multi-label classes then need a model of the sigmoid loss, and are given from a probability of 50 % on.

    On the command line: `lamplit classes`.

    Args:
        model: a folder, `lit:NAME`, or an open model with its text tower, and its image tower if the sample is not a
            store.
        names: the names of the classes.
        templates: prompts with `{}`, or one; the name of a set; or `suggest`: the set that does best on the sample,
            which is the paper's own search (appendix I.2, on 800 images).
        sample: a store, or anything `read_pairs` reads; a few images of each class, and of what else will come.
        label_column: the sample's column with the classes; `none` for out-of-class images.
        multi_label: an image may have several of the classes, or none.
        keep_rate: share of right answers that must reach the threshold; by default what balances both errors if the
            sample has out-of-class images, and else 0.95.
        template_sets: what `templates` chooses from; by default lamplit's own prompts, and those of the
            paper, CLIP and big_vision (clip-80, paper-pets, ...).
        device: torch device of a model to be loaded; by default the accelerator, if there is one.
        progress: show a bar on stderr while embedding.

    Returns:
        The list; its `report` is what the sample said of it, None without a sample.

    Raises:
        UsageError: classes, templates or labels that do not fit together, or no sample although one is needed.
        StoreError: the sample was embedded by another tower, or lacks the column.
        TowerError: the model was loaded without a tower it needs.

    Example:
        >>> classes = lamplit.make_classes("runs/stamps", ["bird", "fish"], sample="sample.csv")
        >>> classes.report.accuracy
    """
    if keep_rate is not None and not 0 < keep_rate <= 1:
        raise UsageError(f"keep_rate is {keep_rate}; expected more than 0 and at most 1")
    candidates = _candidates(templates, template_sets or protocol_names.known_template_sets())
    opened = as_model(model, device, towers="text" if sample is None or _is_store(sample) else "both")
    if sample is None:
        if len(candidates) > 1:
            raise UsageError("templates are suggested by what they do on labelled images: give --sample SOURCE")
        return _uncalibrated(opened, class_list(opened, names, next(iter(candidates.values()))), multi_label)
    lists = {name: class_list(opened, names, texts) for name, texts in candidates.items()}
    if multi_label:
        bias = 0.0 if opened.logit_bias is None else float(opened.logit_bias.detach())
        lists = {name: replace(classes, logit_bias=bias) for name, classes in lists.items()}
    labelled = _read_sample(opened, sample, label_column, next(iter(lists.values())), progress)
    scores = {name: _selection_score(each, each.cosines(labelled.zimg), labelled.truth) for name, each in lists.items()}
    scores = dict(sorted(scores.items(), key=lambda item: -item[1]))
    best = next(iter(scores))
    has_own_scale = opened.logit_bias is not None or not multi_label
    return _calibrate(lists[best], labelled, keep_rate, scores, has_own_scale=has_own_scale)


def _is_store(sample: str | Path | Store) -> bool:
    return isinstance(sample, Store) or Store.exists(sample)


def _read_sample(
    model: LiT, source: str | Path | Store, label_column: str, classes: ClassList, progress: bool
) -> _Sample:
    """Read or embed the sample, and its labels."""
    with open_source(source, model.unlocked_image_tower, device=model.device, progress=progress) as opened:
        store = opened.store
        notes = list(opened.notes)
        rows, truth = classes.read_labels(store.column(label_column), notes)
        if not bool(truth.any()):
            raise UsageError("the sample has no image of any of the classes")
        name = str(source.path if isinstance(source, Store) else source)
        return _Sample(name, model.read_store(store)[rows], truth, len(store) - len(rows), opened.skipped, notes)


def _calibrate(
    classes: ClassList, sample: _Sample, keep_rate: float | None, scores: dict[str, float], *, has_own_scale: bool
) -> ClassList:
    """Fit the list to the whole sample, and report what fits to half of it do on the other half.

    `scores` are those of the candidate templates, best first; `has_own_scale` says whether the model's own logit
    multiplier is meant for such probabilities.
    """
    truth, cosines = sample.truth, classes.cosines(sample.zimg)
    fitted = _fit(classes, cosines, truth, keep_rate)
    probabilities, held_out = _cross_fitted(classes, cosines, truth, keep_rate)
    answers, right = _answers(classes, probabilities, truth)
    before = _answers(classes, classes.probabilities(cosines), truth)
    kept, rejected = _kept(classes, cosines, truth, held_out)
    has_class = truth.any(1)
    report = CalibrationReport(
        sample=sample.name,
        images=int(has_class.sum()),
        out_of_class=int((~has_class).sum()),
        unlabelled=sample.unlabelled,
        multi_label=classes.multi_label,
        template_sets=scores if len(scores) > 1 else {},
        accuracy=_label_f1(held_out, truth) if classes.multi_label else next(iter(scores.values())),
        error_before=expected_calibration_error(*before) if has_own_scale else None,
        error_after=expected_calibration_error(answers, right),
        scale_before=classes.logit_multiplier,
        scale_after=fitted.logit_multiplier,
        threshold=None if classes.multi_label or fitted.thresholds is None else fitted.thresholds[0],
        kept=kept,
        rejected=rejected,
        reliability=reliability_bins(answers, right),
        per_class=class_scores(held_out, truth, classes.names),
        skipped=sample.skipped,
        notes=sample.notes,
    )
    return replace(fitted, report=report)


def _candidates(
    templates: Sequence[str] | str | None, template_sets: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """Return the templates to try, by name."""
    if templates == SUGGEST:
        return dict(template_sets)
    name = templates if isinstance(templates, str) and "{}" not in templates else "given"
    return {name: protocol_names.as_templates(templates, template_sets, others=f"{SUGGEST}, ")}


def _uncalibrated(model: LiT, classes: ClassList, multi_label: bool) -> ClassList:
    """Return what a class list is without a sample."""
    if not multi_label:
        return classes
    if model.logit_bias is None:
        raise UsageError(
            "this model was tuned with a softmax, which compares classes: multi-label ones need a labelled sample, "
            "which says what a cosine means; give --sample SOURCE"
        )
    bias = float(model.logit_bias.detach())
    thresholds = [-bias / classes.logit_multiplier] * len(classes.names)
    return replace(classes, logit_bias=bias, thresholds=thresholds)


def _fit(classes: ClassList, cosines: Tensor, truth: Tensor, keep_rate: float | None) -> ClassList:
    """Fit temperature and thresholds to images: cosines (n, C) and which classes they have (n, C)."""
    if classes.multi_label:
        scale, bias = fit_sigmoid(cosines, truth)
        thresholds = label_thresholds(cosines, truth)
        return replace(classes, logit_multiplier=scale, logit_bias=bias, thresholds=thresholds)
    known = truth.any(1)
    scale = classes.logit_multiplier
    if len(classes.names) > 1 and bool(known.any()):
        scale = fit_temperature(cosines[known], truth[known].long().argmax(1))
    threshold = none_threshold(cosines.max(1).values, _is_right(cosines, truth), ~known, keep_rate)
    return replace(classes, logit_multiplier=scale, thresholds=[threshold] * len(classes.names))


def _cross_fitted(classes: ClassList, cosines: Tensor, truth: Tensor, keep_rate: float | None) -> tuple[Tensor, Tensor]:
    """Return probabilities and answers of each half by what is fitted to the other, both (n, C)."""
    probabilities, given = torch.zeros_like(cosines), torch.zeros_like(truth)
    for fit_on, judge in halves(len(cosines)):
        half = _fit(classes, cosines[fit_on], truth[fit_on], keep_rate) if len(fit_on) else classes
        probabilities[judge], given[judge] = half.probabilities(cosines[judge]), half.given(cosines[judge])
    return probabilities, given


def _is_right(cosines: Tensor, truth: Tensor) -> Tensor:
    """Tell whether the nearest class is one of the image's own, (n,)."""
    return truth.gather(1, cosines.argmax(1, keepdim=True))[:, 0]


def _answers(classes: ClassList, probabilities: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return confidences and whether they were right: of the best class of known images, or of every label."""
    if classes.multi_label:
        return probabilities.flatten(), truth.flatten()
    known = truth.any(1)
    return probabilities[known].max(1).values, _is_right(probabilities[known], truth[known])


def _kept(classes: ClassList, cosines: Tensor, truth: Tensor, given: Tensor) -> tuple[float | None, float | None]:
    """Return the share of right answers that are given, and of out-of-class images (labels) that are not."""
    if classes.multi_label:
        there, absent, kept = truth.flatten(), ~truth.flatten(), given.flatten()
    else:
        there, absent, kept = _is_right(cosines, truth), ~truth.any(1), given.any(1)
    return (
        float(kept[there].double().mean()) if bool(there.any()) else None,
        float((~kept[absent]).double().mean()) if bool(absent.any()) else None,
    )


def _selection_score(classes: ClassList, cosines: Tensor, truth: Tensor) -> float:
    """Score templates on the whole sample: accuracy of the nearest class, or the F1 of all labels."""
    if not classes.multi_label:
        return float(_is_right(cosines, truth)[truth.any(1)].double().mean())
    return _label_f1(replace(classes, thresholds=label_thresholds(cosines, truth)).given(cosines), truth)


def _label_f1(given: Tensor, truth: Tensor) -> float:
    """Return the F1 of all labels of all images together, both (n, C) of bool; 0 if none is there or given."""
    counts = [(given & truth).sum(), (truth & ~given).sum(), (given & ~truth).sum(), (~given & ~truth).sum()]
    return float(f1(*counts).nan_to_num(0.0))
