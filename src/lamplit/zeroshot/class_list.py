"""A class list: names with their vectors, and where their answers end. One file, `classes.json`, and no text tower."""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lamplit._version import __version__
from lamplit.errors import TowerError, UsageError
from lamplit.model import LiT

FORMAT = 1
STRANGER = "none"  # the label of an image that is of none of the classes
SEPARATOR = ";"  # of the labels of one image, in a multi-label list
_KIND = "lamplit classes"
_MAX_BYTES = 2**28  # 256 MB: 20,000 classes of width 2,048
_LONGEST_NAME = 1000


@dataclass(frozen=True, eq=False)
class ClassList:
    """Classes that images can be told by, with no text tower.

    An image's answer is its nearest class, if the cosine reaches the class's threshold, and else "none of these".
    In a multi-label list (`logit_bias` is a number), it is every class whose threshold is reached.
    """

    names: list[str]
    templates: list[str]  # prompts that the vectors are made of
    vectors: Tensor  # unit, (C, D) float32, on the CPU
    logit_multiplier: float  # of cosines, for probabilities
    space: str  # fingerprint of the joint space, see `LiT.space`
    image_tower: str
    text_tower: str
    thresholds: list[float] | None = None  # lowest cosine of each class, (C,); the same one unless multi-label
    logit_bias: float | None = None

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several of the classes."""
        return self.logit_bias is not None

    def require_model(self, model: LiT) -> None:
        """Refuse the images of another tower.

        Raises:
            TowerError: naming both.
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
        """Probability of each class, (N, C): of one among these (softmax), or of each by itself (sigmoid)."""
        if self.logit_bias is not None:
            return (self.logit_multiplier * cosines + self.logit_bias).sigmoid()
        return (self.logit_multiplier * cosines).softmax(-1)

    def given(self, cosines: Tensor) -> Tensor:
        """Tell which classes are the answer, (N, C) of bool; an image without any is of none of these."""
        reached = torch.ones_like(cosines, dtype=torch.bool)
        if self.thresholds is not None:
            reached = cosines.double() >= torch.tensor(self.thresholds, dtype=torch.float64)
        if self.multi_label:
            return reached
        return reached & torch.nn.functional.one_hot(cosines.argmax(1), len(self.names)).bool()

    def classify(self, zimg: Tensor) -> tuple[Tensor, Tensor]:
        """Classify (N, D) images: `probabilities` and `given`, both (N, C)."""
        cosines = self.cosines(zimg)
        return self.probabilities(cosines), self.given(cosines)

    def read_labels(self, cells: Sequence[object]) -> tuple[list[int], Tensor]:
        """Read a column of labels: names of classes, or `none` for an image of none of them.

        A cell may be a list of names, or names between `;`, in a multi-label list. Empty ones are of images
        that nobody labelled.

        Returns:
            The rows that are labelled, n of them, and which classes each has, (n, C) of bool.

        Raises:
            UsageError: a label is no class of the list, or an image has two although they exclude each other.
        """
        place = {name: i for i, name in enumerate(self.names)}
        rows, truth, unknown = [], [], Counter[str]()
        for row, cell in enumerate(cells):
            labels = self._split(cell)
            if labels is None:
                continue
            classes = torch.zeros(len(self.names), dtype=torch.bool)
            for label in labels:
                if label in place:
                    classes[place[label]] = True
                elif label != STRANGER:
                    unknown[label] += 1
            rows.append(row)
            truth.append(classes)
        if unknown:
            raise UsageError(
                f"labels that are none of the classes: {', '.join(sorted(unknown)[:10])} ({unknown.total()} in all); "
                f"add them to the classes, or label images of none of them {STRANGER!r}"
            )
        if not truth:
            raise UsageError("no image of the sample has a label")
        found = torch.stack(truth)
        if not self.multi_label and bool((found.sum(1) > 1).any()):
            raise UsageError("an image has several labels; classes that do not exclude each other need --multi-label")
        return rows, found

    def _split(self, cell: object) -> list[str] | None:
        if isinstance(cell, list):
            return [str(label).strip() for label in cell]
        if cell is None or not str(cell).strip():
            return None
        parts = str(cell).split(SEPARATOR) if self.multi_label else [str(cell)]
        return [part.strip() for part in parts if part.strip()]

    def save(self, file: str | Path) -> None:
        """Write the list; what `load` reads is the same to the bit."""
        values = {
            "kind": _KIND,
            "format": FORMAT,
            "lamplit": __version__,
            "names": self.names,
            "templates": self.templates,
            "logit_scale": self.logit_multiplier,
            "logit_bias": self.logit_bias,
            "thresholds": self.thresholds,
            "image_tower": self.image_tower,
            "text_tower": self.text_tower,
            "space": self.space,
            "width": self.vectors.shape[1],
            "vectors": b64encode(self.vectors.numpy().astype("<f4").tobytes()).decode(),  # float32, little-endian
        }
        Path(file).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UsageError: it is not that, or of a newer lamplit.
        """
        try:
            if Path(file).stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES >> 20} MB")
            values = json.loads(Path(file).read_text(encoding="utf-8"), parse_constant=_refuse)
            if not isinstance(values, dict) or values.get("kind") != _KIND:
                raise ValueError("it is not one")
            if values["format"] > FORMAT:
                raise ValueError(f"it has format {values['format']}; this lamplit reads up to {FORMAT}: upgrade it")
            return cls(**_checked(values))
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"{file} cannot be read as a class list, which lamplit classes writes: {error or type(error).__name__}"
            ) from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of a file that anybody may have written; every one is what it should be, or an error."""
    names, templates = _texts(values, "names"), _texts(values, "templates")
    if not names or len(set(names)) < len(names):
        raise ValueError("its names are none, or not all different")
    width = values["width"]
    if not isinstance(width, int) or not 0 < width <= 2**16:
        raise ValueError(f"width {width!r}")
    data = b64decode(values["vectors"], validate=True)
    if len(data) != 4 * len(names) * width:
        raise ValueError(
            f"{len(data)} bytes of vectors, where {len(names)} classes of width {width} have another number"
        )
    vectors = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(len(names), width))
    if not bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all()):
        raise ValueError("its vectors are not of length 1")
    thresholds = values["thresholds"]
    if thresholds is not None:
        if not isinstance(thresholds, list) or len(thresholds) != len(names):
            raise ValueError("it has not one threshold for each class")
        thresholds = [_number(threshold, "thresholds") for threshold in thresholds]
    bias = values["logit_bias"]
    if bias is not None and thresholds is None:
        raise ValueError("multi-label classes without thresholds")
    scale = _number(values["logit_scale"], "logit_scale")
    if scale <= 0:
        raise ValueError(f"logit_scale {scale}")
    said = {key: _text(values[key], key) for key in ("space", "image_tower", "text_tower")}
    return {
        "names": names, "templates": templates, "vectors": vectors, "logit_multiplier": scale, "thresholds": thresholds,
        "logit_bias": None if bias is None else _number(bias, "logit_bias"), **said,
    }  # fmt: skip


def _texts(values: dict[str, Any], key: str) -> list[str]:
    if not isinstance(values[key], list):
        raise TypeError(f"{key} is no list")
    return [_text(value, key) for value in values[key]]


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"{key} has something that is no text of up to {_LONGEST_NAME} letters")
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} has something that is no number")
    return float(value)
