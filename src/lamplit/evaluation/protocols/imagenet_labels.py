"""ImageNet's classes as the timm package lists them, and the labels of its validation images where they lie flat.

The archive of the validation images has no folders, and several lists of their labels are about. Those that name
synsets, or number them in their order as PyTorch does, can be taken as they are. The development kit's own numbers are
in another order, and mean nothing without its `meta.mat`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path

import scipy.io

from lamplit.errors import PairsError
from lamplit.zeroshot.names import class_names, listed


@cache
def synsets() -> tuple[str, ...]:
    """Return the 1,000 synsets in the order of their labels."""
    return tuple(timm_text("synsets.txt").split())


@cache
def label_of_synset() -> dict[str, int]:
    """Return the label of each synset."""
    return {synset: label for label, synset in enumerate(synsets())}


@cache
def _lemmas() -> dict[str, str]:
    lines = timm_text("synset_to_lemma.txt").splitlines()
    return {synset: lemmas.split(",")[0].strip() for synset, _, lemmas in (line.partition("\t") for line in lines)}


def wordnet_name(synset: str) -> str | None:
    """Return what a WordNet id such as n03388043 stands for: CLIP's name for ImageNet's classes, else WordNet's first.

    None if it is no such id, or is not among the 21,842 of ImageNet.
    """
    if (label := label_of_synset().get(synset)) is not None:
        return class_names("imagenet")[label][0]
    return _lemmas().get(synset)


def subset(letter: str) -> tuple[list[int], list[str]]:
    """Return the labels and the synsets of ImageNet-A (`a`) or -R (`r`), in one order."""
    numbers = [int(number) for number in timm_text(f"{letter}_indices.txt").split()]
    return numbers, timm_text(f"{letter}_synsets.txt").split()


def timm_text(name: str) -> str:
    """Read one of the lists that come with timm (Apache-2.0), without the `imagenet_` before its name."""
    return resources.files("timm").joinpath("data", "_info", f"imagenet_{name}").read_text("utf-8")


def labels_of_flat_files(root: Path, folder: Path) -> dict[int, int]:
    """Find a list of labels beside the images of the archive; return the label of each by its number, from 1.

    Args:
        root: the folder of the data set: its lists lie there, or in its development kit.
        folder: the folder of the images: lists may lie there too.

    Raises:
        PairsError: there is no list, or it is not one of ImageNet's.
    """
    places = (root, folder, root / "ILSVRC2012_devkit_t12/data", root / "devkit/data", root / "data")
    for name, read in _LISTS.items():
        for file in (place / name for place in places):
            if file.is_file():
                try:
                    return read(file)
                except (ValueError, LookupError, OSError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise PairsError(f"{file} is not a list of ImageNet's labels ({reason})") from error
    raise PairsError(f"{folder} has images without folders, and there is no list of their labels: {listed(_LISTS)}")


def _read_kaggle(file: Path) -> dict[int, int]:
    """`ImageId,PredictionString` with a row `ILSVRC2012_val_00048981,n03995372 85 1 499 272`."""
    with file.open(encoding="utf-8", newline="") as lines:
        return {
            _number(row["ImageId"]): label_of_synset()[row["PredictionString"].split()[0]]
            for row in csv.DictReader(lines)
        }


def _read_synsets(file: Path) -> dict[int, int]:
    """A synset for each image, in their order."""
    lines = file.read_text("utf-8").split()
    return {number: label_of_synset()[synset] for number, synset in enumerate(lines, start=1)}


def _read_caffe(file: Path) -> dict[int, int]:
    """`ILSVRC2012_val_00000001.JPEG 65`, in the order of the synsets."""
    rows = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
    labels = {_number(name): int(label) for name, label in rows}
    if wrong := [label for label in labels.values() if not 0 <= label < len(synsets())]:
        raise ValueError(f"label {wrong[0]} is not one of 0 to 999")
    return labels


def _read_devkit(file: Path) -> dict[int, int]:
    """The development kit's own number (1 to 1,000) for each image, in their order."""
    meta = file.with_name("meta.mat")
    if not meta.is_file():
        raise PairsError(
            f"{file} numbers the classes in an order of its own, and {meta}, which tells it, is missing; "
            "unpack it from ILSVRC2012_devkit_t12.tar.gz"
        )
    table = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
    of_own = {
        int(own): label_of_synset()[synset]
        for own, synset in zip(table["ILSVRC2012_ID"], table["WNID"], strict=True)
        if synset in label_of_synset()  # the others are the inner nodes of the tree
    }
    return {number: of_own[int(own)] for number, own in enumerate(file.read_text("utf-8").split(), start=1)}


def _number(name: str) -> int:
    return int(name.removeprefix("ILSVRC2012_val_").split(".")[0])


_LISTS: dict[str, Callable[[Path], dict[int, int]]] = {
    "LOC_val_solution.csv": _read_kaggle,
    "imagenet_2012_validation_synset_labels.txt": _read_synsets,
    "val.txt": _read_caffe,
    "ILSVRC2012_validation_ground_truth.txt": _read_devkit,
}
