"""Make a class list: its vectors from words; its temperature, thresholds and report from a labelled sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lamplit.data.images import Skipped
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
from lamplit.metrics.ranking import ClassScore, class_scores
from lamplit.model import LiT
from lamplit.store.embedding import open_source
from lamplit.store.lance_store import Store
from lamplit.zeroshot import names as protocol_names
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.classifier import class_list
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

SUGGEST = "suggest"


@dataclass(frozen=True)
class CalibrationReport:
    """What a labelled sample says of a class list.

    What depends on the temperature or a threshold is cross-fitted: each half of the sample is judged by what was fitted
    to the other half. The list itself is fitted to the whole sample. `accuracy` of templates that were chosen on the
    sample is the best of several, and so a little too good.
    """

    sample: str
    images: int  # with one of the classes
    strangers: int  # labelled `none`
    unlabelled: int
    multi_label: bool
    template_sets: dict[str, float]  # what each candidate reached, best first; empty where none were compared
    accuracy: float  # nearest class; for multi-label classes the F1 of all labels
    error_before: float | None  # expected calibration error with the model's own scale, if it has one of the kind
    error_after: float
    scale_before: float
    scale_after: float
    threshold: float | None  # lowest cosine of an answer; multi-label classes have one for each class, in the list
    kept: float | None  # of right answers (of the labels that are there), how many reach the threshold
    rejected: float | None  # of strangers (of the labels that are not there), how many do not
    reliability: list[dict[str, float]]  # bins of the error after
    per_class: list[ClassScore]  # of the answers, thresholds included
    skipped: list[Skipped] = field(default_factory=list)  # images of the sample that could not be used


def make_classes(
    model: LiT,
    names: Sequence[str],
    *,
    templates: Sequence[str] | str | None = None,
    sample: str | Path | Store | None = None,
    label_column: str = "label",
    multi_label: bool = False,
    keep_rate: float | None = None,
    template_sets: Mapping[str, Sequence[str]] | None = None,
    progress: bool = False,
) -> tuple[ClassList, CalibrationReport | None]:
    """Make a class list that classifies without the text tower, calibrated if there is a labelled sample.

    Args:
        model: needs its text tower, and its image tower where the sample is not a store.
        names: of the classes.
        templates: prompts with `{}`, the name of a set, or `suggest`: the set that does best on the sample, which is
            the paper's own search (appendix I.2, on 800 images).
        sample: store, or anything `read_pairs` reads; a few images of each class, and of what else will come.
        label_column: its column with the classes; `none` for images of none of them.
        multi_label: an image may have several of the classes, or none.
        keep_rate: of right answers that the threshold must leave; by default what balances both errors where the sample
            has images of `none`, and else 95 %.
        template_sets: what `templates` chooses from; by default lamplit's own prompts and all of `protocols.names`.
        progress: show a bar on stderr while embedding.

    Returns:
        The list, and what the sample says of it. Without a sample the scale is the model's own, and no image is
        "none of these"; multi-label classes then take a model of the sigmoid loss, and are given from 50 % on.

    Raises:
        UsageError: classes, templates or labels that cannot be meant, or no sample where one is needed.
        StoreError: the sample was embedded by another tower, or lacks the column.
        TowerError: the model was loaded without a tower it needs.
    """
    if keep_rate is not None and not 0 < keep_rate <= 1:
        raise UsageError(f"keep_rate is {keep_rate}; expected more than 0 and at most 1")
    candidates = _candidates(templates, template_sets or _known_sets())
    if sample is None:
        if len(candidates) > 1:
            raise UsageError("templates are suggested by what they do on labelled images: give --sample SOURCE")
        return _unseen(model, class_list(model, names, next(iter(candidates.values()))), multi_label), None
    lists = {name: class_list(model, names, texts) for name, texts in candidates.items()}
    if multi_label:
        bias = 0.0 if model.logit_bias is None else float(model.logit_bias.detach())
        lists = {name: replace(classes, logit_bias=bias) for name, classes in lists.items()}
    any_list = next(iter(lists.values()))
    with open_source(sample, model.unlocked_image_tower, progress=progress) as (store, skipped):
        rows, truth = any_list.read_labels(store.column(label_column))
        if not bool(truth.any()):
            raise UsageError("the sample has no image of any of the classes")
        zimg, size = model.read_store(store)[rows], len(store)
    reached = {name: _goodness(classes, classes.cosines(zimg), truth) for name, classes in lists.items()}
    reached = dict(sorted(reached.items(), key=lambda item: -item[1]))
    best = next(iter(reached))
    classes, cosines = lists[best], lists[best].cosines(zimg)
    fitted = _fit(classes, cosines, truth, keep_rate)
    probabilities, held_out = _cross_fitted(classes, cosines, truth, keep_rate)
    answers, right = _answers(classes, probabilities, truth)
    judged = model.logit_bias is not None or not multi_label
    before = _answers(classes, classes.probabilities(cosines), truth)
    kept, rejected = _kept(classes, cosines, truth, held_out)
    has_class = truth.any(1)
    return fitted, CalibrationReport(
        sample=str(sample.path if isinstance(sample, Store) else sample),
        images=int(has_class.sum()),
        strangers=int((~has_class).sum()),
        unlabelled=size - len(rows),
        multi_label=multi_label,
        template_sets=reached if len(lists) > 1 else {},
        accuracy=reached[best],
        error_before=expected_calibration_error(*before) if judged else None,
        error_after=expected_calibration_error(answers, right),
        scale_before=classes.logit_multiplier,
        scale_after=fitted.logit_multiplier,
        threshold=None if multi_label or fitted.thresholds is None else fitted.thresholds[0],
        kept=kept,
        rejected=rejected,
        reliability=reliability_bins(answers, right),
        per_class=class_scores(held_out, truth, classes.names),
        skipped=skipped,
    )


def _known_sets() -> dict[str, Sequence[str]]:
    sets = {name: protocol_names.templates(name) for name in protocol_names.template_sets()}
    return {"lamplit": DEFAULT_TEMPLATES, **sets}


def _candidates(
    templates: Sequence[str] | str | None, template_sets: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str] | None]:
    """Templates to try, by name."""
    if templates == SUGGEST:
        return dict(template_sets)
    if isinstance(templates, str):
        if templates not in template_sets:
            raise UsageError(
                f"there are no templates {templates!r}; expected a file of them, {SUGGEST}, or one of: "
                f"{', '.join(template_sets)}"
            )
        return {templates: template_sets[templates]}
    return {"given": templates}


def _unseen(model: LiT, classes: ClassList, multi_label: bool) -> ClassList:
    """What a class list is without a sample."""
    if not multi_label:
        return classes
    if model.logit_bias is None:
        raise UsageError(
            "this model was tuned with a softmax, which compares classes: multi-label ones need a labelled sample to "
            "learn from what a cosine means; give --sample SOURCE"
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
    """Probabilities and answers of each half by what is fitted to the other, both (n, C)."""
    probabilities, given = torch.zeros_like(cosines), torch.zeros_like(truth)
    for fit_on, judge in halves(len(cosines)):
        half = _fit(classes, cosines[fit_on], truth[fit_on], keep_rate) if len(fit_on) else classes
        probabilities[judge], given[judge] = half.probabilities(cosines[judge]), half.given(cosines[judge])
    return probabilities, given


def _is_right(cosines: Tensor, truth: Tensor) -> Tensor:
    """Whether the nearest class is one of the image's own, (n,)."""
    return truth.gather(1, cosines.argmax(1, keepdim=True))[:, 0]


def _answers(classes: ClassList, probabilities: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences and whether they were right: the best class of known images, or every label by itself."""
    if classes.multi_label:
        return probabilities.flatten(), truth.flatten()
    known = truth.any(1)
    return probabilities[known].max(1).values, _is_right(probabilities[known], truth[known])


def _kept(classes: ClassList, cosines: Tensor, truth: Tensor, given: Tensor) -> tuple[float | None, float | None]:
    """Share of what is right that is given, and of what is not there that is not."""
    if classes.multi_label:
        there, strange, kept = truth.flatten(), ~truth.flatten(), given.flatten()
    else:
        there, strange, kept = _is_right(cosines, truth), ~truth.any(1), given.any(1)
    return (
        float(kept[there].double().mean()) if bool(there.any()) else None,
        float((~kept[strange]).double().mean()) if bool(strange.any()) else None,
    )


def _goodness(classes: ClassList, cosines: Tensor, truth: Tensor) -> float:
    """What templates are compared by: accuracy, or the F1 of all labels."""
    if not classes.multi_label:
        return float(_is_right(cosines, truth)[truth.any(1)].double().mean())
    given = replace(classes, thresholds=label_thresholds(cosines, truth)).given(cosines)
    counts = [(given & truth).sum(), (truth & ~given).sum(), (given & ~truth).sum(), (~given & ~truth).sum()]
    return float(f1(*counts))
