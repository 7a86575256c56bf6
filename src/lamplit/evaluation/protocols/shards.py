"""Data sets as CLIP_benchmark exports them: webdataset tars of each split, with lists of names and prompts beside."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from lamplit.data.pairs import Pairs
from lamplit.data.sources import read_pairs
from lamplit.data.tables.columns import strip
from lamplit.data.valid_text import valid_id
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import note_shared_names, zero_shot
from lamplit.evaluation.protocols.split_folders import SplitFolders, has_tars
from lamplit.evaluation.protocols.tasks import ImageSet, Labelled, Retrieval, Task


def read_shards(root: Path, splits: SplitFolders) -> list[Task]:
    """Read `test/0.tar` and so on: images with their class's number in `.cls`, or with captions in `.txt`.

    The classes are the lines of `classnames.txt`, the prompts those of `zeroshot_classification_templates.txt`, with
    `{c}` for the class. The tars are read through once for their labels.

    Raises:
        PairsError: a list is missing or does not fit, the labels are not numbers, or an image has several.
    """
    split = splits.held_out
    kind = "\n".join(_lines(root / "dataset_type.txt")).lower()
    pairs = read_pairs(root / split)
    if kind == "multilabel":
        raise PairsError(f"{root} has several labels an image (dataset_type.txt), which is not read")
    if kind == "retrieval":
        captions = {pair.id: strip(line for text in pair.texts for line in text.splitlines()) for pair in pairs}
        _require_whole(pairs)
        if not all(captions.values()):
            raise PairsError(f"{root / split} has no captions; expected a .txt for each image")
        images = ImageSet(f"folder-{split}", root / split, pairs, list(captions))
        return [Retrieval("folder", valid_id(root.name), images, captions, f"{split}, {len(captions):,} images")]
    names = _lines(root / "classnames.txt")
    if not names:
        raise PairsError(f"{root} has no classnames.txt; expected a line for each class, in the order of its numbers")
    templates = [line.replace("{c}", "{}") for line in _lines(root / "zeroshot_classification_templates.txt")]
    if wrong := [line for line in templates if "{}" not in line]:
        raise PairsError(f"zeroshot_classification_templates.txt in {root} has a line without {{c}}: {wrong[0]!r}")
    has_training = bool(splits.training) and has_tars(root / splits.training)
    task = zero_shot(
        "folder", valid_id(root.name), _labelled(root, split, len(names)), [(name,) for name in names],
        split=split, size=0, templates="clip_benchmark-own" if templates else "big_vision-8",
        template_texts=templates or None, notes=note_shared_names(names),
        training=partial(_labelled, root, splits.training, len(names)) if has_training else None,
    )  # fmt: skip
    return [task]


def _labelled(root: Path, split: str, num_classes: int) -> Labelled:
    pairs = read_pairs(root / split)
    labels = {}
    for pair in pairs:
        cell = str(pair.metadata.get("cls"))
        if not re.fullmatch(r"\s*\d{1,6}\s*", cell) or int(cell) >= num_classes:
            raise PairsError(
                f"{root / split} has {cell!r} for the class of image {pair.id}; "
                f"expected a .cls with a number from 0 to {num_classes - 1}"
            )
        labels[pair.id] = (int(cell),)
    _require_whole(pairs)
    return Labelled(ImageSet(f"folder-{split}", root / split, pairs, list(labels)), labels)


def _require_whole(pairs: Pairs) -> None:
    if pairs.problems:
        raise PairsError(f"{pairs.source} is not whole: {pairs.problems[0].id}: {pairs.problems[0].reason}")


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    return [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
