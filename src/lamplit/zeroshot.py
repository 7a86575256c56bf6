"""Classify pictures by words: the nearest class text wins (section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lamplit.data.images import Skipped
from lamplit.errors import ImageError, UsageError
from lamplit.model import LiT, Picture
from lamplit.prompts import DEFAULT_TEMPLATES, fill


@dataclass(frozen=True)
class Prediction:
    """The best classes of one picture, with their probabilities among all classes asked for."""

    path: str
    classes: list[str]  # best first
    probabilities: list[float]


def class_vectors(model: LiT, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """Embed classes: for each, the mean of its prompts' unit vectors, made unit again. (C, D).

    Raises:
        UsageError: no classes, no templates, the same class twice, or a template without `{}`.
    """
    if not class_names:
        raise UsageError("no classes to choose from; give --classes a,b,c or --classes-file FILE")
    if not templates:
        raise UsageError("no templates to put the classes into; give one a line, such as: a photo of a {}.")
    twice = sorted(name for name, count in Counter(class_names).items() if count > 1)
    if twice:
        raise UsageError(f"classes given twice: {', '.join(twice)}")
    return average_prompts(model.encode_texts, [[name] for name in class_names], templates)


def average_prompts(
    encode: Callable[[Sequence[str]], Tensor], class_names: Sequence[Sequence[str]], templates: Sequence[str]
) -> Tensor:
    """Embed classes of one or several names: the mean of all their prompts' unit vectors, made unit again. (C, D).

    Args:
        encode: M texts in, (M, D) unit vectors out; each distinct prompt is asked for once.
        class_names: the names of each class, at least one.
        templates: prompts with `{}`, at least one.
    """
    prompts = [[prompt for name in names for prompt in fill(name, templates)] for names in class_names]
    place: dict[str, int] = {}
    for prompt in chain.from_iterable(prompts):
        place.setdefault(prompt, len(place))
    ztxt = encode(list(place))
    flat = torch.tensor([place[prompt] for prompt in chain.from_iterable(prompts)], device=ztxt.device)
    owner = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(each) for each in prompts]))
    sums = ztxt.new_zeros(len(prompts), ztxt.shape[1]).index_add_(0, owner.to(ztxt.device), ztxt[flat])
    return F.normalize(sums, dim=-1)


def predict_proba(model: LiT, zimg: Tensor, classes: Tensor) -> Tensor:
    """Softmax of the scaled cosines: (N, D) pictures and (C, D) classes in, (N, C) out."""
    return (model.logit_scale.detach() * zimg @ classes.T).softmax(-1)


def classify(
    model: LiT,
    images: Sequence[Picture],
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    top: int = 5,
) -> tuple[list[Prediction], list[Skipped]]:
    """Classify pictures; those that cannot be used come back in the second list, with the reason.

    Raises:
        UsageError: no classes, no templates, the same class twice, or a template without `{}`.
        TowerError: the model was loaded without one of its towers.
    """
    classes = class_vectors(model, class_names, templates)
    predictions, skipped = [], []
    for number, image in enumerate(images):
        name = str(image) if isinstance(image, str | Path) else f"picture {number}"
        try:
            probabilities = predict_proba(model, model.encode_images([image]), classes)[0]
        except ImageError as error:
            skipped.append(Skipped(name, name, str(error)))
            continue
        best = torch.topk(probabilities, min(top, len(class_names)))
        predictions.append(Prediction(name, [class_names[i] for i in best.indices.tolist()], best.values.tolist()))
    return predictions, skipped
