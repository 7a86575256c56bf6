"""What a labelled sample says of a class list."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamplit.data.skipped import Skipped
from lamplit.metrics.ranking import ClassScore


@dataclass(frozen=True)
class CalibrationReport:
    """What a labelled sample says of a class list.

    Everything that depends on the temperature or a threshold is cross-fitted: each half of the sample is judged by
    what was fitted to the other half. The list itself is fitted to the whole sample. If templates were chosen on the
    sample, the figures in `template_sets` are those of the choice, and the best of several is a little too good; so is
    `accuracy` of classes that exclude each other, which depends on the templates alone.

    Attributes:
        sample: path of the labelled sample.
        images: number of images with one of the classes.
        out_of_class: number of images labelled `none`.
        unlabelled: number of images without a label, which are left out.
        multi_label: whether an image may have several classes.
        template_sets: score of each candidate on the whole sample, best first; empty if one was given.
        accuracy: of the nearest class, 0 to 1; for multi-label classes the cross-fitted F1 of all labels.
        error_before: expected calibration error, 0 to 1, with the model's own logit multiplier; None if it cannot be
            used.
        error_after: expected calibration error with the fitted logit multiplier.
        scale_before: the model's own logit multiplier.
        scale_after: the fitted logit multiplier.
        threshold: lowest cosine of an answer; None for multi-label classes, which have one each.
        kept: share of right answers (of labels that are there) that reach the threshold, 0 to 1; None if
            there are none.
        rejected: share of out-of-class images (of labels that are not there) that do not reach it;
            None if there are none.
        reliability: bins of `error_after`, each with its mean `confidence`, its `accuracy` and number of `images`.
        per_class: precision, recall and the most common mistake of each class, thresholds included.
        skipped: images of the sample that could not be used.
        notes: what to know about the sample, in plain sentences.
    """

    sample: str
    images: int
    out_of_class: int
    unlabelled: int
    multi_label: bool
    template_sets: dict[str, float]
    accuracy: float
    error_before: float | None
    error_after: float
    scale_before: float
    scale_after: float
    threshold: float | None
    kept: float | None
    rejected: float | None
    reliability: list[dict[str, float]]
    per_class: list[ClassScore]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
