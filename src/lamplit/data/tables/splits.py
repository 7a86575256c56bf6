"""Splits that files or rows are named after: which there are, and which is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from lamplit.errors import UsageError

ALL = "all"
# As the Hugging Face hub finds them in names of files and folders.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Karpathy's: the part of COCO's validation images that everybody trains on.
_WITH = {"train": "restval"}


def split_of(file: PurePath) -> str | None:
    """Return the split that a path names, `train`, `validation` or `test`; None if it names none.

    Example:
        >>> split_of(PurePath("data/test-00000-of-00001.parquet"))
        'test'
    """
    for part in reversed(file.parts):
        for split, words in _WORDS.items():
            if re.search(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", part.casefold()):
                return split
    return None


def split_named(name: str) -> str | None:
    """Return the split that a whole name is, `train`, `validation` or `test`; None if it is the name of anything else.

    Example:
        >>> split_named("Training_Set"), split_named("val2017"), split_named("test tubes")
        ('train', 'validation', None)
    """
    for split, words in _WORDS.items():
        if re.fullmatch(rf"({'|'.join(words)})([ _-]?(set|split|data|images))?[ _-]?\d*", name.casefold()):
            return split
    return None


def choose_split(name: str, sizes: Mapping[str, int], wanted: str | None) -> tuple[set[str] | None, str]:
    """Choose one of several splits: the wanted one, else `train`.

    Args:
        name: of the source, for messages.
        sizes: the number of files or images of each split.
        wanted: a split, or `all`.

    Returns:
        The names of what is read, or None for everything; and a note, empty if there is nothing to say.

    Raises:
        UsageError: there is no such split.
    """
    alike = {_canonical(split): split for split in sizes}
    split = "train" if wanted is None else wanted
    if wanted == ALL or (wanted is None and (len(sizes) < 2 or "train" not in alike)):
        return None, ""
    if split not in sizes and _canonical(split) not in alike:
        raise UsageError(f"{name} has no split {split!r}; it has {', '.join(sizes)}; type --split NAME, or --split all")
    chosen = {split if split in sizes else alike[_canonical(split)]}
    chosen |= {_WITH[split]} & sizes.keys() if split in _WITH else set()
    left = [other for other in sizes if other not in chosen]
    if wanted is not None or not left:
        return chosen, ""
    counts = ", ".join(f"{other} ({sizes[other]:,})" for other in left)
    read = " and ".join(sorted(chosen, reverse=True))
    said = f"{name} has several splits; read is {read}, and not {counts}; --split NAME or --split all reads others"
    return chosen, said


def refuse_split(name: str, split: str | None) -> None:
    """Refuse a split of a source that has none.

    Raises:
        UsageError: one is wanted.
    """
    if split not in (None, ALL):
        raise UsageError(f"{name} has no splits; leave out --split")


def _canonical(split: str) -> str:
    return split_of(PurePath(split)) or split
