"""From vectors and answers to results, the same for a user's own data and for benchmarks."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from lamplit._version import __version__
from lamplit.data.decoding.images import read_thumbnail
from lamplit.errors import ImageError
from lamplit.metrics import scoring
from lamplit.metrics.bootstrap import measure
from lamplit.metrics.calibration import expected_calibration_error, reliability_bins
from lamplit.metrics.results import Measure, Result, TaskName

THUMBNAIL = 96  # pixels of the longer side
EXAMPLES = 3  # images of each confusion


@dataclass(frozen=True)
class Subject:
    """What is measured and how: the part of a result that is known before the figures; see `Result`.

    Make it when the measurement begins: `started` counts the result's seconds.
    """

    model: Mapping[str, str]
    benchmark: str
    dataset: str
    language: str
    protocol: Mapping[str, Any]
    source: str = ""
    split: str = ""
    column: str = ""
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)

    def result(self, task: TaskName, main_metric: str, metrics: Mapping[str, Measure], **counts: Any) -> Result:
        """Build the result from the figures and the other fields of `Result`."""
        return Result(
            task=task,
            benchmark=self.benchmark,
            dataset=self.dataset,
            language=self.language,
            main_metric=main_metric,
            metrics=metrics,
            model=self.model,
            protocol=self.protocol,
            source=self.source,
            split=self.split,
            column=self.column,
            skipped=self.skipped,
            versions=library_versions(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.monotonic() - self.started,
            **counts,
        )


def retrieval_result(subject: Subject, zimg: Tensor, ztxt: Tensor, links: tuple[Tensor, Tensor]) -> Result:
    """Measure retrieval in both directions between N images and M texts.

    Args:
        subject: what is measured.
        zimg: unit vectors of the images, (N, D).
        ztxt: unit vectors of the texts, (M, D).
        links: the true pairs, as rows of `zimg` and of `ztxt`, (L,) each.
    """
    metrics, curves = scoring.retrieval(zimg.to(ztxt.device), ztxt, *links)
    return subject.result(
        "image-text retrieval", "image_to_text/recall@1", metrics,
        images=len(zimg), captions=len(ztxt), recall_curve=curves,
    )  # fmt: skip


def classification_result(
    subject: Subject,
    answers: scoring.Answers,
    labels: Sequence[tuple[int, ...]],
    names: Sequence[str],
    *,
    read_images: Callable[[Sequence[int]], Sequence[Path | bytes]] | None = None,
) -> Result:
    """Measure what a classifier answered to N images.

    Args:
        subject: what is measured.
        answers: the answers to the N images.
        labels: the right classes of each.
        names: names of the C classes.
        read_images: returns the images of some rows of the N, as files or bytes; if given, thumbnails of what was
            confused are kept.
    """
    right = answers.ranks == 1
    return subject.result(
        "zero-shot classification",
        "accuracy@1",
        scoring.accuracies(answers, labels),
        images=len(labels),
        classes=len(names),
        per_class=scoring.per_class(answers, labels, names),
        confusions=_confusions(answers, labels, names, read_images),
        reliability={
            "error": expected_calibration_error(answers.confidences, right),
            "bins": reliability_bins(answers.confidences, right),
        },
    )


def probe_result(subject: Subject, right: Tensor, shots: int, num_classes: int) -> Result:
    """Measure a few-shot probe.

    Args:
        subject: what is measured.
        right: how often each of N images was right over the draws, (N,), 0 to 1.
        shots: training images of each class.
        num_classes: C.
    """
    metric = f"{shots}-shot_accuracy"
    return subject.result(
        "few-shot classification", metric, {metric: measure(right)}, images=len(right), classes=num_classes
    )


def _confusions(
    answers: scoring.Answers,
    labels: Sequence[tuple[int, ...]],
    names: Sequence[str],
    read_images: Callable[[Sequence[int]], Sequence[Path | bytes]] | None,
) -> list[dict[str, Any]]:
    confused = scoring.confusions(answers, labels)
    chosen = [row for *_, rows in confused for row in rows[:EXAMPLES]] if read_images else []
    thumbnails = dict(zip(chosen, map(thumbnail, read_images(chosen)), strict=True)) if read_images else {}
    return [
        {
            "class": names[label],
            "predicted": names[predicted],
            "images": len(rows),
            "examples": [thumbnails[row] for row in rows if row in thumbnails],
        }
        for label, predicted, rows in confused
    ]


def thumbnail(source: Path | bytes) -> str:
    """Return a small JPEG as a data URI; an empty string if the image cannot be read any more."""
    try:
        image = read_thumbnail(source, THUMBNAIL)
    except ImageError:
        return ""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    libraries = ("torch", "torchvision", "timm", "transformers", "pillow")
    return {"lamplit": __version__, **{name: version(name) for name in libraries}}
