"""Classify images by words: the nearest class text wins (section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lamplit.data.decoding.images import read_batches
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.inputs import ImageInput, decode_input, list_images, list_texts
from lamplit.data.pairs import Pair
from lamplit.data.skipped import Skipped
from lamplit.errors import ImageError, UsageError
from lamplit.model import LiT, as_model
from lamplit.progress import progress_bar
from lamplit.zeroshot.class_list import ClassList, require_short
from lamplit.zeroshot.names import as_templates
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES, fill


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, with their probabilities among all classes asked for.

    Attributes:
        path: of the image's file; "image 3" if the fourth image is not a file.
        classes: the best classes, best first; `top` of them.
        probabilities: of `classes`, 0 to 1, in the same order.
        given: the classes that reach the threshold of a calibrated class list, best first: the answer. Empty if the
            image is none of these; None if the classes have no thresholds.
    """

    path: str
    classes: list[str]
    probabilities: list[float]
    given: list[str] | None = None


@dataclass(frozen=True)
class ClassifyResult:
    """What `classify` found. Iterating and `len` go over the predictions.

    Attributes:
        predictions: of the images that could be used, in the order given; match them to images by their `path`.
        skipped: images that could not be used, each with the reason.
        class_names: the names of all C classes.
        probabilities: (N, C) float32 on the CPU: a row for each prediction, a column for each class name.

    Example:
        >>> result = lamplit.classify("runs/stamps", ["owl.png", "carp.png"], ["bird", "fish"])
        >>> [prediction.classes[0] for prediction in result]
        ['bird', 'fish']
    """

    predictions: list[Prediction]
    skipped: list[Skipped]
    class_names: list[str]
    probabilities: Tensor = field(repr=False)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, row: int) -> Prediction:
        return self.predictions[row]


def class_vectors(model: LiT, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """Embed classes: for each, the mean of its prompts' unit vectors, made unit again. (C, D).

    Raises:
        UsageError: no classes, no templates, the same class twice, or a template without `{}`.
    """
    class_names = _list_names(class_names)
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
    row: dict[str, int] = {}
    for prompt in chain.from_iterable(prompts):
        row.setdefault(prompt, len(row))
    ztxt = encode(list(row))
    flat = torch.tensor([row[prompt] for prompt in chain.from_iterable(prompts)], device=ztxt.device)
    owner = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(each) for each in prompts]))
    sums = ztxt.new_zeros(len(prompts), ztxt.shape[1]).index_add_(0, owner.to(ztxt.device), ztxt[flat])
    return F.normalize(sums, dim=-1)


def predict_proba(model: LiT, zimg: Tensor, classes: Tensor) -> Tensor:
    """Return the softmax of the scaled cosines: (N, D) images and (C, D) classes in, (N, C) out."""
    return (model.logit_multiplier.detach() * zimg @ classes.T).softmax(-1)


def class_list(model: LiT, class_names: Sequence[str], templates: str | Sequence[str] | None = None) -> ClassList:
    """Make a list of classes as the model has them: no thresholds, its own logit multiplier, one class an image.

    Raises:
        UsageError: no classes, no templates, the same class twice, a template without `{}`, or one of more than 1,000
            letters.
        TowerError: the model was loaded without its text tower.
    """
    names, prompts = _list_names(class_names), as_templates(templates)
    require_short(names, prompts)  # before anything is encoded
    vectors = class_vectors(model, names, prompts).cpu()
    return ClassList(
        names,
        prompts,
        vectors,
        float(model.logit_multiplier.detach()),
        space=model.space,
        image_tower=model.identity.spec,
        text_tower=model.text_tower.spec if model.text_tower else "",
    )


def classify(
    model: str | Path | LiT,
    images: ImageInput | Iterable[ImageInput],
    classes: Sequence[str] | ClassList,
    *,
    templates: str | Sequence[str] | None = None,
    top: int = 5,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
    device: str | torch.device | None = None,
) -> ClassifyResult:
    """Classify images; those that cannot be used are skipped and listed with the reason.

    On the command line: `lamplit classify`.

    Args:
        model: a folder, `lit:NAME`, or an open model. It needs its image tower alone if `classes` is a class list.
        images: a path, encoded bytes, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W); or a list of
            these; or a batch of shape (N, H, W, 3) as an array, (N, 3, H, W) as a tensor. A folder is not an image.
        classes: names, or what `make_classes` or `ClassList.load` returned.
        templates: prompts with `{}` for the class name, or one of them, or the name of a set such as `clip-80`; only
            with names.
        top: how many classes each prediction has.
        batch_size: images that are decoded and encoded together.
        workers: processes that decode files ahead of the tower; with any, a script needs
            `if __name__ == "__main__":`. Images that are no files are decoded in this process.
        progress: show a bar on stderr.
        device: torch device of a model to be loaded; by default the accelerator, if there is one.

    Returns:
        Predictions, skipped images, and the probabilities of all classes. `predictions` has only the images that could
        be used; match them by `.path`.

    Raises:
        UsageError: no classes, no templates, the same class twice, a template without `{}`, templates for a class
            list, which has its own, or something that is no image.
        TowerError: the model was loaded without a tower it needs, or the list is for images of another tower.

    Example:
        >>> lamplit.classify("runs/stamps", "owl.png", ["bird", "fish"])[0].classes
        ['bird', 'fish']
    """
    for name, value in (("batch_size", batch_size), ("top", top)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    opened = as_model(model, device, towers="image" if isinstance(classes, ClassList) else "both")
    if not isinstance(classes, ClassList):
        classes = class_list(opened, classes, templates)
    elif templates is not None:
        raise UsageError("a class list has templates of its own; make another one for other templates")
    classes.require_model(opened)
    given, _ = list_images(images)
    preprocessing = opened.image_preprocessing()
    predictions, skipped, parts = [], [], [torch.empty(0, len(classes.names))]
    with progress_bar("classify", len(given), shown=progress) as advance:
        for rows, pixels, bad in _batches(given, preprocessing, batch_size, workers):
            skipped += bad
            if rows:
                probabilities, reached = classes.classify(opened.encode_pixels(pixels))
                parts.append(probabilities)
                for row, *each in zip(rows, probabilities, reached, strict=True):
                    predictions.append(_prediction(_name(given[row], row), classes, *each, top=top))
            advance(len(rows) + len(bad), f"{len(skipped)} skipped" if skipped else "")
    return ClassifyResult(predictions, skipped, list(classes.names), torch.cat(parts))


def _list_names(class_names: Iterable[str]) -> list[str]:
    names, is_one = list_texts(class_names)
    if is_one:
        raise UsageError(f"the classes are one text, {class_names!r}; expected a list of names, such as ['cat', 'dog']")
    for row, name in enumerate(names):
        if not name.strip():
            raise UsageError(f"class name {row} is empty; expected a name such as 'cat'")
    return names


def _prediction(path: str, classes: ClassList, probabilities: Tensor, given: Tensor, *, top: int) -> Prediction:
    order = probabilities.argsort(descending=True).tolist()
    reached = None if classes.thresholds is None else [classes.names[i] for i in order if given[i]]
    shown = order[:top]
    return Prediction(path, [classes.names[i] for i in shown], probabilities[shown].tolist(), reached)


_Batch = tuple[list[int], Tensor, list[Skipped]]  # rows that are good, their pixels (n, 3, height, width), the others


def _batches(
    images: Sequence[ImageInput], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[_Batch]:
    """Decode and resize images in batches: files in worker processes, if there are any, other images here."""
    files = [
        Pair(str(row), Path(image) if isinstance(image, str) else image, (), {})
        for row, image in enumerate(images)
        if isinstance(image, str | Path | bytes)
    ]
    if len(files) < len(images):
        yield from _batches_here(images, preprocessing, batch_size)
        return
    for batch in read_batches(files, preprocessing, batch_size=batch_size, workers=workers):
        bad = [_skipped(images[int(item.id)], int(item.id), item.reason) for item in batch.skipped]
        yield [int(pair.id) for pair in batch.pairs], batch.images, bad


def _batches_here(images: Sequence[ImageInput], preprocessing: Preprocessing, batch_size: int) -> Iterator[_Batch]:
    for start in range(0, len(images), batch_size):
        rows, pixels, bad = [], [torch.empty(0, 3, *preprocessing.image_size, dtype=torch.uint8)], []
        for row, image in enumerate(images[start : start + batch_size], start):
            try:
                pixels.append(preprocessing.resize(decode_input(image))[None])
                rows.append(row)
            except ImageError as error:
                bad.append(_skipped(image, row, str(error)))
        yield rows, torch.cat(pixels), bad


def _name(image: ImageInput, row: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {row}"


def _skipped(image: ImageInput, row: int, reason: str) -> Skipped:
    name = _name(image, row)
    return Skipped(name, name, reason)
