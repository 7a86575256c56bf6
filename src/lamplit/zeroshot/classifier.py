"""Classify images by words: the nearest class text wins (section 3.1)."""

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
from lamplit.model import ImageInput, LiT
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES, fill


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, with their probabilities among all classes asked for.

    `given` are those that reach their threshold, best first, and empty for "none of these"; nothing where the classes
    came without thresholds.
    """

    path: str
    classes: list[str]  # best first
    probabilities: list[float]
    given: list[str] | None = None


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
    """Softmax of the scaled cosines: (N, D) images and (C, D) classes in, (N, C) out."""
    return (model.logit_multiplier.detach() * zimg @ classes.T).softmax(-1)


def class_list(model: LiT, class_names: Sequence[str], templates: Sequence[str] | None = None) -> ClassList:
    """Make a list of classes as the model has them: no thresholds, its own logit scale, one class excludes another.

    Raises:
        UsageError: no classes, no templates, the same class twice, or a template without `{}`.
        TowerError: the model was loaded without its text tower.
    """
    templates = DEFAULT_TEMPLATES if templates is None else templates
    vectors = class_vectors(model, class_names, templates).cpu()
    return ClassList(
        list(class_names),
        list(templates),
        vectors,
        float(model.logit_multiplier.detach()),
        space=model.space,
        image_tower=model.identity.spec,
        text_tower=model.text_tower.spec if model.text_tower else "",
    )


def classify(
    model: LiT,
    images: Sequence[ImageInput],
    classes: Sequence[str] | ClassList,
    *,
    templates: Sequence[str] | None = None,
    top: int = 5,
) -> tuple[list[Prediction], list[Skipped]]:
    """Classify images; those that cannot be used come back in the second list, with the reason.

    Args:
        model: needs its image tower alone where `classes` is a class list.
        images: files, encoded bytes or PIL images.
        classes: names, or a list of `make_classes`.
        templates: prompts, with `{}` for the class name, where names are given.
        top: how many classes to tell of each image.

    Raises:
        UsageError: no classes, no templates, the same class twice, a template without `{}`, or templates for a class
            list, which has its own.
        TowerError: the model was loaded without a tower it needs, or the list is for images of another tower.
    """
    if not isinstance(classes, ClassList):
        classes = class_list(model, classes, templates)
    elif templates is not None:
        raise UsageError("a class list has templates of its own; make another one for other templates")
    classes.require_model(model)
    predictions, skipped = [], []
    for number, image in enumerate(images):
        name = str(image) if isinstance(image, str | Path) else f"image {number}"
        try:
            [probabilities], [given] = classes.classify(model.encode_images([image]))
        except ImageError as error:
            skipped.append(Skipped(name, name, str(error)))
            continue
        order = probabilities.argsort(descending=True).tolist()
        reached = None if classes.thresholds is None else [classes.names[i] for i in order if given[i]]
        shown = order[:top]
        predictions.append(Prediction(name, [classes.names[i] for i in shown], probabilities[shown].tolist(), reached))
    return predictions, skipped
