"""A class list: names, their vectors and thresholds in one file, `classes.json`, which needs no text tower."""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lamplit._version import __version__
from lamplit.errors import TowerError, UsageError
from lamplit.files import write_text
from lamplit.model import LiT
from lamplit.store.table.column_types import as_text
from lamplit.zeroshot.calibration_report import CalibrationReport
from lamplit.zeroshot.names import listed

FORMAT = 1
NONE_LABEL = "none"  # the label of an out-of-class image: one of none of the classes
SEPARATOR = ";"  # between the labels of one image, in a multi-label list
_KIND = "lamplit classes"
_MAX_BYTES = 2**28  # 256 MB: 20,000 classes of width 2,048
_MAX_NAME_LENGTH = 1000
_MAX_TOWER_LENGTH = 10_000  # of the name of a tower, which may be a path


@dataclass(frozen=True, eq=False, repr=False)
class ClassList:
    """Classes that images are classified by, with no text tower.

    An image's answer is its nearest class if the cosine reaches the class's threshold, and else "none of these".
    In a multi-label list (`logit_bias` is a number) it is every class whose threshold is reached.

    Attributes:
        names: the names of the C classes, each of at most 1,000 letters.
        templates: the prompts that were averaged into the vectors, each of at most 1,000 letters.
        vectors: (C, D) float32 unit vectors on the CPU.
        logit_multiplier: what cosines are multiplied by before they become probabilities.
        space: fingerprint of the joint space, as `model.space`.
        image_tower: whose images the list is for.
        text_tower: what read the prompts.
        thresholds: lowest cosine of an answer of each class, (C,); the same one unless multi-label; None for none.
        logit_bias: offset of the logits of a multi-label list; None for classes that exclude each other.
        report: what the labelled sample said; not saved.

    Raises:
        UsageError: a name or a template is too long.

    Example:
        >>> classes = lamplit.make_classes("runs/stamps", ["bird", "fish"])
        >>> classes.save("classes.json")
    """

    names: list[str]
    templates: list[str]
    vectors: Tensor
    logit_multiplier: float
    space: str
    image_tower: str
    text_tower: str
    thresholds: list[float] | None = None
    logit_bias: float | None = None
    report: CalibrationReport | None = None

    def __post_init__(self) -> None:
        require_short(self.names, self.templates)

    def __repr__(self) -> str:
        shown = f"{listed(self.names, 3)}; {'multi-label' if self.multi_label else 'one per image'}"
        thresholds = "no thresholds" if self.thresholds is None else "thresholds"
        return f"<ClassList of {len(self.names)}: {shown}, {thresholds}, for images of {self.image_tower}>"

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several of the classes."""
        return self.logit_bias is not None

    def require_model(self, model: LiT) -> None:
        """Check that the model's images are in the list's space.

        Raises:
            TowerError: they are not; the message names both towers.
        """
        if model.space != self.space:
            raise TowerError(
                f"the class list was made for images of {self.image_tower} (fingerprint {self.space}), not for those "
                f"of {model.identity.spec} (fingerprint {model.space}); make one with: lamplit classes MODEL --classes "
                "a,b,c --out classes.json"
            )

    def cosines(self, zimg: Tensor) -> Tensor:
        """Cosines of (N, D) images with the classes, (N, C) on the CPU."""
        return zimg.detach().float().cpu() @ self.vectors.T

    def probabilities(self, cosines: Tensor) -> Tensor:
        """Turn (N, C) cosines into probabilities: softmax over the classes, or a sigmoid for each if multi-label."""
        if self.logit_bias is not None:
            return (self.logit_multiplier * cosines + self.logit_bias).sigmoid()
        return (self.logit_multiplier * cosines).softmax(-1)

    def given(self, cosines: Tensor) -> Tensor:
        """Tell which classes are the answer, (N, C) of bool; an image without one is "none of these"."""
        reached = torch.ones_like(cosines, dtype=torch.bool)
        if self.thresholds is not None:
            reached = cosines.double() >= torch.tensor(self.thresholds, dtype=torch.float64)
        if self.multi_label:
            return reached
        return reached & torch.nn.functional.one_hot(cosines.argmax(1), len(self.names)).bool()

    def classify(self, zimg: Tensor) -> tuple[Tensor, Tensor]:
        """Classify (N, D) image vectors: their `probabilities` and which classes are `given`, both (N, C)."""
        cosines = self.cosines(zimg)
        return self.probabilities(cosines), self.given(cosines)

    def read_labels(self, cells: Sequence[object], notes: list[str] | None = None) -> tuple[list[int], Tensor]:
        """Read a column of labels: names of classes, their places from 0, or `none` for an out-of-class image.

        In a multi-label list a cell may be a list of names, or names with `;` between them. Empty cells belong to
        images that nobody labelled. A note is added if the labels are places.

        Returns:
            The n rows that are labelled, and which classes each of them has, (n, C) of bool.

        Raises:
            UsageError: a label is not in the list, or an image has two although they exclude each other.
        """
        rows, truth, unknown = [], [], Counter[str]()
        read = [self._split(cell) for cell in cells]
        class_index, said = index_labels(
            self.names, {label for labels in read for label in labels or ()} - {NONE_LABEL}
        )
        if notes is not None:
            notes += said
        for row, labels in enumerate(read):
            if labels is None:
                continue
            classes = torch.zeros(len(self.names), dtype=torch.bool)
            for label in labels:
                if label in class_index:
                    classes[class_index[label]] = True
                elif label != NONE_LABEL:
                    unknown[label] += 1
            rows.append(row)
            truth.append(classes)
        if unknown:
            raise UsageError(
                f"labels that are not among the classes: {', '.join(sorted(unknown)[:10])} ({unknown.total()} in all); "
                f"add them to the classes, or label out-of-class images {NONE_LABEL!r}"
            )
        if not truth:
            raise UsageError("no image of the sample has a label")
        found = torch.stack(truth)
        if not self.multi_label and bool((found.sum(1) > 1).any()):
            raise UsageError("an image has several labels; classes that do not exclude each other need --multi-label")
        return rows, found

    def _split(self, cell: object) -> list[str] | None:
        if isinstance(cell, list):
            return [as_text(label).strip() for label in cell]
        if cell is None or not as_text(cell).strip():
            return None
        parts = as_text(cell).split(SEPARATOR) if self.multi_label else [as_text(cell)]
        return [part.strip() for part in parts if part.strip()]

    def save(self, file: str | Path) -> None:
        """Write the list, without its report, whole or not at all; what `load` reads is the same to the bit.

        Raises:
            UsageError: the file would have more than 256 MB, which `load` refuses.
        """
        values = {
            "kind": _KIND,
            "format": FORMAT,
            "lamplit": __version__,
            "names": self.names,
            "templates": self.templates,
            "logit_scale": self.logit_multiplier,  # its name in format 1
            "logit_bias": self.logit_bias,
            "thresholds": self.thresholds,
            "image_tower": self.image_tower,
            "text_tower": self.text_tower,
            "space": self.space,
            "width": self.vectors.shape[1],
            "vectors": b64encode(self.vectors.numpy().astype("<f4").tobytes()).decode(),  # float32, little-endian
        }
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        if (size := len(text.encode())) > _MAX_BYTES:
            raise UsageError(
                f"the list of {len(self.names):,} classes has {size >> 20:,} MB; expected at most {_MAX_BYTES >> 20}: "
                "make several lists"
            )
        write_text(Path(file), text)

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a list that `save` wrote.

        Raises:
            UsageError: the file is missing, damaged or something else, or a newer lamplit wrote it.
        """
        try:
            if Path(file).stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES >> 20} MB")
            values = json.loads(Path(file).read_text(encoding="utf-8"), parse_constant=_refuse)
            if not isinstance(values, dict) or values.get("kind") != _KIND:
                raise ValueError("it is something else")
            if values["format"] > FORMAT:
                raise ValueError(f"it has format {values['format']}; this lamplit reads up to {FORMAT}: upgrade it")
            return cls(**_checked(values))
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"{file} cannot be read as a class list, which lamplit classes writes: {error or type(error).__name__}"
            ) from error


def require_short(names: Sequence[str], templates: Sequence[str]) -> None:
    """Check that names and templates are no longer than a file of classes may hold.

    Raises:
        UsageError: one is; the message shows how it begins.
    """
    for kind, texts in (("class", names), ("template", templates)):
        for text in texts:
            if len(text) > _MAX_NAME_LENGTH:
                raise UsageError(
                    f"the {kind} {text[:40]!r}... has {len(text):,} letters; expected at most {_MAX_NAME_LENGTH:,}"
                )


def index_labels(names: Sequence[str], labels: Collection[str]) -> tuple[dict[str, int], list[str]]:
    """Find the class of each label: the one of this name or, if all labels are numbers and no name is, at this place.

    Returns:
        The number of the class by label, without labels that are of no class; and a note if they are places.
    """
    by_name = {name: i for i, name in enumerate(names)}
    if not labels or not all(label.isdecimal() for label in labels) or any(name.isdecimal() for name in names):
        return by_name, []
    note = f"labels are numbers, so they are places in the list of classes: 0 is {names[0]}"
    return {label: int(label) for label in labels if int(label) < len(names)}, [note]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Check every field of a file that anybody may have written; return them as arguments of `ClassList`."""
    names, templates = _texts(values, "names"), _texts(values, "templates")
    if not names or len(set(names)) < len(names):
        raise ValueError("it has no names, or one of them twice")
    width = values["width"]
    if not isinstance(width, int) or not 0 < width <= 2**16:
        raise ValueError(f"width {width!r}")
    data = b64decode(values["vectors"], validate=True)
    if len(data) != 4 * len(names) * width:
        raise ValueError(
            f"{len(data)} bytes of vectors; {len(names)} classes of width {width} have {4 * len(names) * width}"
        )
    vectors = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(len(names), width))
    if not bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all()):
        raise ValueError("its vectors are not of length 1")
    thresholds = values["thresholds"]
    if thresholds is not None:
        if not isinstance(thresholds, list) or len(thresholds) != len(names):
            raise ValueError("the number of thresholds is not that of the classes")
        thresholds = [_number(threshold, "thresholds") for threshold in thresholds]
    bias = values["logit_bias"]
    if bias is not None and thresholds is None:
        raise ValueError("multi-label classes without thresholds")
    scale = _number(values["logit_scale"], "logit_scale")
    if scale <= 0:
        raise ValueError(f"logit_scale {scale}")
    origin = {key: _text(values[key], key, _MAX_TOWER_LENGTH) for key in ("space", "image_tower", "text_tower")}
    return {
        "names": names, "templates": templates, "vectors": vectors, "logit_multiplier": scale, "thresholds": thresholds,
        "logit_bias": None if bias is None else _number(bias, "logit_bias"), **origin,
    }  # fmt: skip


def _texts(values: dict[str, Any], key: str) -> list[str]:
    if not isinstance(values[key], list):
        raise TypeError(f"{key} is not a list")
    return [_text(value, key) for value in values[key]]


def _text(value: object, key: str, most: int = _MAX_NAME_LENGTH) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise ValueError(f"{key} has something other than texts of 1 to {most} letters")
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} has something other than numbers")
    return float(value)
