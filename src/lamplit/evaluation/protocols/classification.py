"""The steps that all readers of classification data sets share: list images by class, check the classes, make the task.

A copy that lacks a class, or has one too many, is refused: its accuracy would not be the benchmark's. A copy with fewer
images of every class is a sample, and its task says so.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamplit.data.pairs import Pair, Pairs
from lamplit.data.places.image_files import walk
from lamplit.data.valid_text import valid_id
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.tasks import Classification, ImageSet, Labelled
from lamplit.zeroshot.names import listed


def zero_shot(
    benchmark: str,
    title: str,
    test: Labelled,
    names: Sequence[Sequence[str]],
    *,
    split: str,
    size: int,
    every_class: bool = True,
    **more: Any,
) -> Classification:
    """Make a task; a note says if it has another number of images than the data set.

    Args:
        benchmark: its name on the command line.
        title: its name in papers.
        test: the images that count, and their labels.
        names: of each entry, see `Classification`.
        split: in words; the number of images is added.
        size: the number of images that count in the whole data set, 0 if unknown.
        every_class: refuse a class without images; several labels an image (ReaL) need not have each.
        more: further fields of `Classification`.

    Raises:
        PairsError: a class has no image, or an image no class, or there is one class alone.
    """
    of_entry = more.get("entry_class") or range(len(names))
    if len({*of_entry}) == 1:
        raise PairsError(f"{test.images.root} has one class alone, and among one class every answer is right")
    counted = {label for labels in test.labels.values() for label in labels}
    without = [f"{label} ({names[entry][0]})" for entry, label in enumerate(of_entry) if label not in counted]
    if without and every_class:
        raise PairsError(f"{test.images.root} has no images of class {listed(without)}")
    if unknown := sorted(counted - {*of_entry}):
        raise PairsError(f"{test.images.root} has labels that are no class: {listed(map(str, unknown))}")
    num = len(test.labels)
    notes = list(more.pop("notes", ()))
    if size and num != size:
        notes.append(f"{num:,} images of the {size:,} that the data set has")
    return Classification(benchmark, title, test, names, split=f"{split}, {num:,} images", notes=tuple(notes), **more)


def note_shared_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note if classes share a name: the first of them is the answer for the images of all."""
    counts = Counter(names)
    if not (twice := len(names) - len(counts)):
        return ()
    shared = listed(name for name, count in counts.items() if count > 1)
    are, do = ("is", "does") if twice == 1 else ("are", "do")
    return (
        f"{twice} of the {len(names):,} names {are} another class's too ({shared}), and {do} not tell the two apart",
    )


def by_folder(
    key: str, root: Path, classes: Mapping[str, int], *, border: int = 0, others: Iterable[str] = ()
) -> Labelled:
    """List the images of a folder that has a folder for each class.

    Args:
        key: of the images, see `Images`.
        root: the folder of the class folders.
        classes: the label of each class folder.
        border: pixels to cut off on every side.
        others: folders that may be there, and do not count.

    Raises:
        PairsError: a folder is missing, empty or unexpected.
    """
    found = set(folders(root))
    missing = sorted(classes.keys() - found)
    unexpected = sorted(found - classes.keys() - set(others))
    if missing or unexpected:
        lacks = f"lacks {len(missing):,} of its class folders ({listed(missing)})" if missing else ""
        has = f"has folders that are no class ({listed(unexpected)})" if unexpected else ""
        raise PairsError(f"{root} {lacks}{' and ' if lacks and has else ''}{has}")
    labels: dict[str, tuple[int, ...]] = {}
    for name, label in sorted(classes.items()):
        images = _images_below(root / name)
        if not images:
            raise PairsError(f"{root / name} holds no images")
        labels.update((f"{name}/{image}", (label,)) for image in images)
    return from_files(key, root, labels, border=border)


def from_files(key: str, root: Path, labels: Mapping[str, tuple[int, ...]], *, border: int = 0) -> Labelled:
    """Make labelled images of files: `labels` of each by its path below `root`, which is its id as a store has it."""
    names, ids = list(labels), list(map(valid_id, labels))
    # An image is a path only when it is its turn: ImageNet has 1.28 million to train on.
    pairs = Pairs(str(root), len(names), None, (), lambda: (Pair(name, root / name, (), {}) for name in names))
    return Labelled(ImageSet(key, root, pairs, ids, border), dict(zip(ids, labels.values(), strict=True)))


def folders(root: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones; no names if it is not a folder.

    Raises:
        PairsError: it cannot be read.
    """
    if not root.is_dir():
        return []
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise PairsError(f"{root} cannot be read: {error}") from error


def _images_below(folder: Path) -> list[str]:
    found = walk(folder)
    if found.problems:
        raise PairsError(f"{found.problems[0].path}: {found.problems[0].reason}")
    return sorted(image.as_posix() for image in found.images)
