"""Tasks of a benchmark: its images, the right answers, and how both are put to a model.

A reader of this folder takes the folder of a data set, as its authors publish it, and returns its tasks. Nothing is
decoded here, and no model is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamplit.data.pairs import Pairs


@dataclass(frozen=True)
class ImageSet:
    """The images of a task. Tasks with the same `key` and `root` have the same images, and share a store.

    `ids` are those of all the pairs, so that a finished store is known without reading an image.
    """

    key: str  # such as imagenet-val
    root: Path
    pairs: Pairs
    ids: Sequence[str]
    border: int = 0  # pixels to cut off on every side before anything else (ObjectNet's red frame)


@dataclass(frozen=True)
class Labelled:
    """Images whose classes are known: `labels` holds the right ones of each image by its id, often one."""

    images: ImageSet
    labels: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Classification:
    """Zero-shot classification: images, their right classes, and what the classes are called.

    `labels` has the images that count: not those without a right class (ImageNet ReaL), nor those of classes outside
    the benchmark (ObjectNet).
    """

    benchmark: str  # the name on the command line, such as imagenet-v2
    title: str  # as papers write it, such as ImageNet V2
    test: Labelled
    class_names: Sequence[Sequence[str]]  # of each entry, one name or several whose prompts are averaged
    templates: str  # name of a template set, see `names.templates`
    split: str  # in words, such as: validation, 50,000 images
    entry_class: Sequence[int] | None = None  # class of each entry, if a class has several; its best one counts
    language: str = "en"
    template_texts: Sequence[str] | None = None  # if the set has no name, as for another language
    crop: float = 0.875  # centre of the resized image that big_vision's protocol shows (0.75 for ImageNet-A)
    training: Callable[[], Labelled] | None = None  # for the few-shot probe; listed when it is called
    notes: Sequence[str] = field(default_factory=tuple)  # what differs from the paper's protocol


@dataclass(frozen=True)
class Retrieval:
    """Image-text retrieval: images and the captions of each, every caption an item of its own."""

    benchmark: str
    title: str
    images: ImageSet
    captions: Mapping[str, Sequence[str]]  # of each image that counts, by its id
    split: str
    language: str = "en"
    notes: Sequence[str] = field(default_factory=tuple)


Task = Classification | Retrieval
