"""What a labelled sample says of a class list."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamplit.data.images import Skipped
from lamplit.metrics.ranking import ClassScore


@dataclass(frozen=True)
class CalibrationReport:
    """What a labelled sample says of a class list.

    Everything that depends on the temperature or a threshold is cross-fitted: each half of the sample is judged by
    what was fitted to the other half. The list itself is fitted to the whole sample. If templates were chosen on the
    sample, the figures in `template_sets` are those of the choice, and the best of several is a little too good; so is
    `accuracy` of classes that exclude each other, which depends on the templates alone.
    """

    sample: str
    images: int  # with one of the classes
    out_of_class: int  # images labelled `none`
    unlabelled: int
    multi_label: bool
    template_sets: dict[str, float]  # score of each candidate on the whole sample, best first; empty if one was given
    accuracy: float  # of the nearest class; for multi-label classes the cross-fitted F1 of all labels
    error_before: float | None  # expected calibration error with the model's own scale; None without a usable one
    error_after: float
    scale_before: float
    scale_after: float
    threshold: float | None  # lowest cosine of an answer; None for multi-label classes, which have one each
    kept: float | None  # share of right answers (of labels that are there) that reach the threshold
    rejected: float | None  # share of out-of-class images (of labels that are not there) that do not
    reliability: list[dict[str, float]]  # bins of `error_after`
    per_class: list[ClassScore]  # of the answers, thresholds included
    skipped: list[Skipped] = field(default_factory=list)  # images of the sample that could not be used
