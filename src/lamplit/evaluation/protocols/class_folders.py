"""A folder of your own, with a folder of images for each class."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import by_folder, folders, zero_shot
from lamplit.evaluation.protocols.tasks import Task


def read_folder(root: Path) -> list[Task]:
    """Read images in a folder by class; `fire_truck` is called "fire truck", and class 2 comes before class 10.

    Where `root` has `train` and `test` (or `val`), the classes are in these, and the few-shot probe trains on `train`.
    """
    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), "")
    is_split = bool(held_out) and (root / "train").is_dir()
    folder = root / held_out if is_split else root
    found = sorted(folders(folder), key=_natural)
    if not found:
        raise PairsError(f"{folder} has no folders")
    classes = {name: label for label, name in enumerate(found)}
    test = by_folder(f"folder-{held_out}" if is_split else "folder", folder, classes)
    task = zero_shot(
        "folder", root.name, test, [(name.replace("_", " "),) for name in found],
        split=held_out if is_split else "all", size=0, templates="big_vision-8",
        training=partial(by_folder, "folder-train", root / "train", classes) if is_split else None,
    )  # fmt: skip
    return [task]


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]
