"""ImageNet and the sets that share its classes: V2, A, R, Sketch and ReaL.

Class names are CLIP's, templates its 80; -A and -R have 200 of the classes, and only these are choices. Labels are
those of PyTorch: 0 to 999 in the order of the synsets.
"""

from __future__ import annotations

import glob
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from lamplit.data.sources import read_pairs
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import by_folder, folders, from_files, zero_shot
from lamplit.evaluation.protocols.imagenet_labels import (
    label_of_synset,
    labels_of_flat_files,
    subset,
    synsets,
    timm_text,
)
from lamplit.evaluation.protocols.tasks import ImageSet, Labelled, Task
from lamplit.zeroshot.names import class_names, listed

IMAGE_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
V2_FOLDERS = {
    "imagenet-v2": "imagenetv2-matched-frequency-format-val",
    "imagenet-v2-threshold0.7": "imagenetv2-threshold0.7-format-val",
    "imagenet-v2-top-images": "imagenetv2-top-images-format-val",
}


def validation(root: Path) -> Labelled:
    """Read ImageNet's validation images, 50,000 of 1,000 classes, in whichever layout they lie.

    These are: a folder for each synset, in `root` or `root/val`; the flat files of the archive with a list of labels
    (`imagenet_labels.py`); Parquet files or webdataset tars with a `label` or `cls` column, which are read through
    once for their labels.

    Raises:
        PairsError: none of them is there, or its classes are not ImageNet's.
    """
    for folder in (root / "val", root):
        found = folders(folder)
        if 0 < len(found) < len(synsets()) and label_of_synset().keys() >= set(found):
            raise PairsError(
                f"{folder} has {len(found):,} of the {len(synsets()):,} classes, and accuracy among these is not "
                f"ImageNet's; type folder={root}, where they are called by the same names"
            )
        if any(re.fullmatch(r"n\d{8}", name) for name in found):
            return by_folder("imagenet-val", folder, label_of_synset())
    for folder in (root / "val", root / "ILSVRC/Data/CLS-LOC/val", root):
        if files := sorted(file.name for file in folder.glob("ILSVRC2012_val_*.*")):
            return _flat(root, folder, files)
    if tables := _tables(root):
        return _from_tables(root, tables)
    raise PairsError(f"{root} holds no validation images of ImageNet")


def read_imagenet(root: Path) -> list[Task]:
    """Read ImageNet's validation split, and its training split where `root/train` has folders by synset."""
    training = None
    if folders(root / "train"):
        training = partial(by_folder, "imagenet-train", root / "train", label_of_synset())
    return [_task("imagenet", "ImageNet", validation(root), "validation", 50_000, training=training)]


def read_imagenet_real(root: Path) -> list[Task]:
    """Read ImageNet's validation images with the labels of "Are we done with ImageNet?" (Beyer et al., 2020).

    Each has one, several or none; those without are left out, and any of several is right. The labels are those of
    `root/real.json`, or of the timm package.
    """
    images = validation(root).images
    own = root / "real.json"
    try:
        real: list[list[int]] = json.loads(own.read_text("utf-8") if own.is_file() else timm_text("real_labels.json"))
    except ValueError as error:
        raise PairsError(f"{own} is not JSON: {error}") from error
    labels = {}
    for name in images.ids:
        number = IMAGE_NUMBER.search(name)
        if not number or not 1 <= int(number[1]) <= len(real):
            raise PairsError(f"{name} in {images.root} is not named as ImageNet's archive names it, so ReaL's "
                             "labels cannot be found; expected a name with ILSVRC2012_val_00000001 in it")  # fmt: skip
        if right := tuple(real[int(number[1]) - 1]):
            labels[name] = right
    test = Labelled(images, labels)
    size = sum(map(bool, real))
    return [_task("imagenet-real", "ImageNet ReaL", test, "validation", size, every_class=False)]


def read_imagenet_v2(root: Path) -> list[Task]:
    """Read ImageNet V2, matched frequency."""
    return _read_v2("imagenet-v2", "ImageNet V2", root)


def read_imagenet_v2_threshold(root: Path) -> list[Task]:
    """Read ImageNet V2, threshold 0.7."""
    return _read_v2("imagenet-v2-threshold0.7", "ImageNet V2 (threshold 0.7)", root)


def read_imagenet_v2_top_images(root: Path) -> list[Task]:
    """Read ImageNet V2, top images."""
    return _read_v2("imagenet-v2-top-images", "ImageNet V2 (top images)", root)


def read_imagenet_a(root: Path) -> list[Task]:
    """Read ImageNet-A: 200 classes, shown without a quarter of their width and height as big_vision does."""
    return _read_subset("imagenet-a", "ImageNet-A", root, "a", 7_500, crop=0.75)


def read_imagenet_r(root: Path) -> list[Task]:
    """Read ImageNet-R: 200 classes."""
    return _read_subset("imagenet-r", "ImageNet-R", root, "r", 30_000)


def read_imagenet_sketch(root: Path) -> list[Task]:
    """Read ImageNet-Sketch: 1,000 classes."""
    folder = root / "sketch" if (root / "sketch").is_dir() else root
    test = by_folder("imagenet-sketch", folder, label_of_synset())
    return [_task("imagenet-sketch", "ImageNet-Sketch", test, "all", 50_889)]


def _task(benchmark: str, title: str, test: Labelled, split: str, size: int, **more: Any) -> Task:
    names = more.pop("names", None) or class_names("imagenet")
    return zero_shot(benchmark, title, test, names, split=split, size=size, templates="clip-80", **more)


def _read_v2(benchmark: str, title: str, root: Path) -> list[Task]:
    wanted = V2_FOLDERS[benchmark]
    if root.name in V2_FOLDERS.values() and root.name != wanted:
        raise PairsError(f"{root} is another variant of ImageNet V2; {benchmark} is {wanted}")
    folder = root / wanted if (root / wanted).is_dir() else root
    # The folders are labels, not names: 10 comes after 9, and not after 1.
    test = by_folder(benchmark, folder, {str(label): label for label in range(1000)})
    return [_task(benchmark, title, test, "test", 10_000)]


def _read_subset(benchmark: str, title: str, root: Path, letter: str, size: int, *, crop: float = 0.875) -> list[Task]:
    folder = root / benchmark if (root / benchmark).is_dir() else root
    numbers, own_synsets = subset(letter)
    names = class_names("imagenet")
    test = by_folder(benchmark, folder, {synset: label for label, synset in enumerate(own_synsets)})
    return [_task(benchmark, title, test, "test", size, names=[names[number] for number in numbers], crop=crop)]


def _flat(root: Path, folder: Path, files: list[str]) -> Labelled:
    of_number = labels_of_flat_files(root, folder)
    numbers = {name: int(match[1]) for name in files if (match := IMAGE_NUMBER.match(name))}
    if unknown := [name for name in files if numbers.get(name) not in of_number]:
        raise PairsError(f"{folder} has images without a label: {listed(unknown)}")
    return from_files("imagenet-val", folder, {name: (of_number[number],) for name, number in numbers.items()})


def _tables(root: Path) -> str:
    """Name the shards of the validation split: `root` itself if it names files, else those called `val`."""
    if not root.is_dir():
        return str(root) if root.is_file() or any(root.parent.glob(root.name)) else ""
    for suffix in (".parquet", ".tar"):
        for folder in (root, root / "data"):
            if any(folder.glob(f"*val*{suffix}")):
                return f"{glob.escape(str(folder))}/*val*{suffix}"
    return ""


def _from_tables(root: Path, source: str) -> Labelled:
    pairs = read_pairs(source)
    labels = {}
    for pair in pairs:
        cell = pair.metadata.get("label", pair.metadata.get("cls"))
        label = int(str(cell)) if re.fullmatch(r"\s*\d{1,3}\s*", str(cell)) else None
        if label is None:
            raise PairsError(
                f"{source} has {cell!r} for the label of image {pair.id}; expected a column called label or cls "
                "with numbers from 0 to 999"
            )
        labels[pair.id] = (label,)
    return Labelled(ImageSet("imagenet-val", root, pairs, list(labels)), labels)
