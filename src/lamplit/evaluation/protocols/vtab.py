"""VTAB's natural sets, EuroSAT, Resisc45 and their like, most of them as torchvision reads them.

Each is taken with all images of its official test split, and with all there are where it has none (VTAB draws a split
of its own there, and some of the paper's numbers are of that). Class names and templates are the paper's where
appendix B has them, else CLIP's.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from lamplit.data.pairs import Pair, Pairs
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import by_folder, from_files, zero_shot
from lamplit.evaluation.protocols.tasks import ImageSet, Labelled, Task
from lamplit.zeroshot.names import class_keys, class_names, listed, plain

ALL = ("all images, because the data set has no official test split; VTAB draws one of its own",)
PARTITION = ("the first of the data set's ten official partitions; VTAB draws a split of its own",)


def read_caltech101(root: Path) -> list[Task]:
    """Read Caltech101 without its background class, as torchvision does."""
    dataset = _open(datasets.Caltech101, root, "caltech101/101_ObjectCategories/BACKGROUND_Google")
    order = _order(root, dataset.categories, "caltech101")
    base = Path("caltech101/101_ObjectCategories")
    labels = {
        (base / dataset.categories[own] / f"image_{number:04d}.jpg").as_posix(): (order[own],)
        for own, number in zip(dataset.y, dataset.index, strict=True)
    }
    test = from_files("caltech101", root, labels)
    notes = (*ALL, "101 classes: the background class, which VTAB has, is left out")
    return [_task("caltech101", "Caltech101", test, "all", 8_677, "caltech101", "clip-caltech101", notes=notes)]


def read_cifar10(root: Path) -> list[Task]:
    """Read CIFAR-10."""
    return _read_cifar("cifar10", "CIFAR-10", datasets.CIFAR10, root)


def read_cifar100(root: Path) -> list[Task]:
    """Read CIFAR-100."""
    return _read_cifar("cifar100", "CIFAR-100", datasets.CIFAR100, root)


def read_dtd(root: Path) -> list[Task]:
    """Read the Describable Textures, partition 1."""

    def split(name: str) -> Labelled:
        dataset = _open(datasets.DTD, root, f"dtd/dtd/labels/{name}1.txt", split=name)
        order = _order(root, dataset.classes, "dtd")
        return _files(f"dtd-{name}", root, dataset._image_files, [order[own] for own in dataset._labels])

    return [_task("dtd", "DTD", split("test"), "test", 1_880, "dtd", "clip-dtd", training=partial(split, "train"))]


def read_flowers102(root: Path) -> list[Task]:
    """Read Oxford Flowers: trained on 10 images of each class."""

    def split(name: str) -> Labelled:
        dataset = _open(datasets.Flowers102, root, "flowers-102/setid.mat", split=name)
        # torchvision spells three names otherwise, or has none by its age; the numbers are the data set's own.
        return _files(f"flowers102-{name}", root, dataset._image_files, dataset._labels)

    training = partial(split, "train")
    return [
        _task("flowers102", "Flowers102", split("test"), "test", 6_149, "flowers102", "clip-flowers102",
              training=training)
    ]  # fmt: skip


def read_pets(root: Path) -> list[Task]:
    """Read Oxford-IIIT Pet."""

    def split(name: str) -> Labelled:
        dataset = _open(datasets.OxfordIIITPet, root, f"oxford-iiit-pet/annotations/{name}.txt", split=name)
        order = _order(root, dataset.classes, "pets")
        return _files(f"pets-{name}", root, dataset._images, [order[own] for own in dataset._labels])

    training = partial(split, "trainval")
    return [_task("pets", "Oxford-IIIT Pet", split("test"), "test", 3_669, "pets", "clip-pets", training=training)]


def read_sun397(root: Path) -> list[Task]:
    """Read SUN397: the test images of its first partition where `Testing_01.txt` is there, else all."""
    dataset = _open(datasets.SUN397, root, "SUN397/ClassName.txt")
    order = _order(root, dataset.classes, "sun397")
    files = sorted(zip(dataset._image_files, dataset._labels, strict=True))
    all_images = _files("sun397", root, [file for file, _ in files], [order[own] for _, own in files])

    def partition(name: str) -> Labelled | None:
        file = next((place / name for place in (root, root / "SUN397") if (place / name).is_file()), None)
        if file is None:
            return None
        ids = [f"SUN397/{line.strip().lstrip('/')}" for line in file.read_text("utf-8").splitlines() if line.strip()]
        if missing := [name for name in ids if name not in all_images.labels]:
            raise PairsError(f"{file} lists {len(missing):,} images that are not there: {listed(missing)}")
        stem = file.stem.split("_")[0].lower()
        return from_files(f"sun397-{stem}", root, {name: all_images.labels[name] for name in ids})

    test, training = partition("Testing_01.txt"), partition("Training_01.txt")
    kind = ("test", 19_850) if test else ("all", 108_754)
    return [
        _task("sun397", "SUN397", test or all_images, *kind, "sun397", "clip-sun397",
              training=None if training is None else lambda: training, notes=PARTITION if test else ALL)
    ]  # fmt: skip


def read_svhn(root: Path) -> list[Task]:
    """Read the Street View House Numbers, cropped to 32 pixels."""

    def split(name: str) -> Labelled:
        dataset = _open(datasets.SVHN, root, f"{name}_32x32.mat", split=name)
        return _arrays(f"svhn-{name}", root, dataset, dataset.labels.tolist())

    training = partial(split, "train")
    return [_task("svhn", "SVHN", split("test"), "test", 26_032, "paper-svhn", "paper-svhn", training=training)]


def read_eurosat(root: Path) -> list[Task]:
    """Read EuroSAT in colours."""
    dataset = _open(datasets.EuroSAT, root, "eurosat/2750")
    order = _order(root, dataset.classes, "paper-eurosat")
    test = _files("eurosat", root, [Path(file) for file, _ in dataset.samples], [order[n] for _, n in dataset.samples])
    return [_task("eurosat", "EuroSAT", test, "all", 27_000, "paper-eurosat", "paper-eurosat", notes=ALL)]


def read_resisc45(root: Path) -> list[Task]:
    """Read NWPU-RESISC45: a folder by class."""
    folder = root / "NWPU-RESISC45" if (root / "NWPU-RESISC45").is_dir() else root
    classes = {key.replace(" ", "_"): label for label, key in enumerate(class_keys("paper-resisc45"))}
    test = by_folder("resisc45", folder, classes)
    return [_task("resisc45", "Resisc45", test, "all", 31_500, "paper-resisc45", "paper-resisc45", notes=ALL)]


def read_fashion_mnist(root: Path) -> list[Task]:
    """Read Fashion-MNIST, which is not part of VTAB."""

    def split(name: str) -> Labelled:
        marker = "FashionMNIST/raw/t10k-images-idx3-ubyte"
        dataset = _open(datasets.FashionMNIST, root, marker, train=name == "train")
        order = _order(root, dataset.classes, "fashion-mnist")
        return _arrays(f"fashion-mnist-{name}", root, dataset, [order[own] for own in dataset.targets.tolist()])

    training = partial(split, "train")
    return [
        _task("fashion-mnist", "Fashion-MNIST", split("test"), "test", 10_000, "fashion-mnist", "big_vision-8",
              training=training)
    ]  # fmt: skip


def _read_cifar(benchmark: str, title: str, kind: Any, root: Path) -> list[Task]:
    def split(name: str) -> Labelled:
        dataset = _open(kind, root, f"{kind.base_folder}/{kind.meta['filename']}", train=name == "train")
        order = _order(root, dataset.classes, benchmark)
        return _arrays(f"{benchmark}-{name}", root, dataset, [order[own] for own in dataset.targets])

    training = partial(split, "train")
    return [_task(benchmark, title, split("test"), "test", 10_000, benchmark, "clip-cifar", training=training)]


def _task(
    benchmark: str, title: str, test: Labelled, split: str, size: int, names: str, templates: str, **more: Any
) -> Task:
    return zero_shot(
        benchmark, title, test, class_names(names), split=split, size=size, templates=templates, **more
    )  # fmt: skip


def _open(kind: Any, root: Path, marker: str, **options: Any) -> Any:
    """Make one of torchvision's data sets of the files that are there.

    Raises:
        PairsError: `marker`, which the folder should have, is not there, or torchvision refuses what is.
    """
    # Looked for first: torchvision would make folders in a wrong place, and name options that we do not have.
    if not (root / marker).exists():
        raise PairsError(f"{root} has no {marker}")
    try:
        return kind(root, download=False, **options)
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        reason = str(error).split(" You can use download")[0].rstrip(".")
        raise PairsError(f"torchvision cannot read {kind.__name__} in {root}: {reason}") from error


def _order(root: Path, found: Sequence[str], names: str) -> list[int]:
    """Return our label for each of the data set's own; both have the same classes, in any order.

    Raises:
        PairsError: they have not.
    """
    keys = class_keys(names)
    own = [plain(name) for name in found]
    missing, unexpected = sorted({*keys} - {*own}), sorted({*own} - {*keys})
    if missing or unexpected:
        lacks = f"lacks {len(missing):,} of its classes ({listed(missing)})" if missing else ""
        has = f"has classes that are not the data set's ({listed(unexpected)})" if unexpected else ""
        raise PairsError(f"{root} {lacks}{' and ' if lacks and has else ''}{has}")
    return [keys.index(key) for key in own]


def _files(key: str, root: Path, files: Sequence[Path], labels: Sequence[int]) -> Labelled:
    listed_files = zip(files, labels, strict=True)
    return from_files(key, root, {file.relative_to(root).as_posix(): (int(label),) for file, label in listed_files})


def _arrays(key: str, root: Path, dataset: Any, labels: Sequence[int]) -> Labelled:
    """Make labelled images of a data set that holds them as arrays: each becomes a PNG when it is its turn."""
    ids = [f"{number:05d}" for number in range(len(labels))]

    def read() -> Iterator[Pair]:
        for number, name in enumerate(ids):
            file = io.BytesIO()
            dataset[number][0].save(file, "PNG")
            yield Pair(name, file.getvalue(), (), {})

    pairs = Pairs(str(root), len(ids), None, (), read)
    return Labelled(
        ImageSet(key, root, pairs, ids), {name: (int(label),) for name, label in zip(ids, labels, strict=True)}
    )
