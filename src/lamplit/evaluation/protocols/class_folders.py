"""A folder of your own, with a folder of images for each class."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from lamplit.data.valid_text import valid_id
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import by_folder, folders, note_shared_names, zero_shot
from lamplit.evaluation.protocols.imagenet_labels import wordnet_name
from lamplit.evaluation.protocols.shards import read_shards
from lamplit.evaluation.protocols.split_folders import find_splits, has_tars
from lamplit.evaluation.protocols.tasks import Task


def read_folder(root: Path) -> list[Task]:
    """Read images in a folder by class; `fire_truck` is called "fire truck", and class 2 comes before class 10.

    Where `root` has splits (`train` and `test`, or as `find_splits` knows them), the classes are in these, and the
    few-shot probe trains on `train`. WordNet ids are called by their names, and numbers by the lines of
    `classnames.txt`.

    Raises:
        PairsError: there are fewer than two classes, one has no images, or all images are to train on.
    """
    splits = find_splits(root)
    if splits.held_out and has_tars(root / splits.held_out):
        return read_shards(root, splits)
    folder = root / splits.held_out
    found = sorted(folders(folder), key=_natural)
    if not found:
        raise PairsError(f"{folder} has no folders")
    if len(found) == 1:
        inside = folder / found[0]
        mend = f"; type folder={inside} if the classes are in it" if folders(inside) else ""
        raise PairsError(f"{folder} has one folder alone ({found[0]}), and among one class every answer is right{mend}")
    classes = {name: label for label, name in enumerate(found)}
    test = by_folder(f"folder-{splits.held_out}" if splits.held_out else "folder", folder, classes)
    names, notes = _names(found, root / "classnames.txt")
    task = zero_shot(
        "folder", valid_id(root.name), test, [(name,) for name in names], notes=(*notes, *note_shared_names(names)),
        split=splits.held_out or "all", size=0, templates="big_vision-8",
        training=partial(by_folder, f"folder-{splits.training}", root / splits.training, classes)
        if splits.training else None,
    )  # fmt: skip
    return [task]


def _names(found: list[str], list_of_names: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return what the classes are called, by the names of their folders, and a note if that may be wrong."""
    if all(name.isdecimal() for name in found):
        if list_of_names.is_file():
            listed = [line.strip() for line in list_of_names.read_text("utf-8-sig").splitlines() if line.strip()]
            if all(int(name) < len(listed) for name in found):
                return [listed[int(name)] for name in found], ()
            raise PairsError(f"{list_of_names} has {len(listed):,} names, and a folder is called {found[-1]}")
        numbers = f"the classes are called by numbers ({found[0]}), which no model reads; name them in classnames.txt"
        return found, (numbers,)
    of_ids = {name: wordnet_name(name) for name in found if re.fullmatch(r"n\d{8}", name)}
    unknown = [name for name, known in of_ids.items() if known is None]
    notes = (f"{unknown[0]} is a WordNet id whose name is not known",) if unknown else ()
    return [of_ids.get(name) or valid_id(name).replace("_", " ") for name in found], notes


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]
