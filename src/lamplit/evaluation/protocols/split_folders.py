"""The folders of a data set that are its splits, by the names that these usually have: they are never classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamplit.data.tables.splits import split_named
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import folders


@dataclass(frozen=True)
class SplitFolders:
    """The folders that hold splits; both are empty where a folder has no splits.

    Attributes:
        held_out: what is measured, such as `test` or `valid`.
        training: what the few-shot probe trains on; empty if there is none.
    """

    held_out: str = ""
    training: str = ""


def find_splits(root: Path) -> SplitFolders:
    """Find the splits in a folder: `test` before `val`, and one that holds something before one that does not.

    A name alone makes no split, because a class may be called so: something to train on stands beside something to
    measure, or there are tars in it, or no folder has another name.

    Raises:
        PairsError: there is something to train on, and nothing to measure.
    """
    found = folders(root)
    splits = {name: split for name in found if (split := split_named(name))}
    holding = {name for name in splits if folders(root / name) or has_tars(root / name)}
    ordered = sorted(splits, key=lambda name: (name not in holding, splits[name] != "test", name))
    training = next((name for name in ordered if splits[name] == "train"), "")
    held_out = next((name for name in ordered if splits[name] != "train"), "")
    if held_out and (training or has_tars(root / held_out)):
        return SplitFolders(held_out, training)
    if len(splits) < len(found) or not holding:
        return SplitFolders()
    if not held_out:
        mend = f", or type folder={root / training} to measure on the former" if folders(root / training) else ""
        raise PairsError(
            f"{root} has images to train on alone ({training}); put those to measure on into test or val beside it"
            f"{mend}"
        )
    return SplitFolders(held_out, training)


def has_tars(folder: Path) -> bool:
    """Tell whether there are tars in a folder."""
    return any(folder.glob("*.tar"))
