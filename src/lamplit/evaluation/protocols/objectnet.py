"""ObjectNet (Barbu et al., 2019): the 113 of its 313 classes that ImageNet has too.

A class may be several of ImageNet's (a chair: barber chair, folding chair, rocking chair); its best name counts. Two
pixels are cut off on every side, as the ImageNet testbed does, for the frame of one red pixel.
"""

from __future__ import annotations

import json
from pathlib import Path

from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import by_folder, zero_shot
from lamplit.evaluation.protocols.tasks import Task
from lamplit.zeroshot.names import class_names, listed

NOTE = (
    "the paper does not say which classes of ObjectNet it used; these are the 113 that overlap with ImageNet's, as "
    "for CLIP"
)


def read_objectnet(root: Path) -> list[Task]:
    """Read ObjectNet, as its archive unpacks: `objectnet-1.0/images` and `objectnet-1.0/mappings`."""
    base = root / "objectnet-1.0" if (root / "objectnet-1.0").is_dir() else root
    places = (base / "mappings", root)
    try:
        all_folders, numbers = _mapping(places)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PairsError(f"the mapping files of {root} are not ObjectNet's ({reason})") from error
    labels = {folder: label for label, folder in enumerate(numbers)}
    test = by_folder("objectnet", base / "images", labels, border=2, others=all_folders)
    names = class_names("imagenet")
    entries = [(labels[folder], number) for folder, of_class in numbers.items() for number in of_class]
    task = zero_shot(
        "objectnet", "ObjectNet", test, [names[number] for _, number in entries],
        split="test", size=18_574, templates="clip-80", entry_class=[label for label, _ in entries], notes=(NOTE,),
    )  # fmt: skip
    return [task]


def _mapping(places: tuple[Path, ...]) -> tuple[set[str], dict[str, list[int]]]:
    """Return all folders, and of those that overlap with ImageNet, sorted, their classes there."""
    folder_of = {name: folder for folder, name in json.loads(_read(places, "folder_to_objectnet_label.json")).items()}
    overlap: dict[str, str] = json.loads(_read(places, "objectnet_to_imagenet_1k.json"))
    # ImageNet's long names come in the order of the development kit, and one more file tells PyTorch's.
    pytorch_of = {own: int(n) for n, own in json.loads(_read(places, "pytorch_to_imagenet_2012_id.json")).items()}
    long_names = [line.strip() for line in _read(places, "imagenet_to_label_2012_v2").splitlines() if line.strip()]
    number_of = {name: pytorch_of[own] for own, name in enumerate(long_names)}
    numbers = {
        folder_of[name]: sorted(number_of[long_name] for long_name in imagenet.split("; "))
        for name, imagenet in overlap.items()
    }
    return set(folder_of.values()), dict(sorted(numbers.items()))


def _read(places: tuple[Path, ...], name: str) -> str:
    for place in places:
        if (place / name).is_file():
            return (place / name).read_text("utf-8")
    raise PairsError(f"{name} is missing; looked in {listed(map(str, places))}")
